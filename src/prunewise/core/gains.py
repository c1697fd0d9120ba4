"""Normalised weights: w = g · v / ‖v‖, or w = g · (v - mean) / deviation, over the inputs of each output, say.

Where some of v is taken out of the first kind (`weight_norm`), the norm shrinks, and what is left of w grows. The gain
takes that back: with g · ‖what is left of v‖ / ‖v‖ in the place of g, what is left of w is exactly what it was. So a gate
on v goes with that factor on g, and so does a slice of v.

Of the second kind (standardised weights), no gain brings back what was left of w. So closed entries are left out of the
mean and the deviation, as they are of a LayerNorm's (see `prunewise.core.norms`): with m the mean over the open ones and
s² the share of all over the open ones, m + s·(v - m) where open and m where closed has the mean and the deviation of the
open ones, and gives s times the standardised weight without the others. A factor 1/s on the gain takes that back; the small
layer standardises what it has, and needs none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prunewise.core.trace import Op, Ref, Trace

_ONE_STEP = ("_weight_norm_interface", "_weight_norm")
_NORMS = ("norm", "linalg_vector_norm")
_STANDARDISING = (
    "native_batch_norm", "_native_batch_norm_legit", "batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_functional",
    "_batch_norm_with_update", "batch_norm_with_update", "miopen_batch_norm", "native_layer_norm", "layer_norm",
)  # fmt: skip
_STEPS = (
    *_NORMS, *_STANDARDISING, "mul", "div", "clamp_min", "view", "_unsafe_view", "reshape", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "expand", "clone", "contiguous", "alias", "detach",
)  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """A weight that is `direction`, normalised over `dims`, times `gain`. Both are names of parameters.

    Attributes:
        centred: whether the mean is subtracted, and it is divided by the deviation; else it is divided by the norm.
    """

    gain: str
    direction: str
    dims: tuple[int, ...]
    centred: bool = False

    def norm(self, direction: Tensor) -> Tensor:
        """The norm, in at least single precision; averaged dimensions have size 1."""
        found: Tensor = torch.linalg.vector_norm(direction, 2, self.dims, keepdim=True, dtype=_wide(direction))
        return found

    def closed(self, direction: Tensor, mask: Tensor) -> Tensor:
        """The direction to use where `mask` (zeros and ones, of the direction's rank) closes a part of it."""
        if not self.centred:
            return self.filled(direction * mask)
        mean, spread = self._open(direction, mask)
        return (mean + (direction - mean) * (mask * spread)).to(direction.dtype)

    def factor(self, direction: Tensor, mask: Tensor, like: Tensor) -> Tensor:
        """What the gain is to be multiplied by then; shape and dtype of the gain `like`."""
        if self.centred:
            return (1 / self._open(direction, mask)[1]).to(like.dtype).expand(like.shape)
        return self.ratio(self.norm(direction), self.norm(direction * mask), like)

    def ratio(self, norm: Tensor, left: Tensor, like: Tensor) -> Tensor:
        """The same where a norm has come down to `left`."""
        return (left / norm.clamp(min=torch.finfo(norm.dtype).tiny)).to(like.dtype).reshape(like.shape)

    def filled(self, direction: Tensor) -> Tensor:
        """`direction` with ones where all is zero, which has no norm to divide by. The factor is zero there."""
        return torch.where(self.norm(direction) == 0, 1, direction)

    def _open(self, direction: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the open entries, and the root of the share of all entries over the open ones."""
        mask = mask.to(_wide(direction)).expand(direction.shape)
        opened = mask.sum(self.dims, keepdim=True).clamp(min=1)
        mean = (direction * mask).sum(self.dims, keepdim=True) / opened
        whole = math.prod(direction.shape[d] for d in self.dims)
        return mean, (whole / opened[(slice(0, 1),) * direction.dim()]).sqrt()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class GainUse:
    """Where a trace computes a normalised weight: the operations, in order, and the tensor that they end in."""

    what: Gain
    ops: tuple[int, ...]
    result: int


def find_gains(trace: Trace) -> list[GainUse]:
    """Every weight that is normalised with a gain, in one operation or in several; found by what these compute.

    The direction and the gain are used for nothing else.
    """
    if not any(op.name in (*_ONE_STEP, *_NORMS, *_STANDARDISING) for op in trace.ops):
        return []
    readers: dict[int, set[int]] = {}
    makers: dict[int, Op] = {}
    for op in trace.ops:
        for index in op.inputs:
            readers.setdefault(index, set()).add(op.index)
        makers.update((out, op) for out in op.outputs if out not in op.inputs)
    found = []
    for op in trace.ops:
        use = _in_one_step(op, trace) if op.name in _ONE_STEP else None
        if op.name in (*_NORMS, *_STANDARDISING):
            use = _in_steps(op, trace, readers, makers)
        if use is not None:
            found.append(use)
    places = {trace.tensors[i].name: i for i in trace.state.values()}
    inside = {i: use.what for use in found for i in use.ops}

    def is_alone(use: GainUse) -> bool:
        between = {out for i in use.ops for out in trace.ops[i].outputs} - {use.result}
        own = [places[use.what.gain], places[use.what.direction]]
        return all(readers.get(i, set()) <= set(use.ops) and i not in trace.outputs for i in between) and all(
            inside.get(reader) == use.what for i in own for reader in readers[i]
        )

    return [use for use in found if is_alone(use)]


def _in_one_step(op: Op, trace: Trace) -> GainUse | None:
    g, v = (trace.tensors[op.args[name].id] for name in "gv")
    dim = int(op.args["dim"]) % len(v.shape)
    if (g.kind, v.kind) != ("param", "param") or math.prod(g.shape) != v.shape[dim]:
        return None
    what = Gain(g.name, v.name, tuple(d for d in range(len(v.shape)) if d != dim))
    return GainUse(what, (op.index,), op.outputs[0])


def _in_steps(norm: Op, trace: Trace, readers: dict[int, set[int]], makers: dict[int, Op]) -> GainUse | None:
    """What the norm of a parameter ends in, if products, quotients and views make a normalised weight of it."""
    end: int | None = norm.outputs[0]
    while end is not None:
        ops = _cone(end, makers)
        if ops is None:
            return None
        sources = {i for op in ops for i in op.inputs if i not in makers}
        if len(sources) == 2 and all(trace.tensors[i].kind == "param" for i in sources):
            use = _normalised(trace, sources, ops, end)
            if use is not None:
                return use
        following = [i for i in readers.get(end, ()) if trace.ops[i].name in _STEPS]
        end = trace.ops[following[0]].outputs[0] if len(readers.get(end, ())) == len(following) == 1 else None
    return None


def _cone(end: int, makers: dict[int, Op]) -> list[Op] | None:
    """The operations that a tensor is computed by, in order; None where one of them has no place in a normalised weight."""
    ops: dict[int, Op] = {}
    queue = [end]
    while queue:
        op = makers.get(queue.pop())
        if op is not None and op.index not in ops:
            if op.name not in _STEPS or op.writes:
                return None
            ops[op.index] = op
            queue += op.inputs
    return [ops[i] for i in sorted(ops)]


def _normalised(trace: Trace, sources: set[int], ops: Sequence[Op], end: int) -> GainUse | None:
    """The weight, where the operations make of random numbers what such a weight is."""
    # Small numbers show a floor under the norm; large ones make the epsilon beside a deviation negligible.
    for centred, scale in ((False, 1e-4), (True, 1e4)):
        values = _computed(trace, sources, ops, scale)
        for v, g in (sorted(sources), sorted(sources, reverse=True)) if values else ():
            rank = values[v].dim()
            for kept in [(d,) for d in range(rank)] + ([] if centred else [()]):
                dims = tuple(d for d in range(rank) if d not in kept)
                what = Gain(trace.tensors[g].name, trace.tensors[v].name, dims, centred)
                if _is(what, values[end], values[v], values[g]):
                    return GainUse(what, tuple(op.index for op in ops), end)
    return None


@torch.no_grad()
def _computed(trace: Trace, sources: set[int], ops: Sequence[Op], scale: float) -> dict[int, Tensor]:
    """All that the operations make of random numbers; nothing where they do not run."""
    draw = torch.Generator().manual_seed(0)
    values = {
        i: scale * torch.randn(trace.tensors[i].shape, generator=draw, dtype=torch.float64) for i in sorted(sources)
    }

    def value(leaf: Any) -> Any:
        return values[leaf.id] if isinstance(leaf, Ref) else leaf

    try:
        for op in ops:
            args = {k: tree_map(value, a) for k, a in op.args.items() if not isinstance(a, torch.dtype)}
            out = op.func(**args)
            values[op.outputs[0]] = out if isinstance(out, Tensor) else out[0]
    except (RuntimeError, TypeError):
        return {}
    return values


def _is(what: Gain, weight: Tensor, direction: Tensor, gain: Tensor) -> bool:
    """True where `weight` is what its description says; of a standardised one, up to a constant factor."""
    kept = [n for d, n in enumerate(direction.shape) if d not in what.dims]
    if weight.shape != direction.shape or math.prod(kept) != gain.numel():
        return False
    plain = direction - direction.mean(what.dims, keepdim=True) if what.centred else direction
    norm = what.norm(plain)
    expected = gain.reshape(norm.shape) * plain / norm
    factor = (weight * expected).sum() / expected.square().sum() if what.centred else 1.0
    return torch.allclose(weight, factor * expected, rtol=1e-6, atol=1e-6 * float(weight.abs().max()))
