"""Drop residual branches on fake tensors, to see whether that does what is predicted."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from prunewise.core.branches import Branch, swapped
from prunewise.core.cost import writes
from prunewise.core.trace import Inputs, Trace, record_partly


def tried(branches: list[Branch], model: nn.Module, example_inputs: Inputs, trace: Trace) -> list[Branch]:
    """Drop the branches on fake tensors, all at once or one by one; those that do not do what is predicted are refused."""
    reasons: dict[str, str] = {}
    left = [b for b in branches if not b.reason]
    while left:
        outer = [b for b in left if not any(b.inside < other.inside for other in left)]
        if _trial(outer, model, example_inputs, trace) is not None:
            for branch in outer:
                problem = _trial([branch], model, example_inputs, trace)
                if problem is not None:
                    reasons[branch.name] = problem
        names = {b.name for b in outer}
        left = [b for b in left if b.name not in names]
    return [replace(b, reason=reasons[b.name]) if b.name in reasons else b for b in branches]


def _trial(branches: list[Branch], model: nn.Module, example_inputs: Inputs, trace: Trace) -> str | None:
    """What goes wrong when these branches (none inside another) are dropped; None if all is as predicted."""
    stubs = {stub.path for b in branches for stub in b.stubs}
    with swapped(model, branches):
        new, error = record_partly(model, example_inputs, asks_at=trace.asks_at)
    if error is not None:
        return f"without it the forward pass fails: {error.__cause__}"
    inside = {i for b in branches for i in b.inside}
    gone = {i for b in branches for i in b.gone_ops}
    old_ops = [op for op in trace.ops if op.index not in gone and op.computes]
    new_ops = [op for op in new.ops if op.module not in stubs and op.computes]
    for a, b in zip(old_ops, new_ops, strict=False):
        if a.func is not b.func or len(a.outputs) != len(b.outputs):
            return f"without it the forward pass takes another path: {b.func} instead of {a.func} ({b.where})"
        if a.index not in inside:
            shapes = [(trace.tensors[i].shape, new.tensors[j].shape) for i, j in zip(a.outputs, b.outputs, strict=True)]
            if any(x != y for x, y in shapes):
                return f"without it {b.func} gives another shape ({b.where})"
    if len(old_ops) != len(new_ops):
        return "without it the forward pass takes another path"
    if [new.tensors[i].shape for i in new.outputs] != [trace.tensors[i].shape for i in trace.outputs]:
        return "without it the outputs differ in shape"
    predicted = sum(writes(op, trace) for op in trace.ops if op.index not in gone)
    for branch in branches:
        like = trace.tensors[branch.entry]
        for index in branch.carried:
            op = trace.ops[index]
            if writes(op, trace):
                first = trace.tensors[op.outputs[0]]
                predicted += math.prod(like.shape) * first.dtype.itemsize
                predicted -= writes(op, trace)
        predicted += branch.fresh * math.prod(like.shape) * like.dtype.itemsize
    if sum(writes(op, new) for op in new.ops) != predicted:
        return "without it other tensors are written than predicted"
    return None
