"""One pass of a model, seen as calls of its modules and additions of activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunewise.core.branches import Leaf
from prunewise.core.trace import Inputs, Op, Recorder, Ref, record_partly
from prunewise.core.values import Values


@dataclass
class Call:
    """One run of a module's forward: operations [start, end), tensors among its arguments, its output."""

    path: str
    start: int
    end: int
    arguments: list[tuple[int | str, int]]  # (place, tensor id)
    output: Any


@contextmanager
def _calls(model: nn.Module, recorder: Recorder, found: list[Call]) -> Iterator[None]:
    """While active, every module call is noted."""
    open_: list[Call] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            places = [*enumerate(args), *kwargs.items()]
            tensors = [(k, recorder.known(v)) for k, v in places if isinstance(v, Tensor)]
            at = len(recorder.trace.ops)
            open_.append(Call(path, at, at, [(k, t) for k, t in tensors if t is not None], None))

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = open_.pop()
        call.end = len(recorder.trace.ops)
        call.output = _nest(output, recorder)
        found.append(call)

    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nest(value: Any, recorder: Recorder) -> Any:
    """A module's output with tensors replaced by `Ref`; None where it is not built of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        known = recorder.known(value)
        return Ref(-1 if known is None else known)
    if type(value) in (tuple, list):
        return type(value)(_nest(v, recorder) for v in value)
    if type(value) is dict:
        return {k: _nest(v, recorder) for k, v in value.items()}
    return Leaf("constant", value) if isinstance(value, (bool, int, float, str, type(None))) else Ref(-1)


@dataclass
class View:
    """One pass of the model: its values, its module calls, its additions."""

    values: Values
    calls: list[Call]
    sums: list[tuple[Op, int, int]]  # (addition, value that stays, value of the branch)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs, training: bool, asks_at: str) -> View:
        """Record a pass."""
        calls: list[Call] = []
        trace, error = record_partly(
            model,
            example_inputs,
            training=training,
            asks_at=asks_at,
            watch=lambda recorder: _calls(model, recorder, calls),
        )
        if error is not None:
            raise error
        values = Values(trace)
        return cls(values, calls, list(_sums(values)))

    def whole(self, path: str, inside: frozenset[int]) -> bool:
        """True where a module runs in the branch only (and runs at all)."""
        ran = [range(c.start, c.end) for c in self.calls if c.path == path]
        ops = [i for r in ran for i in r]
        return any(i in inside for i in ops) and all(i in inside or i in self.values.dead for i in ops)


def _sums(values: Values) -> Iterator[tuple[Op, int, int]]:
    """Additions of two activations of one shape, one of which is read by nothing else."""
    for op in values.trace.ops:
        if op.name not in ("add", "sub") or not isinstance(op.args.get("other"), Ref):
            continue
        if not isinstance(op.args.get("self"), Ref):
            continue
        seen = values.arguments[op.index]
        a, b = seen[op.args["self"].id], seen[op.args["other"].id]
        out = values.trace.tensors[op.outputs[0]]
        for skip, y in ((a, b), (b, a)):
            if y == a and op.name == "sub":
                continue
            info = values.info(y)
            if a == b or values.producer[y] < 0 or (values.producer[skip] < 0 and values.is_state(skip)):
                continue
            if info.shape != out.shape or values.info(skip).shape != out.shape or info.dtype != out.dtype:
                continue
            if info.dtype.is_floating_point and values.consumers[y] == [op.index] and y not in values.results:
                yield op, skip, y
