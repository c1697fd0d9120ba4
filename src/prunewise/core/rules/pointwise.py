"""Element-wise operations, reductions, and tensors made from nothing."""

from __future__ import annotations

from torch.utils._pytree import tree_flatten

from prunewise.core.flow import Flow, rule
from prunewise.core.labels import Block, Layout
from prunewise.core.trace import Op, Ref


@rule(
    "clone", "_to_copy", "copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "native_dropout",
    "bernoulli", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "prelu",
    "_prelu_kernel", "hardtanh", "leaky_relu", "threshold", "masked_fill", "fill", "zero", "where",
    "view_as_real_copy", "conj", "_conj", "resolve_conj",
    "fake_quantize_per_tensor_affine", "_local_scalar_dense", "nan_to_num", "dropout", "alpha_dropout", "_assert_async",
    "uniform", "normal", "rrelu_with_noise", "hardswish", "log_sigmoid_forward",
)  # fmt: skip
def pointwise(flow: Flow, op: Op) -> Layout | list[Layout]:
    """Aligned indices are one channel. Also the default for operators that carry torch's `pointwise` tag."""
    read = [leaf for leaf in tree_flatten(op.args)[0] if isinstance(leaf, Ref)]
    if not op.outputs:
        return []
    weight = _scaled_weight(flow, op, read)
    if weight is not None:  # its labels are those of the result, so that the reader is known by them
        flow.origins[op.outputs[0]] = flow.origins[weight.id]
        read.sort(key=lambda ref: ref.id != weight.id)
    layouts = [flow.of(ref) for ref in read]
    if op.name == "clone" and op.args["self"].id in flow.origins:  # as einsum makes of a weight that it permutes
        flow.origins[op.outputs[0]] = flow.origins[op.args["self"].id]
    shape = flow.shape(op.outputs[0])
    joined = flow.join(layouts, shape, op) if layouts else Layout(shape)
    return [joined if flow.shape(o) == shape else Layout(flow.shape(o)) for o in op.outputs]


# Operations that give zero where a weight is zero, whatever else goes into them.
_ZERO_STAYS = ("mul", "div", "neg", "_to_copy", "abs", "tanh", "relu", "sign", "round")


def _scaled_weight(flow: Flow, op: Op, read: list[Ref]) -> Ref | None:
    """The parameter that an operation scales, masks or casts: to mask it is to mask the result."""
    weights = [ref for ref in read if ref.id in flow.origins]
    if len(weights) != 1 or op.name not in _ZERO_STAYS or op.writes:
        return None
    weight = weights[0]
    if len(flow.shape(weight.id)) < 2 or (op.name == "div" and op.args["self"] != weight):
        return None
    return weight


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
    "expand",
)
def constant_along(flow: Flow, op: Op) -> Layout:
    """Tensors that are the same all along a dimension: any index may go with whatever it later meets."""
    shape = flow.shape(op.outputs[0])
    blocks: list[Block] = []
    old: tuple[int, ...] = ()
    if op.name == "expand":
        layout = flow.of(op.args["self"])
        old = layout.shape
        blocks = list(layout.moved(shape, {d: d + len(shape) - len(old) for d in range(len(old))}).blocks)
        if op.args["self"].id in flow.origins:
            flow.origins[op.outputs[0]] = flow.origins[op.args["self"].id]
    aligned = (1,) * (len(shape) - len(old)) + old
    for d, size in enumerate(shape):
        if size > 1 and aligned[d] == 1:
            blocks.append(Block((d,), flow.store.fresh(size)))
    return Layout(shape, tuple(blocks))


@rule(
    "arange",
    "linspace",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "bartlett_window",
    "hann_window",
    "tensor",
)
def unlabelled(flow: Flow, op: Op) -> list[Layout]:
    """Values depend on the position: nothing can be removed."""
    return [Layout(flow.shape(o)) for o in op.outputs]


_NORMALISING = ("mean", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm")


@rule(
    "sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "norm",
    "linalg_vector_norm", "all", "any", "argmax", "argmin", "max", "min", "median", "nanmean", "nansum", "aminmax",
    "count_nonzero", "mode",
)  # fmt: skip
def reduction(flow: Flow, op: Op) -> list[Layout]:
    """Reduced dimensions are fixed (a plain sum asks for zeros instead); the others pass."""
    layout = flow.of(op.args["self"])
    if isinstance(op.args.get("other"), Ref):  # max(x, y) is element-wise
        return [flow.join([layout, flow.of(op.args["other"])], flow.shape(op.outputs[0]), op)]
    rank = len(layout.shape)
    dims = op.args.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % rank for d in dims] if rank else []
    for d in dims:
        block = layout.block_at(d)
        if op.name == "sum" and block is not None and len(block.dims) == 1:
            flow.demand(block.labels, op, (op.args["self"].id,))
            layout = layout.without(block)
        else:
            why = flow.mixing(op.args["self"]) if op.name in _NORMALISING else ""
            averaged = op.name in ("mean", "var", "var_mean")
            layout = flow.mix(layout, [d], op, why) if averaged else flow.fix(layout, [d], op, why)
            block = layout.block_at(d)
            if block is not None:
                layout = layout.without(block)
    shape = flow.shape(op.outputs[0])
    kept = [d for d in range(rank) if d not in dims]
    to = {d: d for d in range(rank)} if len(shape) == rank else {d: i for i, d in enumerate(kept)}
    return [layout.moved(flow.shape(o), to) for o in op.outputs]


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "argsort", "topk", "cummax", "cummin",
      "logcumsumexp", "softmax", "log_softmax", "renorm")  # fmt: skip
def along(flow: Flow, op: Op) -> list[Layout]:
    """Indices along `dim` depend on each other; the others pass."""
    layout = flow.of(op.args["self"])
    if layout.shape:
        layout = flow.fix(layout, [int(op.args.get("dim", -1))], op)
    return [Layout(flow.shape(o), layout.blocks) for o in op.outputs]


@rule("glu")
def glu(flow: Flow, op: Op) -> Layout:
    """The first half times the sigmoid of the second."""
    layout = flow.of(op.args["self"])
    dim = int(op.args["dim"]) % len(layout.shape)
    layout, labels = flow.alone(layout, dim, op)
    shape = flow.shape(op.outputs[0])
    if labels is None:
        return Layout(shape, layout.blocks)
    half = len(labels) // 2
    flow.store.unite(labels[:half], labels[half:])
    blocks = tuple(Block(b.dims, labels[:half]) if dim in b.dims else b for b in layout.blocks)
    return Layout(shape, blocks)


@rule("tril", "triu")
def last_two(flow: Flow, op: Op) -> Layout:
    """What becomes of an entry depends on its place in the last two dimensions."""
    return flow.fix(flow.of(op.args["self"]), [-2, -1], op)
