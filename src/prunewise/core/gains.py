"""Normalised weights: w = g · v / ‖v‖, with the norm over the inputs of each output, say (`weight_norm`).

Where some of v is taken out, the norm shrinks, and what is left of w grows. The gain takes that back: with
g · ‖what is left of v‖ / ‖v‖ in the place of g, what is left of w is exactly what it was. So a gate on v goes with that
factor on g, and so does a slice of v.
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
_STEPS = (
    *_NORMS, "mul", "div", "clamp_min", "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze",
    "squeeze", "expand", "clone", "contiguous", "alias", "detach",
)  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """A weight `gain` · `direction` / ‖`direction`‖. Both are names of parameters; the norm runs over `dims`."""

    gain: str
    direction: str
    dims: tuple[int, ...]

    def norm(self, direction: Tensor) -> Tensor:
        """The norm, in at least single precision; averaged dimensions have size 1."""
        wide = torch.promote_types(direction.dtype, torch.float32)
        found: Tensor = torch.linalg.vector_norm(direction, 2, self.dims, keepdim=True, dtype=wide)
        return found

    def factor(self, norm: Tensor, left: Tensor, like: Tensor) -> Tensor:
        """What the gain is to be multiplied by where `norm` has come down to `left`; shape and dtype of the gain `like`."""
        return (left / norm.clamp(min=torch.finfo(norm.dtype).tiny)).to(like.dtype).reshape(like.shape)

    def filled(self, direction: Tensor) -> Tensor:
        """`direction` with ones where all is zero, which has no norm to divide by. The factor is zero there."""
        return torch.where(self.norm(direction) == 0, 1, direction)


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
    if not any(op.name in (*_ONE_STEP, *_NORMS) for op in trace.ops):
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
        if op.name in _NORMS:
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
            if op.name not in _STEPS or len(op.outputs) != 1 or op.writes:
                return None
            ops[op.index] = op
            queue += op.inputs
    return [ops[i] for i in sorted(ops)]


@torch.no_grad()
def _normalised(trace: Trace, sources: set[int], ops: Sequence[Op], end: int) -> GainUse | None:
    """The weight, where the operations make of random numbers what such a weight is."""
    draw = torch.Generator().manual_seed(0)
    values = {i: torch.randn(trace.tensors[i].shape, generator=draw, dtype=torch.float64) for i in sorted(sources)}
    given = dict(values)

    def value(leaf: Any) -> Any:
        return values[leaf.id] if isinstance(leaf, Ref) else leaf

    try:
        for op in ops:
            args = {k: tree_map(value, a) for k, a in op.args.items() if not isinstance(a, torch.dtype)}
            values[op.outputs[0]] = op.func(**args)
    except (RuntimeError, TypeError):
        return None
    for v, g in (sorted(sources), sorted(sources, reverse=True)):
        rank = len(given[v].shape)
        for kept in [(d,) for d in range(rank)] + [()]:
            names = trace.tensors[g].name, trace.tensors[v].name
            what = Gain(*names, tuple(d for d in range(rank) if d not in kept))
            norm = what.norm(given[v])
            if (
                values[end].shape == given[v].shape
                and norm.numel() == given[g].numel()
                and torch.allclose(values[end], given[g].reshape(norm.shape) * given[v] / norm, rtol=1e-6)
            ):
                return GainUse(what, tuple(op.index for op in ops), end)
    return None
