"""Sums of products: matrix products, convolutions, attention."""

from __future__ import annotations

import numpy as np

from prunewise.core.flow import Flow, rule
from prunewise.core.labels import Block, LabelArray, Layout
from prunewise.core.trace import Op, Ref

KERNEL = "the kernel of"  # the places of a convolution's window are no channels: not reported


def _contract(flow: Flow, op: Op, x: Ref, y: Ref, x_letters: str, y_letters: str, out_letters: str) -> Layout:
    """An einsum of two tensors. Letters in both and in the output are batch dimensions, in both only: summed."""
    lx, ly = flow.of(x), flow.of(y)
    for letter in (k for k in x_letters if k in y_letters and k not in out_letters):
        dx, dy = x_letters.index(letter), y_letters.index(letter)
        lx, a = flow.alone(lx, dx, op) if _alone(lx, dx) else (flow.fix(lx, [dx], op), None)
        ly, b = flow.alone(ly, dy, op) if _alone(ly, dy) else (flow.fix(ly, [dy], op), None)
        flow.tie(a, b, op)
        if a is not None and b is not None:
            # The tensor that is a parameter is the one to mask; between two activations either may be zero.
            if y.id in flow.origins:
                flow.demand(a, op, (x.id, y.id), y.id, b)
            else:
                flow.demand(a, op, (x.id, y.id), x.id, a)
        for layout, dim, own in ((lx, dx, "x"), (ly, dy, "y")):
            block = layout.block_at(dim)
            if block is not None:
                layout = layout.without(block)
            if own == "x":
                lx = layout
            else:
                ly = layout
    shape = flow.shape(op.outputs[0])
    sides = []
    for layout, letters in ((lx, x_letters), (ly, y_letters)):
        to = {letters.index(k): out_letters.index(k) for k in letters if k in out_letters}
        spread = [1] * len(out_letters)
        for d, at in to.items():
            spread[at] = layout.shape[d]
        sides.append(layout.moved(tuple(spread), to))
    return flow.join(sides, shape, op)


def _alone(layout: Layout, dim: int) -> bool:
    """True where `dim` is labelled by itself. Where it is joint with others, summing over it ties it to them."""
    block = layout.block_at(dim)
    return block is not None and len(block.dims) == 1


@rule("mm", "bmm", "mv", "dot", "vdot")
def matmul(flow: Flow, op: Op) -> Layout:
    """Matrix products, batched or not."""
    letters = {"mm": ("ik", "kj", "ij"), "bmm": ("bik", "bkj", "bij"), "mv": ("ik", "k", "i")}
    x = op.args["self"]
    y = next(op.args[name] for name in ("mat2", "vec", "tensor", "other") if name in op.args)
    return _contract(flow, op, x, y, *letters.get(op.name, ("k", "k", "")))


@rule("addmm", "baddbmm", "addmv")
def addmm(flow: Flow, op: Op) -> Layout:
    """A matrix product added to a tensor."""
    a = op.args
    if op.name == "addmm":
        product = _contract(flow, op, a["mat1"], a["mat2"], "ik", "kj", "ij")
    elif op.name == "baddbmm":
        product = _contract(flow, op, a["batch1"], a["batch2"], "bik", "bkj", "bij")
    else:
        product = _contract(flow, op, a["mat"], a["vec"], "ik", "k", "i")
    return flow.join([product, flow.of(a["self"])], flow.shape(op.outputs[0]), op)


@rule("_grouped_mm")
def grouped_mm(flow: Flow, op: Op) -> Layout:
    """Rows of x, sorted by expert, each times the matrix of its expert."""
    x, y = op.args["self"], op.args["mat2"]
    if len(flow.shape(x.id)) != 2 or len(flow.shape(y.id)) != 3:
        raise ValueError("only rows times a stack of matrices")
    flow.layouts[x.id] = flow.fix(flow.of(x), [0], op)
    flow.layouts[y.id] = flow.fix(flow.of(y), [0], op)
    out = _contract(flow, op, x, y, "tk", "ekj", "tj")
    # The kernels want every row of each operand to start at a multiple of 16 bytes.
    alike = 16 // flow.trace.tensors[x.id].dtype.itemsize
    for layout, dims in ((flow.of(x), (1,)), (flow.of(y), (1, 2))):
        flow.multiples += [(b.labels.reshape(-1), alike) for d in dims if (b := layout.block_at(d)) is not None]
    return out


@rule("linear")
def linear(flow: Flow, op: Op) -> Layout:
    """X @ weight.T + bias, where torch does not take it apart itself."""
    letters = "abcdefgh"[: len(flow.shape(op.args["input"].id)) - 1]
    out = _contract(flow, op, op.args["input"], op.args["weight"], letters + "k", "jk", letters + "j")
    if op.args.get("bias") is None:
        return out
    return flow.join([out, flow.of(op.args["bias"])], flow.shape(op.outputs[0]), op)


@rule("convolution", "_convolution")
def convolution(flow: Flow, op: Op) -> Layout:
    """Convolutions of any rank, grouped, depthwise, dilated, transposed."""
    a = op.args
    shape = flow.shape(op.outputs[0])
    rank = len(shape)
    x = flow.fix(flow.of(a["input"]), range(2, rank), op)
    w = flow.fix(flow.of(a["weight"]), range(2, rank), op, KERNEL)
    x, channels = flow.alone(x, 1, op)
    groups, transposed = int(a["groups"]), bool(a["transposed"])
    w, first = flow.alone(w, 0, op)
    w, second = flow.alone(w, 1, op)
    into, out = (first, second) if transposed else (second, first)
    if groups > 1:
        out = _grouped(flow, op, channels, into, out, groups, shape[1], transposed)
    elif x.shape[1] > 1:
        flow.tie(channels, into, op)
        if channels is not None and into is not None:
            flow.demand(channels, op, (a["input"].id, a["weight"].id), a["weight"].id, into)
    block = x.block_at(1)
    if block is not None:
        x = x.without(block)
    blocks = list(x.blocks)
    if out is not None and shape[1] > 1:
        blocks.append(Block((1,), out))
    result = Layout(shape, tuple(blocks))
    if isinstance(a.get("bias"), Ref):
        bias = flow.of(a["bias"]).moved((1, shape[1]) + (1,) * (rank - 2), {0: 1})
        result = flow.join([result, bias], shape, op)
    return result


def _grouped(
    flow: Flow, op: Op, channels: LabelArray | None, into: LabelArray | None, out: LabelArray | None,
    groups: int, out_channels: int, transposed: bool,
) -> LabelArray | None:  # fmt: skip
    """Labels of the output channels of a grouped convolution.

    What stays must be as many inputs and outputs in every group. Either whole groups go (depthwise convolutions among
    them), or the same places in every group, whichever leaves the finer choice.
    """
    store = flow.store
    x_channels = flow.shape(op.args["input"].id)[1]
    per_in, per_out = x_channels // groups, out_channels // groups
    if transposed:  # weight: (channels in, channels out of a group)
        if into is not None:
            flow.tie(channels, into, op)
        if groups >= max(per_in, per_out):
            if out is not None:
                store.pin(out, f"a whole group at a time leaves {flow.reason(op)}")
            if channels is None:
                return None
            rows = store.unite_along(channels.reshape(groups, per_in), 1)
            flow.group_counts[op.index] = rows
            return np.repeat(rows, per_out)
        if channels is not None:
            columns = store.unite_along(channels.reshape(groups, per_in), 0)
            flow.demand(columns, op, (op.args["input"].id,), op.args["weight"].id, into)
        return None if out is None else np.tile(out, groups)
    if groups >= max(per_in, per_out):
        if into is not None:
            store.pin(into, f"a whole group at a time leaves {flow.reason(op)}")
        if out is None:
            flow.tie(channels, None, op)
            return None
        rows_out = store.unite_along(out.reshape(groups, per_out), 1)
        rows_in = None if channels is None else store.unite_along(channels.reshape(groups, per_in), 1)
        flow.tie(rows_in, rows_out, op)
        if rows_in is not None:
            flow.group_counts[op.index] = rows_out
        return out
    if out is not None:
        store.unite_along(out.reshape(groups, per_out), 0)
    if channels is None:
        flow.tie(None, into, op)
    else:
        columns = store.unite_along(channels.reshape(groups, per_in), 0)
        flow.tie(columns, into, op)
        if into is not None:
            flow.demand(columns, op, (op.args["input"].id, op.args["weight"].id), op.args["weight"].id, into)
    return out


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def attention(flow: Flow, op: Op) -> list[Layout]:
    """Fused attention: heads pass, the head size is fixed (the default scale depends on it), tokens are fixed."""
    q, k, v = (flow.of(op.args[name]) for name in ("query", "key", "value"))
    rank = len(q.shape)
    q, k, v = (flow.fix(t, [rank - 2, rank - 1], op) for t in (q, k, v))
    shape = flow.shape(op.outputs[0])
    batch = (1, 1)
    repeats = q.shape[1] // k.shape[1] if rank == 4 and k.shape[1] not in (0, 1) else 1
    if repeats > 1:  # enable_gqa: query heads share key and value heads
        k, v = (_repeat_heads(t, repeats) for t in (k, v))
    heads = [Layout(t.shape[:-2] + batch, t.blocks) for t in (q, k, v)]
    mask = op.args.get("attn_mask", op.args.get("attn_bias"))
    if isinstance(mask, Ref):
        layout = flow.of(mask)
        layout = flow.fix(layout, range(max(len(layout.shape) - 2, 0), len(layout.shape)), op)
        heads.append(Layout(layout.shape[:-2] + batch, layout.blocks))
    joined = flow.join(heads, shape[:-2] + batch, op)
    rest = [Layout(flow.shape(o), joined.blocks if len(flow.shape(o)) >= rank - 1 else ()) for o in op.outputs[1:]]
    return [Layout(shape, joined.blocks), *rest]


def _repeat_heads(layout: Layout, repeats: int) -> Layout:
    """Heads (dimension 1) repeated for the query heads that share them."""
    shape = (layout.shape[0], layout.shape[1] * repeats, *layout.shape[2:])
    blocks = []
    for b in layout.blocks:
        labels = np.repeat(b.labels, repeats, axis=b.dims.index(1)) if 1 in b.dims else b.labels
        blocks.append(Block(b.dims, labels))
    return Layout(shape, tuple(blocks))
