"""Operations that move data without computing: views, permutations, concatenation, slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from prunewise.core.flow import Flow, Rectangle, rule
from prunewise.core.labels import Block, Layout
from prunewise.core.trace import Op, Ref


def _keep_origin(flow: Flow, op: Op) -> None:
    """A view of a parameter is still that parameter."""
    source = op.args["self"].id
    if source in flow.origins:
        for out in op.outputs:
            flow.origins[out] = flow.origins[source]


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy", "_reshape_copy", "flatten", "unflatten")
def view(flow: Flow, op: Op) -> Layout:
    """Dimensions merged and split."""
    _keep_origin(flow, op)
    if "dtype" in op.args and "size" not in op.args:
        return flow.of(op.args["self"])
    return flow.reshape(flow.of(op.args["self"]), flow.shape(op.outputs[0]), op)


@rule("as_strided")
def as_strided(flow: Flow, op: Op) -> Layout:
    """Only a reshape in disguise is followed."""
    shape, strides = tuple(op.args["size"]), list(op.args["stride"])
    layout = flow.of(op.args["self"])
    contiguous = [int(np.prod(shape[d + 1 :])) for d in range(len(shape))]
    if strides == contiguous and np.prod(shape) == np.prod(layout.shape) and not op.args.get("storage_offset"):
        return flow.reshape(layout, shape, op)
    return Layout(shape, flow.fix(layout, range(len(layout.shape)), op).blocks)


@rule(
    "permute",
    "transpose",
    "t",
    "movedim",
    "swapaxes",
    "numpy_T",
    "mT",
    "permute_copy",
    "transpose_copy",
    "t_copy",
)
def permute(flow: Flow, op: Op) -> Layout:
    """Dimensions change places."""
    _keep_origin(flow, op)
    layout = flow.of(op.args["self"])
    rank = len(layout.shape)
    order = list(range(rank))
    if "dims" in op.args:
        order = [d % rank for d in op.args["dims"]]
    elif "dim0" in op.args:
        a, b = op.args["dim0"] % rank, op.args["dim1"] % rank
        order[a], order[b] = order[b], order[a]
    elif rank == 2:
        order = [1, 0]
    return layout.moved(flow.shape(op.outputs[0]), {d: i for i, d in enumerate(order)})


@rule("squeeze", "unsqueeze", "squeeze_copy", "unsqueeze_copy")
def squeeze(flow: Flow, op: Op) -> Layout:
    """Dimensions of size 1 come and go; these are never labelled."""
    _keep_origin(flow, op)
    layout = flow.of(op.args["self"])
    shape = flow.shape(op.outputs[0])
    rank = len(layout.shape)
    if op.name.startswith("unsqueeze"):
        at = op.args["dim"] % (rank + 1)
        return layout.moved(shape, {d: d + (d >= at) for d in range(rank)})
    asked = op.args.get("dim")
    asked = list(range(rank)) if asked is None else [asked] if isinstance(asked, int) else list(asked)
    gone = {d % max(rank, 1) for d in asked if layout.shape and layout.shape[d] == 1}
    kept = [d for d in range(rank) if d not in gone]
    return layout.moved(shape, {d: i for i, d in enumerate(kept)})


def _take(flow: Flow, op: Op, layout: Layout, dim: int, pick: Any, shape: tuple[int, ...]) -> Layout:
    """Every block indexed along `dim` by `pick` (a slice or integer array); `dim` stays a dimension."""
    blocks = []
    for block in layout.blocks:
        labels = block.labels
        if dim in block.dims:
            index: list[Any] = [slice(None)] * labels.ndim
            index[block.dims.index(dim)] = pick
            labels = labels[tuple(index)]
        if labels.size:
            blocks.append(Block(block.dims, labels))
    return _without_single(flow, op, Layout(shape, tuple(blocks)))


def _without_single(flow: Flow, op: Op, layout: Layout) -> Layout:
    """Dimensions that have come down to size 1 lose their labels; one that was labelled alone is pinned."""
    for block in layout.blocks:
        single = [d for d in block.dims if layout.shape[d] == 1]
        if single:
            axes = tuple(block.dims.index(d) for d in single)
            dims = tuple(d for d in block.dims if d not in single)
            labels = block.labels.squeeze(axes)
            if dims:
                layout = layout.replace(block, Block(dims, labels))
            else:
                flow.store.pin(labels.reshape(-1), f"a single channel is picked by its position in {flow.reason(op)}")
                layout = layout.without(block)
    return layout


@rule("slice", "narrow", "slice_copy")
def slice_(flow: Flow, op: Op) -> Layout:
    """A range of indices."""
    layout = flow.of(op.args["self"])
    if op.name == "narrow":
        start, end, step = op.args["start"], op.args["start"] + op.args["length"], 1
    else:
        start, end, step = op.args.get("start"), op.args.get("end"), op.args.get("step", 1)
    shape = flow.shape(op.outputs[0])
    if shape == layout.shape:
        _keep_origin(flow, op)
        return layout
    return _take(flow, op, layout, op.args["dim"] % len(layout.shape), slice(start, end, step), shape)


def _pick_one(flow: Flow, op: Op, layout: Layout, dim: int, index: int, shape: tuple[int, ...]) -> Layout:
    """One index along `dim`, which disappears."""
    single = tuple(1 if d == dim else s for d, s in enumerate(layout.shape))
    layout = _take(flow, op, layout, dim, slice(index, index + 1) if index != -1 else slice(-1, None), single)
    return layout.moved(shape, {d: d - (d > dim) for d in range(len(layout.shape))})


@rule("select", "select_copy")
def select(flow: Flow, op: Op) -> Layout:
    """One index of a dimension."""
    layout = flow.of(op.args["self"])
    return _pick_one(flow, op, layout, op.args["dim"] % len(layout.shape), op.args["index"], flow.shape(op.outputs[0]))


@rule("unbind", "unbind_copy")
def unbind(flow: Flow, op: Op) -> list[Layout]:
    """Every index of a dimension as a tensor of its own."""
    layout = flow.of(op.args["self"])
    dim = op.args["dim"] % len(layout.shape)
    return [_pick_one(flow, op, layout, dim, i, flow.shape(o)) for i, o in enumerate(op.outputs)]


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "chunk", "split_copy",
      "split_with_sizes_copy", "tensor_split")  # fmt: skip
def split(flow: Flow, op: Op) -> list[Layout]:
    """Consecutive ranges. Equal pieces stay equal (the user's code may have asked for so many equal chunks)."""
    layout = flow.of(op.args["self"])
    dim = op.args["dim"] % len(layout.shape)
    sizes = [flow.shape(o)[dim] for o in op.outputs]
    block = layout.block_at(dim)
    if block is not None and len(set(sizes)) == 1 and len(sizes) > 1:
        axis = block.dims.index(dim)
        labels = np.moveaxis(block.labels, axis, 0)
        labels = labels.reshape(len(sizes), sizes[0], *labels.shape[1:])
        flow.rectangles.append(Rectangle(labels, tuple(range(1, labels.ndim)), flow.reason(op)))
    ends = np.cumsum(sizes)
    if len(sizes) == 1:
        return [layout]
    return [
        _take(flow, op, layout, dim, slice(int(end) - size, int(end)), flow.shape(o))
        for end, size, o in zip(ends, sizes, op.outputs, strict=True)
    ]


@rule("cat", "concatenate")
def cat(flow: Flow, op: Op) -> Layout:
    """Labels follow one another along the dimension of concatenation; the other dimensions are joined."""
    layouts = [flow.of(r) for r in op.args["tensors"]]
    shape = flow.shape(op.outputs[0])
    dim = int(op.args.get("dim", 0)) % len(shape)
    # Empty parts add nothing (a cache before its first entry, say); torch lets even an empty 1-D tensor pass.
    layouts = [x for x in layouts if len(x.shape) == len(shape) and x.shape[dim]]
    return _concatenate(flow, op, layouts, dim, shape) if layouts else Layout(shape)


def _concatenate(flow: Flow, op: Op, layouts: list[Layout], dim: int, shape: tuple[int, ...]) -> Layout:
    found = [x.block_at(dim) for x in layouts]
    joint = {b.dims for b in found if b is not None and len(b.dims) > 1}
    if len(joint) == 1 and all(b is not None and b.dims in joint for b in found):
        dims = joint.pop()
        axis = dims.index(dim)
        blocks = [b for b in found if b is not None]
        together: Block | None = Block(dims, np.concatenate([b.labels for b in blocks], axis=axis))
        rest = [x.without(b) for x, b in zip(layouts, blocks, strict=True)]
        hidden = dict.fromkeys(dims, 1)
    else:
        rest, parts = [], []
        some_fixed = any(b is None for b in found)
        for x in layouts:
            block = x.block_at(dim)
            if block is not None and len(block.dims) > 1 and some_fixed:
                x = flow.fix(x, [dim], op)
            x, labels = flow.alone(x, dim, op)
            block = x.block_at(dim)
            if labels is None or block is None:
                labels = flow.store.fresh(x.shape[dim])
                flow.store.pin(labels, f"a fixed part of {flow.reason(op)}")
            else:
                x = x.without(block)
            rest.append(x)
            parts.append(labels)
        together = None if all(b is None for b in found) else Block((dim,), np.concatenate(parts))
        hidden = {dim: 1}
    flat = tuple(hidden.get(d, s) for d, s in enumerate(shape))
    rest = [Layout(tuple(hidden.get(d, s) for d, s in enumerate(x.shape)), x.blocks) for x in rest]
    joined = flow.join(rest, flat, op)
    return Layout(shape, joined.blocks + ((together,) if together is not None else ()))


@rule("stack")
def stack(flow: Flow, op: Op) -> Layout:
    """Element-wise together, along a new dimension."""
    layouts = [flow.of(r) for r in op.args["tensors"]]
    joined = flow.join(layouts, layouts[0].shape, op)
    shape = flow.shape(op.outputs[0])
    at = int(op.args.get("dim", 0)) % len(shape)
    return joined.moved(shape, {d: d + (d >= at) for d in range(len(joined.shape))})


@rule("repeat", "tile")
def repeat(flow: Flow, op: Op) -> Layout:
    """Whole copies, one after another."""
    layout = flow.of(op.args["self"])
    shape = flow.shape(op.outputs[0])
    shift = len(shape) - len(layout.shape)
    layout = layout.moved((1,) * shift + layout.shape, {d: d + shift for d in range(len(layout.shape))})
    times = [new // old if old else 1 for new, old in zip(shape, layout.shape, strict=True)]
    blocks = [Block(b.dims, np.tile(b.labels, [times[d] for d in b.dims])) for b in layout.blocks]
    for d, size in enumerate(layout.shape):
        if size == 1 and times[d] > 1:  # constant along the new dimension
            blocks.append(Block((d,), flow.store.fresh(times[d])))
    return Layout(shape, tuple(blocks))


@rule("flip")
def flip(flow: Flow, op: Op) -> Layout:
    """Order reversed: labels are reversed too."""
    layout = flow.of(op.args["self"])
    for d in op.args["dims"]:
        layout = _take(flow, op, layout, d % len(layout.shape), slice(None, None, -1), layout.shape)
    return layout


@rule("roll")
def roll(flow: Flow, op: Op) -> Layout:
    """Fixed along the rolled dimensions: a shift by so many places is another one in a smaller tensor."""
    layout = flow.of(op.args["self"])
    dims = op.args.get("dims")
    dims = list(range(len(layout.shape))) if not dims else [dims] if isinstance(dims, int) else dims
    return flow.fix(layout, dims, op)


@rule("constant_pad_nd")
def constant_pad(flow: Flow, op: Op) -> Layout:
    """Padded places are constant: free to go with whatever they later meet."""
    layout = flow.of(op.args["self"])
    shape = flow.shape(op.outputs[0])
    pad: Sequence[int] = op.args["pad"]
    for k in range(len(pad) // 2):
        dim = len(shape) - 1 - k
        before, after = pad[2 * k], pad[2 * k + 1]
        if not (before or after):
            continue
        layout, labels = flow.alone(layout, dim, op)
        if labels is None:
            continue
        if before < 0 or after < 0:
            layout = flow.fix(layout, [dim], op)
            continue
        padded = np.concatenate([flow.store.fresh(before), labels, flow.store.fresh(after)])
        blocks = tuple(Block(b.dims, padded) if dim in b.dims else b for b in layout.blocks)
        layout = Layout(layout.shape, blocks)
    return Layout(shape, layout.blocks)


@rule("index", "_unsafe_index")
def index(flow: Flow, op: Op) -> Layout:
    """Indexing by tensors: the indexed dimensions are fixed, the others pass."""
    layout, used, at = _indexed(flow, op)
    shape = flow.shape(op.outputs[0])
    return _picked(layout, used, at, shape[at : at + len(shape) - (len(layout.shape) - len(used))])


def _indexed(flow: Flow, op: Op) -> tuple[Layout, list[int], int]:
    """What is indexed, the dimensions along which it is (fixed), and where what the indices pick stands in the result."""
    used: list[int] = []
    dim = 0
    for i in op.args["indices"]:
        taken = 1
        if isinstance(i, Ref):
            taken = len(flow.shape(i.id)) if _is_mask(flow, i) else 1
            used += range(dim, dim + taken)
            _fix_whole(flow, i, op)
        dim += taken
    contiguous = used == list(range(used[0], used[0] + len(used)))
    return flow.fix(flow.of(op.args["self"]), used, op), used, used[0] if contiguous else 0


def _is_mask(flow: Flow, index: Ref) -> bool:
    return flow.trace.tensors[index.id].dtype in (torch.bool, torch.uint8)


def _fix_whole(flow: Flow, ref: Ref, op: Op, why: str = "") -> None:
    """Nothing of a tensor is removable."""
    flow.fix(flow.of(ref), range(len(flow.shape(ref.id))), op, why)


def _picked(layout: Layout, used: Sequence[int], at: int, picked: tuple[int, ...]) -> Layout:
    """The layout of what is indexed along the dimensions `used`, in which nothing is labelled."""
    to, new = {}, 0
    for d in range(len(layout.shape)):
        if d in used:
            continue
        if new == at:
            new += len(picked)
        to[d] = new
        new += 1
    free = [layout.shape[d] for d in to]
    return layout.moved((*free[:at], *picked, *free[at:]), to)


@rule("index_select", "index_select_backward")
def index_select(flow: Flow, op: Op) -> Layout:
    """A dimension picked by a tensor of indices is fixed; the others pass."""
    layout = flow.fix(flow.of(op.args["self"]), [op.args["dim"]], op)
    return Layout(flow.shape(op.outputs[0]), layout.blocks)


@rule("gather")
def gather(flow: Flow, op: Op) -> Layout:
    """Entries picked along one dimension, which is fixed; the others pass where they are whole."""
    dim = int(op.args["dim"])
    layouts = []
    shape = flow.shape(op.outputs[0])
    for name in ("self", "index"):
        layout = flow.of(op.args[name])
        cut = [d for d, (a, b) in enumerate(zip(layout.shape, shape, strict=True)) if a != b]
        layout = flow.fix(layout, [dim % max(len(shape), 1), *cut] if shape else [], op)
        layouts.append(Layout(shape, layout.blocks))
    return flow.join(layouts, shape, op)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_reduce", "index_copy", "index_fill")
def scatter(flow: Flow, op: Op) -> Layout:
    """Entries written to places along one dimension, which is fixed; the others pass where they are whole."""
    x = flow.of(op.args["self"])
    rank = len(x.shape)
    dim = int(op.args["dim"]) % max(rank, 1)
    layouts = [flow.fix(x, [dim] if rank else [], op)]
    for name in ("index", "src", "source"):
        ref = op.args.get(name)
        if isinstance(ref, Ref) and len(flow.shape(ref.id)) == rank and not (name == "index" and "index" in op.name):
            layout = flow.of(ref)
            cut = [d for d, (a, b) in enumerate(zip(x.shape, layout.shape, strict=True)) if a != b and d != dim]
            layouts[0] = flow.fix(layouts[0], cut, op)
            layout = flow.fix(layout, [dim, *cut] if rank else [], op)
            layouts.append(Layout(x.shape, layout.blocks))
    return flow.join(layouts, x.shape, op)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(flow: Flow, op: Op) -> Layout:
    """As `index`, with values written instead of read."""
    x, used, at = _indexed(flow, op)
    values = flow.of(op.args["values"])
    given = [i for i in op.args["indices"] if isinstance(i, Ref)]
    shapes = [flow.shape(i.id) for i in given if not _is_mask(flow, i)]
    behind = len(x.shape) - len(used) - at  # dimensions after what is picked
    if len(shapes) < len(given):  # how many a mask picks shows in the values, if at all
        shapes.append(values.shape[len(values.shape) - behind - 1 :][:1] if len(values.shape) > behind else (1,))
    picked = _picked(x, used, at, np.broadcast_shapes(*shapes))
    flow.join([picked, values], picked.shape, op)
    return x


@rule("equal")
def equal(flow: Flow, op: Op) -> list[Layout]:
    """One answer for all entries, given to Python."""
    for name in ("self", "other"):
        _fix_whole(flow, op.args[name], op)
    return []


@rule("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def embedding_bag(flow: Flow, op: Op) -> list[Layout]:
    """Rows of a table, added up or averaged: the rows are fixed, their width passes."""
    layout = flow.fix(flow.of(op.args["weight"]), [0], op)
    shapes = [flow.shape(o) for o in op.outputs]
    return [Layout(s, layout.blocks if len(s) == 2 and s[1] == layout.shape[1] else ()) for s in shapes]


@rule("unfold", "unfold_copy")
def unfold(flow: Flow, op: Op) -> Layout:
    """Windows along one dimension, which is fixed, as is the window; the others pass."""
    layout = flow.of(op.args["self"])
    dim = int(op.args["dimension"])
    return Layout(flow.shape(op.outputs[0]), flow.fix(layout, [dim] if layout.shape else [], op).blocks)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fft(flow: Flow, op: Op) -> Layout:
    """The transformed dimensions are fixed; the others pass."""
    return Layout(flow.shape(op.outputs[0]), flow.fix(flow.of(op.args["self"]), op.args["dim"], op).blocks)


@rule("view_as_complex", "view_as_real")
def as_complex(flow: Flow, op: Op) -> Layout:
    """A last dimension of real and imaginary part comes or goes."""
    _keep_origin(flow, op)
    layout = flow.of(op.args["self"])
    if op.name == "view_as_complex":
        layout = flow.fix(layout, [-1], op)
    return Layout(flow.shape(op.outputs[0]), layout.blocks)


@rule("embedding")
def embedding(flow: Flow, op: Op) -> Layout:
    """Rows of a table: the rows are fixed, their width passes."""
    layout = flow.fix(flow.of(op.args["weight"]), [0], op)
    shape = flow.shape(op.outputs[0])
    picked = flow.of(op.args["indices"])
    out = layout.moved(shape, {0: 0, 1: len(shape) - 1})
    return Layout(shape, out.blocks + picked.blocks)


def _opaque(flow: Flow, op: Op) -> Layout:
    for leaf in tree_flatten(op.args)[0]:
        if isinstance(leaf, Ref):
            _fix_whole(flow, leaf, op, "no rule for")
    return Layout(flow.shape(op.outputs[0]))
