"""Graphs of single modules, so that the rest of the model stays in the user's classes.

A width that is written into one module's code need not cost the whole model its class. What the module is called with is
seen in a pass of the whole model; what is removable of that is known from the model's structure.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from prunewise.core.errors import VerificationError
from prunewise.core.graph.call import Call
from prunewise.core.graph.export import Exported, Flat, export_graph
from prunewise.core.graph.module import RebuiltModule, skeleton_of
from prunewise.core.graph.rebuild import assembled, refuse_replaced
from prunewise.core.graph.rewrite import Cut, Part
from prunewise.core.groups import Grouping
from prunewise.core.labels import Layout
from prunewise.core.trace import Inputs, Op, Recorder, Ref, Trace, record_partly

_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]  # shape, stride, dtype, device


@dataclass
class _Seen:
    """How a module was called: the call without its tensors, their forms and ids, its operations [start, end), how often."""

    call: Call
    forms: list[_Form]
    ids: list[int | None]
    start: int
    end: int = 0
    times: int = 1


class Parts:
    """Makes graphs of modules of `model`, cut to the units in `keep`."""

    def __init__(
        self, model: nn.Module, grouping: Grouping, keep: Mapping[str, tuple[int, ...]], example_inputs: Inputs
    ) -> None:
        self.model, self.grouping, self.keep, self.inputs = model, grouping, keep, example_inputs
        self.reasons: dict[str, str] = {}  # paths of the modules that are graphs now: what their own code did
        self._cut: Cut | None = None
        self._calls: dict[str, _Seen] | None = None
        self._exported: dict[Hashable, tuple[dict[bool, Exported], dict[bool, Any]]] = {}

    @property
    def _seen(self) -> dict[str, _Seen]:
        if self._calls is None:
            self._calls = _calls(self.model, self.inputs, self.grouping.structure.trace)
        return self._calls

    def graph_of(self, path: str, small: nn.Module) -> RebuiltModule:
        """The module at `path` as a graph over the tensors of `small`, its sliced copy.

        Raises:
            VerificationError: the module cannot be rewritten by itself.
            TraceError: torch.export cannot capture it.
        """
        seen = self._seen.get(path)
        if seen is None or seen.times > 1:
            raise VerificationError(f"{path} is not called exactly once, or not with what can be followed")
        refuse_replaced(self.grouping, f"{path}.")
        self._cut = self._cut or Cut(self.grouping, self.keep)
        module, structure = self.model.get_submodule(path), self.grouping.structure
        trace = structure.trace
        known = {id(t): trace.tensors[trace.state[n]].name for n, t in _named(self.model) if n in trace.state}
        names = {n: known[id(t)] for n, t in _named(module)}  # a module in it may be shared with others
        layouts = structure.passes[0].layouts
        inputs = [
            layouts.get(-1 if i is None else i) or Layout(shape)
            for i, (shape, *_) in zip(seen.ids, seen.forms, strict=True)
        ]
        part = Part(names, inputs)
        graphs, call = self._export(module, names, seen)
        rebuilt = assembled(module, skeleton_of(small, {}), graphs, call, self._cut, part)
        return rebuilt.train(small.training)

    def operations(self, paths: Collection[str]) -> set[int]:
        """Indices of the operations of the model's trace that ran in these modules."""
        if self._calls is None:  # nothing is a graph yet
            return set()
        return {i for p in paths if p in self._seen for i in range(self._seen[p].start, self._seen[p].end)}

    def _export(self, module: nn.Module, names: Mapping[str, str], seen: _Seen) -> tuple[dict[bool, Exported], Call]:
        """Graphs of the module, to be rewritten; of modules that are alike, one is exported."""
        trace = self.grouping.structure.trace
        own = {trace.state[known]: name for name, known in names.items()}
        call = replace(seen.call, tensors=[_zeros(*form) for form in seen.forms], outputs={}, fixed=set())
        key = (
            repr(call.arguments), tuple(call.grows), tuple(seen.forms), _attributes(module),
            _what_runs(trace.ops[seen.start : seen.end], own),
        )  # fmt: skip
        if key not in self._exported:
            graphs = {False: export_graph(module, call, False)}
            if _modes_agree(module, call):
                graphs[True], call.outputs[True] = graphs[False], call.outputs[False]
            else:
                graphs[True] = export_graph(module, call, True)
            if call.fixed:
                raise VerificationError(
                    f"a graph of this {type(module).__name__} would be one for this batch size alone"
                )
            if any(constants for _, constants in graphs.values()):  # tensors in plain attributes, which may differ
                return graphs, call
            self._exported[key] = graphs, call.outputs
        graphs, call.outputs = self._exported[key]
        return copy.deepcopy(graphs), call


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _calls(model: nn.Module, example_inputs: Inputs, known: Trace) -> dict[str, _Seen]:
    """How every module is called in a pass of the model; {} where the pass is not the `known` one.

    A second pass with twice the batch tells which dimensions go with the batch size.
    """
    trace, found = _pass(model, example_inputs)
    if [op.func for op in trace.ops] != [op.func for op in known.ops]:
        return {}
    batch = next((t.shape[0] for t in tree_leaves(example_inputs) if isinstance(t, Tensor) and t.dim()), None)

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    _, larger = _pass(model, tree_map(twice, example_inputs))
    for path, seen in found.items():
        other = larger.get(path)
        if other is not None and len(other.forms) == len(seen.forms):
            seen.call.grows = [_grown(a[0], b[0]) for a, b in zip(seen.forms, other.forms, strict=True)]
    return found


def _grown(before: Sequence[int], after: Sequence[int]) -> int | None:
    """The one dimension that is twice as large."""
    grown = [d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    return grown[0] if len(grown) == 1 and after[grown[0]] == 2 * before[grown[0]] else None


def _pass(model: nn.Module, inputs: Inputs) -> tuple[Trace, dict[str, _Seen]]:
    """A recorded pass, and what the modules were called with."""
    found: dict[str, _Seen] = {}

    @contextmanager
    def watch(recorder: Recorder) -> Iterator[None]:
        def enter(path: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if path in found:
                    found[path].times += 1
                    return
                try:
                    call = Call.of(module, args, kwargs)
                except (TypeError, ValueError):  # a forward without a signature
                    return
                ids = [recorder.known(t) for t in call.tensors]
                forms: list[_Form] = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in call.tensors]
                call.tensors = []  # fake ones must not outlive the pass
                found[path] = _Seen(call, forms, ids, len(recorder.trace.ops))

            return hook

        def leave(path: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if path in found:
                    found[path].end = len(recorder.trace.ops)

            return hook

        handles = []
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
                handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    trace, _ = record_partly(model, inputs, watch=watch)
    return trace, found


def _modes_agree(module: nn.Module, call: Call) -> bool:
    """True where train mode runs the same operations with the same numbers: one graph does for both."""
    said = []
    for training in (False, True):
        with _Switches() as switches:
            trace, error = record_partly(Flat(module, call, training), (call.tensors,), training=training)
        if error is not None or any(t.kind == "constant" for t in trace.tensors):  # what these hold is not compared
            return False
        said.append((_what_runs(trace.ops, {i: n for n, i in trace.state.items()}), switches.seen))
    return said[0] == said[1]


class _Switches(TorchFunctionMode):
    """Notes where, among the calls of torch's functions, code switches gradients on or off: no operation shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str]] = []
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls += 1
        if func is torch._C._set_grad_enabled:
            self.seen.append((self._calls, repr(args)))
        return func(*args, **(kwargs or {}))


def _zeros(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros placed in memory like the tensor that was seen."""
    length = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
    return torch.zeros(length, dtype=dtype, device=device).as_strided(shape, stride)


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """The classes and the plain attributes of a module and of all in it: what its code may decide by."""
    return tuple(
        (path, type(m), tuple(sorted((n, repr(v)) for n, v in vars(m).items() if n != "training" and _is_plain(v))))
        for path, m in module.named_modules()
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _what_runs(ops: Sequence[Op], own: Mapping[int, str]) -> tuple[Any, ...]:
    """Operations with their numbers, and tensors by name or in the order in which they turn up."""
    order: dict[int, int] = {}

    def said(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return repr(leaf)
        return own.get(leaf.id) or order.setdefault(leaf.id, len(order))

    return tuple((op.func, repr(tree_map(said, op.args)), tuple(said(Ref(o)) for o in op.outputs)) for op in ops)
