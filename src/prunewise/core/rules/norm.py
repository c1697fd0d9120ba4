"""Normalisation."""

from __future__ import annotations

from prunewise.core.flow import Flow, rule
from prunewise.core.labels import Block, Layout
from prunewise.core.trace import Op, Ref


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "batch_norm_with_update", "_batch_norm_with_update", "miopen_batch_norm", "_batch_norm_no_update",
    "_native_batch_norm_legit_functional", "batch_norm",
)  # fmt: skip
def batch_norm(flow: Flow, op: Op) -> list[Layout]:
    """Each channel on its own; in training it is averaged over all the other dimensions."""
    source = op.args["input" if "input" in op.args else "self"]
    x = flow.of(source)
    rank = len(x.shape)
    x = flow.fix(x, [d for d in range(rank) if d != 1], op, flow.mixing(source))
    vectors = [op.args.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    layouts = [x]
    for vector in vectors:
        if isinstance(vector, Ref):
            layouts.append(flow.of(vector).moved((1, x.shape[1]) + (1,) * (rank - 2), {0: 1}))
    out = flow.join(layouts, x.shape, op)
    block = out.block_at(1)
    statistics = (Block((0,), block.labels),) if block is not None else ()
    return [
        out if flow.shape(o) == x.shape else Layout(flow.shape(o), statistics if flow.shape(o) == (x.shape[1],) else ())
        for o in op.outputs
    ]


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(flow: Flow, op: Op) -> list[Layout]:
    """The normalised (last) dimensions are averaged over; the others pass."""
    x = flow.of(op.args["input"])
    rank, mixed = len(x.shape), len(op.args["normalized_shape"])
    x = flow.mix(x, range(rank - mixed, rank), op, flow.mixing(op.args["input"]))
    layouts = [x]
    for name in ("weight", "bias"):
        if isinstance(op.args.get(name), Ref):
            shape = (1,) * (rank - mixed) + x.shape[rank - mixed :]
            layouts.append(flow.of(op.args[name]).moved(shape, {d: rank - mixed + d for d in range(mixed)}))
    x = flow.join(layouts, x.shape, op)
    statistics = tuple(b for b in x.blocks if max(b.dims) < rank - mixed)
    return [x if flow.shape(o) == x.shape else Layout(flow.shape(o), statistics) for o in op.outputs]


@rule("native_group_norm", "group_norm")
def group_norm(flow: Flow, op: Op) -> list[Layout]:
    """Channels of one group are mixed: whole groups can go."""
    x = flow.of(op.args["input"])
    groups = int(op.args.get("group", op.args.get("num_groups", 1)))
    x = flow.fix(x, [d for d in range(len(x.shape)) if d > 1], op)
    layouts = [x]
    for name in ("weight", "bias"):
        if isinstance(op.args.get(name), Ref):
            layouts.append(flow.of(op.args[name]).moved((1, x.shape[1]) + (1,) * (len(x.shape) - 2), {0: 1}))
    x = flow.join(layouts, x.shape, op)
    x, labels = flow.alone(x, 1, op)
    if labels is not None:
        if groups == 1:
            x = flow.mix(x, [1], op)
        else:
            flow.group_counts[op.index] = flow.store.unite_along(labels.reshape(groups, -1), 1)
    rows = flow.group_counts.get(op.index)
    statistics = () if rows is None else (Block((1,), rows),)
    return [x if flow.shape(o) == x.shape else Layout(flow.shape(o), statistics) for o in op.outputs]


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(flow: Flow, op: Op) -> list[Layout]:
    """V times g over the norm of v: all dimensions but one are mixed."""
    v, g = flow.of(op.args["v"]), flow.of(op.args["g"])
    dim = int(op.args["dim"]) % len(v.shape)
    v = flow.fix(v, [d for d in range(len(v.shape)) if d != dim], op, flow.mixing(op.args["v"]))
    out = flow.join([v, g], v.shape, op)
    statistics = tuple(b for b in out.blocks if b.dims == (dim,))
    return [out, *(Layout(flow.shape(o), statistics) for o in op.outputs[1:])]
