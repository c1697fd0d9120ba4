"""Operations over the trailing, spatial dimensions: pooling, resampling, padding, sampling, shuffles of pixels."""

from __future__ import annotations

import numpy as np

from prunewise.core.flow import Flow, Rectangle, rule
from prunewise.core.labels import Block, Layout
from prunewise.core.trace import Op

_NAMES = [
    f"{name}{rank}d"
    for rank in (1, 2, 3)
    for name in (
        "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool", "reflection_pad",
        "replication_pad", "upsample_nearest", "_upsample_nearest_exact", "fractional_max_pool",
    )
] + [
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
]  # fmt: skip


@rule(*_NAMES)
def spatial(flow: Flow, op: Op) -> list[Layout]:
    """Batch and channels (the first two dimensions) pass; the others are fixed."""
    x = flow.of(op.args["self" if "self" in op.args else "input"])
    shape = flow.shape(op.outputs[0])
    lead = next((d for d in range(len(shape)) if shape[d] != x.shape[d]), len(shape))
    x = flow.fix(x, range(min(lead, len(shape) - _rank(op.name)), len(shape)), op)
    return [Layout(flow.shape(o), x.blocks) for o in op.outputs]


def _rank(name: str) -> int:
    """Number of spatial dimensions, from the operator's name."""
    return next(rank for rank in (1, 2, 3) if f"{rank}d" in name)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(flow: Flow, op: Op) -> Layout:
    """Sampling at given places."""
    x = flow.of(op.args["input"])
    grid = flow.of(op.args["grid"])
    flow.fix(grid, range(len(grid.shape)), op)
    x = flow.fix(x, range(2, len(x.shape)), op)
    return Layout(flow.shape(op.outputs[0]), x.blocks)


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, op: Op) -> Layout:
    """r² channels become one of r times the height and width: they go together."""
    x = flow.of(op.args["self"])
    at = len(x.shape) - 3
    x = flow.fix(x, [at + 1, at + 2], op)
    x, labels = flow.alone(x, at, op)
    shape = flow.shape(op.outputs[0])
    if labels is None:
        return Layout(shape, x.blocks)
    rows = flow.store.unite_along(labels.reshape(shape[at], -1), 1)
    return _relabelled(flow, x, at, rows, shape, op)


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, op: Op) -> Layout:
    """One channel becomes r² of them."""
    x = flow.of(op.args["self"])
    at = len(x.shape) - 3
    x = flow.fix(x, [at + 1, at + 2], op)
    x, labels = flow.alone(x, at, op)
    shape = flow.shape(op.outputs[0])
    if labels is None:
        return Layout(shape, x.blocks)
    return _relabelled(flow, x, at, np.repeat(labels, shape[at] // x.shape[at]), shape, op)


def _relabelled(flow: Flow, x: Layout, dim: int, labels: np.ndarray, shape: tuple[int, ...], op: Op) -> Layout:
    if len(labels) == 1:
        flow.store.pin(labels, f"a single channel in {flow.reason(op)}")
        return Layout(shape, tuple(b for b in x.blocks if dim not in b.dims))
    return Layout(shape, tuple(Block(b.dims, labels) if dim in b.dims else b for b in x.blocks))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(flow: Flow, op: Op) -> Layout:
    """(groups, channels of a group) transposed."""
    x = flow.of(op.args["self"])
    groups = int(op.args["groups"])
    x, labels = flow.alone(x, 1, op)
    if labels is None:
        return x
    table = labels.reshape(groups, -1)
    flow.rectangles.append(Rectangle(table, (1,), flow.reason(op)))
    return _relabelled(flow, x, 1, table.T.reshape(-1), x.shape, op)


@rule("im2col")
def im2col(flow: Flow, op: Op) -> Layout:
    """Every channel becomes one for each place of the window."""
    x = flow.of(op.args["self"])
    x = flow.fix(x, range(2, len(x.shape)), op)
    x, labels = flow.alone(x, 1, op)
    shape = flow.shape(op.outputs[0])
    if labels is None:
        return Layout(shape, x.blocks)
    return _relabelled(flow, x, 1, np.repeat(labels, shape[1] // x.shape[1]), shape, op)


@rule("col2im")
def col2im(flow: Flow, op: Op) -> Layout:
    """All places of a window become one channel: they go together."""
    x = flow.of(op.args["self"])
    at = len(x.shape) - 2
    x = flow.fix(x, [at + 1], op)
    x, labels = flow.alone(x, at, op)
    shape = flow.shape(op.outputs[0])
    if labels is None:
        return Layout(shape, x.blocks)
    return _relabelled(flow, x, at, flow.store.unite_along(labels.reshape(shape[at], -1), 1), shape, op)
