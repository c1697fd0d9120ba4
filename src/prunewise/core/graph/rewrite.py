"""Rewrite the integers of a graph to the sizes that are left."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunewise.core.errors import VerificationError
from prunewise.core.graph.nodes import bound_arguments, node_line, node_name, put_argument
from prunewise.core.groups import Grouping
from prunewise.core.labels import Layout
from prunewise.core.structure import resolve, run_rules
from prunewise.core.trace import Recorder, Trace
from prunewise.core.untouched import nothing_fused

_aten = torch.ops.aten
_PIECES = {
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split",
    "split_copy", "split_with_sizes_copy",
}  # fmt: skip


class Cut:
    """Which labels stay."""

    def __init__(self, grouping: Grouping, keep: Mapping[str, tuple[int, ...]]) -> None:
        # The graph's labels go on from the model's, in a store of their own.
        old = grouping.structure.flow
        self.flow = replace(
            old, store=copy.deepcopy(old.store), state=dict(old.state), rectangles=[], demands=[], averages_pass=True
        )
        self.grouping = replace(grouping, structure=replace(grouping.structure, flow=self.flow))
        self.alive = grouping.alive(keep)

    def run(self, trace: Trace, given: Mapping[int, Layout] | None = None) -> dict[int, Layout]:
        """Layouts of all tensors of a trace of the same model, or of a part of it, with the layouts `given` of its inputs.

        Raises:
            VerificationError: the trace ties or pins channels that the model's own trace leaves free.
        """
        store, roots = self.flow.store, self.grouping.roots
        pins = len(store.pins)
        layouts = run_rules(self.flow, trace, given=given).layouts
        for rectangle in self.flow.rectangles:
            resolve(self.flow, rectangle)
        self.flow.rectangles.clear()
        now = store.roots(roots)
        if (now != roots)[~self.alive[:-1]].any() or not self.alive[:-1][np.isin(roots, now[now != roots])].all():
            raise VerificationError("the exported graph ties channels that the model does not tie")
        for labels, reason in store.pins[pins:]:
            if not self.alive[self.grouping.classes(labels)].all():
                raise VerificationError(f"in the exported graph these channels must stay: {reason}")
        return layouts

    def kept(self, layout: Layout, dim: int) -> npt.NDArray[np.bool_] | None:
        """Which indices of a dimension stay; None where all do."""
        return self.grouping.kept(layout, dim, self.alive)

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """The shape of what stays."""
        masks = [self.kept(layout, d) for d in range(len(layout.shape))]
        return tuple(n if m is None else int(m.sum()) for n, m in zip(layout.shape, masks, strict=True))


@dataclass(frozen=True)
class Part:
    """Of a graph of one module of the model: its tensors' names in the model, and what is known of its inputs."""

    names: Mapping[str, str]
    inputs: Sequence[Layout]


class _Run:
    """A graph run node by node on fake tensors; `values` are of this run."""

    def __init__(self, graph: fx.Graph, state: dict[str, Tensor], inputs: Sequence[Tensor]) -> None:
        self.graph, self.state, self.feed = graph, state, iter(inputs)
        self.values: dict[fx.Node, Any] = {}

    def of(self, argument: Any) -> Any:
        """An argument with the nodes in it replaced by their values."""
        return fx.node.map_arg(argument, self.values.__getitem__)

    def step(self, node: fx.Node) -> Any:
        """Run one node."""
        if node.op == "placeholder":
            value = next(self.feed)
        elif node.op == "get_attr":
            value = self.state[str(node.target)]
        elif node.op == "output":
            value = self.of(node.args[0])
        elif node.op == "call_function":
            value = node.target(*self.of(node.args), **self.of(node.kwargs))  # type: ignore[operator]
        else:
            raise VerificationError(f"the exported graph has a {node.op} node: {node.target}")
        self.values[node] = value
        return value


def rewrite(
    graph: fx.Graph, model: nn.Module, small: nn.Module, inputs: Sequence[Tensor], cut: Cut,
    constants: Mapping[str, Tensor], part: Part | None = None,
) -> None:  # fmt: skip
    """Rewrite the integers of `graph` in place, from the sizes of `model` to those of `small`.

    Raises:
        VerificationError: an operation fails on the smaller tensors, or does not give the predicted shape.
    """
    trace, fake = Trace(), FakeTensorMode(allow_non_fake_inputs=True)
    stack = [""]
    recorder = Recorder(trace, stack)
    old = _Run(graph, _fakes(fake, model, constants), [fake.from_tensor(t.detach()) for t in inputs])
    for kind, named in (("param", model.named_parameters), ("buffer", model.named_buffers)):
        for name, _ in named(remove_duplicate=False):
            known = part.names[name] if part else name
            trace.state[known] = recorder.register(old.state[name], kind, known)
    ids: dict[fx.Node, list[int]] = {}
    with torch.no_grad(), nothing_fused(), fake, recorder:
        for node in graph.nodes:
            stack[0] = node_line(node)
            value = old.step(node)
            ids[node] = [
                recorder.register(t, "input" if node.op == "placeholder" else "constant") for t in _tensors(value)
            ]
    trace.outputs = ids[next(iter(reversed(graph.nodes)))]
    given: dict[int, Layout] | None = None
    if part:
        places = [ids[node][0] for node in graph.nodes if node.op == "placeholder"]
        given = {i: replace(x, shape=trace.tensors[i].shape) for i, x in zip(places, part.inputs, strict=True)}
        inputs = [
            torch.zeros(cut.shape(given[i]), dtype=t.dtype, device=t.device)
            for i, t in zip(places, inputs, strict=True)
        ]
    layouts = cut.run(trace, given)
    shapes = {n: [t.shape for t in map(trace.tensors.__getitem__, own)] for n, own in ids.items()}
    found = {n: [layouts.get(i) or Layout(s) for i, s in zip(ids[n], shapes[n], strict=True)] for n in ids}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    new = _Run(graph, _fakes(fake, small, constants), [fake.from_tensor(t.detach()) for t in inputs])
    picks: dict[str, tuple[npt.NDArray[np.int64], torch.device]] = {}
    with torch.no_grad(), nothing_fused(), fake:
        for node in list(graph.nodes):
            predicted = [cut.shape(layout) for layout in found[node]]
            try:
                if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                    _Fix(node, old, new, found, predicted, cut, picks).apply()
                value = new.step(node)
            except VerificationError:
                raise
            except Exception as error:
                raise VerificationError(
                    f"cannot be rewritten for the smaller width: {node_line(node)}: {error}"
                ) from error
            got = [tuple(int(s) for s in t.shape) for t in _tensors(value)]
            if got != predicted:
                raise VerificationError(f"cannot be rewritten: {node_line(node)} gives {got}, should be {predicted}")
            before = old.values[node]
            if isinstance(value, int) and not isinstance(value, bool) and value != before and value:
                _correct(node, value, before, new)  # a number computed from a width is what it was
    for name, (index, device) in picks.items():
        small.register_buffer(name, torch.from_numpy(index).to(device), persistent=False)


def _fakes(fake: FakeTensorMode, module: nn.Module, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All named tensors as fake ones; tied ones are one."""
    memo: dict[int, Tensor] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {n: memo.setdefault(id(t), fake.from_tensor(t.detach())) for n, t in (*named, *constants.items())}


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _scaled(graph: fx.Graph, node: fx.Node, have: int, want: int, new: _Run) -> fx.Node:
    """A node that is `want` where `node` is `have`, and in proportion for another batch size."""
    common = math.gcd(have, want)
    for function, factor in ((operator.mul, want // common), (operator.floordiv, have // common)):
        if factor != 1:
            node = graph.call_function(function, (node, factor))
            new.step(node)
    return node


def _correct(node: fx.Node, have: int, want: int, new: _Run) -> None:
    users = list(node.users)
    with node.graph.inserting_after(node):
        holder = node.graph.call_function(operator.pos, (node,))
    with node.graph.inserting_before(holder):
        result = _scaled(node.graph, node, have, want, new)
    for user in users:
        user.replace_input_with(node, result)
    node.graph.erase_node(holder)


@dataclass
class _Fix:
    """Rewrites the integers of one node. Sizes are rewritten by position, whatever the operator; the rest by its name."""

    node: fx.Node
    old: _Run
    new: _Run
    layouts: dict[fx.Node, list[Layout]]
    predicted: list[tuple[int, ...]]
    cut: Cut
    picks: dict[str, tuple[npt.NDArray[np.int64], torch.device]]

    def apply(self) -> None:
        """Rewrite; what is not known here is found out by the comparison of shapes that follows."""
        bound, name = bound_arguments(self.node), node_name(self.node)
        if self.predicted:
            for argument in ("size", "shape", "sizes", "normalized_shape"):
                if isinstance(bound.get(argument), (list, tuple)):
                    self._sizes(argument, list(bound[argument]), bound)
        x = next((bound[n] for n in ("self", "input") if isinstance(bound.get(n), fx.Node)), None)
        if x is None:
            return
        if name in _PIECES:
            self._pieces(x, bound)
        elif name in ("slice", "narrow", "select", "slice_copy", "select_copy"):
            self._range(x, name, bound)
        elif name in ("pad", "constant_pad_nd"):
            self._pad(list(bound["pad"]))
        elif name in ("repeat", "tile"):
            self._repeat(x, "repeats" if "repeats" in bound else "dims", bound)
        elif name == "repeat_interleave" and isinstance(bound.get("repeats"), int):
            shape, now, d = self.predicted[0], self.new.values[x].shape, bound.get("dim")
            put_argument(self.node, "repeats", shape[0] // now.numel() if d is None else shape[d] // now[d])
            if bound.get("output_size") is not None:
                put_argument(self.node, "output_size", shape[0 if d is None else d])
        elif name.startswith("conv") and "groups" in bound:
            self._groups(x, name.startswith("conv_transpose") or bool(bound.get("transposed")), bound)
        elif name in ("group_norm", "native_group_norm"):
            argument = "num_groups" if "num_groups" in bound else "group"
            was, now = self.old.values[x].shape[1], self.new.values[x].shape[1]
            if was != now and bound[argument] > 1:  # a single group stays one, of fewer channels
                put_argument(self.node, argument, now * bound[argument] // was)
        elif self.node.target is _aten.squeeze.default:
            self.node.target = _aten.squeeze.dims
            self.node.args = (x, [d for d, s in enumerate(self.old.values[x].shape) if s == 1])

    def _entry(self, entry: Any, want: int) -> Any:
        """One size: -1 stays, a number becomes the wanted one, an expression in the batch size is scaled."""
        if isinstance(entry, fx.Node):
            have = int(self.new.values[entry])
            if have == want:
                return entry
            with self.node.graph.inserting_before(self.node):
                return _scaled(self.node.graph, entry, have, want, self.new)
        return entry if entry == -1 else want

    def _sizes(self, argument: str, sizes: list[Any], bound: dict[str, Any]) -> None:
        shape = self.predicted[0]
        first = bound["dim"] % (len(shape) - len(sizes) + 1) if argument == "sizes" else len(shape) - len(sizes)
        if "as_strided" in str(self.node.target):
            return
        new = [self._entry(s, shape[first + i]) for i, s in enumerate(sizes)]
        if new != sizes:
            put_argument(self.node, argument, new)

    def _pieces(self, x: fx.Node, bound: dict[str, Any]) -> None:
        dim = int(bound.get("dim", 0))
        sizes = [shape[dim] for shape in self.predicted]
        if self.cut.kept(self.layouts[x][0], dim) is not None:
            self.node.target, self.node.args, self.node.kwargs = (
                _aten.split_with_sizes.default,
                (x, sizes, dim),
                {},
            )

    def _range(self, x: fx.Node, name: str, bound: dict[str, Any]) -> None:
        dim = int(bound["dim"])
        mask = self.cut.kept(self.layouts[x][0], dim)
        if mask is None:
            return
        given = {k: self.old.of(v) for k, v in bound.items() if k != "self"}
        before = np.concatenate([[0], np.cumsum(mask)])
        if name.startswith("select"):
            put_argument(self.node, "index", int(before[given["index"] % len(mask)]))
            return
        places = np.arange(len(mask))
        if name == "narrow":
            places = places[given["start"] :][: given["length"]]
        else:
            places = places[given["start"] : given["end"] : given["step"]]
        if len(places) == len(mask):
            return
        stay = before[places[mask[places]]]
        steps = np.unique(np.diff(stay))
        self.node.target, self.node.kwargs = _aten.slice.Tensor, {}
        if len(stay) == 0:
            self.node.args = (x, dim, 0, 0)
        elif len(steps) <= 1:
            self.node.args = (x, dim, int(stay[0]), int(stay[-1]) + 1, int(steps[0]) if len(steps) else 1)
        else:  # every other channel, say, of which some went
            target = f"_picked_{len(self.new.state)}"  # unlike all names there are
            self.picks[target] = (stay, self.new.values[x].device)
            self.new.state[target] = torch.from_numpy(stay).to(self.new.values[x].device)
            with self.node.graph.inserting_before(self.node):
                picked = self.node.graph.create_node("get_attr", target)
            self.new.step(picked)
            self.node.target, self.node.args = _aten.index_select.default, (x, dim, picked)

    def _pad(self, pad: list[Any]) -> None:
        layout = self.layouts[self.node][0]
        for k in range(len(pad) // 2):
            mask = self.cut.kept(layout, -1 - k)
            if mask is None:
                continue
            before, after = self.old.of((pad[2 * k], pad[2 * k + 1]))
            if before > 0:
                pad[2 * k] = int(mask[:before].sum())
            if after > 0:
                pad[2 * k + 1] = int(mask[-after:].sum())
        put_argument(self.node, "pad", pad)

    def _repeat(self, x: fx.Node, argument: str, bound: dict[str, Any]) -> None:
        times, now = list(bound[argument]), self.new.values[x].shape
        shape = self.predicted[0]
        aligned = (1,) * (len(shape) - len(now)) + tuple(now)
        first = len(shape) - len(times)
        put_argument(
            self.node,
            argument,
            [self._entry(t, shape[first + i] // aligned[first + i]) for i, t in enumerate(times)],
        )

    def _groups(self, x: fx.Node, transposed: bool, bound: dict[str, Any]) -> None:
        data, weight = self.new.values[x].shape, self.new.values[bound["weight"]].shape
        full = self.predicted[0] if transposed else data
        if bound["groups"] != 1:
            # With a group for each sample, an expression in the batch size.
            groups = full[len(data) - len(weight) + 1] // weight[1]
            put_argument(self.node, "groups", self._entry(bound["groups"], groups))
