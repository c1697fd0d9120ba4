"""The fallback where a width is baked into the user's Python: the exported graph with its constants rewritten.

The original model is exported once in eval mode and once in train mode, so whatever its code does with
`self.training` is kept. The operations of each graph are recorded and labelled like the model's own; every
tensor's pruned shape is known from that, and integers in the graph (sizes, bounds of slices, paddings, group
counts) are rewritten to it. Other numbers stay what they were.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunewise.core.cost import CostModel
from prunewise.core.errors import TraceError, VerificationError
from prunewise.core.flow import Flow
from prunewise.core.groups import Grouping
from prunewise.core.labels import Layout
from prunewise.core.structure import _resolve, _run
from prunewise.core.surgery import check_equal, slice_state, state_slices
from prunewise.core.trace import Inputs, Trace, _plain_attention, _Recorder, as_call

_aten = torch.ops.aten
_PIECES = {
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split",
    "split_copy", "split_with_sizes_copy",
}  # fmt: skip


def rebuild(
    model: nn.Module,
    grouping: Grouping | CostModel,
    keep: Mapping[str, tuple[int, ...]],
    example_inputs: Inputs,
) -> fx.GraphModule:
    """A smaller copy of `model` as a graph module: same parameter names, inputs and outputs; trainable.

    Train and eval mode hold for the whole module: one mode for one part of it cannot be set any more.
    Arguments that are not tensors are fixed to what they are in `example_inputs`.

    Args:
        model: the original; not changed.
        grouping: its groups (or its cost model).
        keep: units that stay, by group name; groups not named stay whole.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).

    Raises:
        TraceError: torch.export cannot capture the model.
        VerificationError: an operation cannot be rewritten (it is named), or the result differs from the
        masked model.
    """
    grouping = grouping.grouping if isinstance(grouping, CostModel) else grouping
    call = _Call.of(model, example_inputs)
    old = grouping.structure.flow
    flow = dataclasses.replace(old, store=copy.deepcopy(old.store), state=dict(old.state), rectangles=[], demands=[])
    cut = _Cut(Grouping(grouping.structure, grouping.groups, grouping.roots, grouping.group_of), flow, keep)
    skeleton = copy.deepcopy(_skeleton(model, {}))
    slice_state(skeleton, state_slices(grouping, keep))
    graphs = {False: _exported(model, call, False)}
    try:
        graphs[True] = _exported(model, call, True)
    except TraceError as error:
        warnings.warn(f"{error} Its eval graph is used, with dropout and batch norm in train mode.", stacklevel=2)
        graphs[True] = (_with_flags(graphs[False][0]), graphs[False][1])
        call.outputs[True] = call.outputs[False]
        call.fixed |= {True} if False in call.fixed else set()
    for training, (graph, constants) in graphs.items():
        for name, tensor in constants.items():
            skeleton.register_buffer(name, tensor, persistent=False)
        _rewrite(
            graph,
            model,
            skeleton,
            call.tensors if training in call.fixed else call.doubled(),
            cut,
            constants,
            training,
        )
    small = RebuiltModule(skeleton, {t: g for t, (g, _) in graphs.items()}, call, type(model).__name__)
    call.tensors = [t.detach().to("meta") for t in call.tensors]
    small.train(model.training)
    check_equal(model, small, grouping, keep, example_inputs)
    return small


# -- calling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """Stands for tensor number `index` in a nest of containers."""

    index: int


@dataclass(frozen=True)
class _Branch:
    """A container: `kind` is its class, `how` the way to make one from `children`."""

    kind: type
    how: str
    children: dict[Any, Any]


def _open(value: Any) -> _Branch | None:
    """The contents of a container; None for a leaf."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _Branch(type(value), "fields", dict(enumerate(value)))
    if isinstance(value, (tuple, list)):
        return _Branch(type(value), "items", dict(enumerate(value)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return _Branch(type(value), "init", {n: getattr(value, n) for n in names})
    if isinstance(value, Mapping):
        return _Branch(type(value), "mapping", dict(value))
    if type(value).__module__ != "builtins" and not isinstance(value, (nn.Module, Tensor)) and vars_of(value):
        return _Branch(type(value), "object", vars_of(value))
    return None


def vars_of(value: Any) -> dict[str, Any]:
    """The attributes of a plain object; empty for a class, a function, an object with slots."""
    return {} if isinstance(value, type) or callable(value) else dict(getattr(value, "__dict__", {}))


def _template(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with its tensors moved to `tensors` and slots left in their places."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    branch = _open(value)
    if branch is None:
        return int(value) if isinstance(value, torch.SymInt) else value
    return _Branch(branch.kind, branch.how, {k: _template(v, tensors) for k, v in branch.children.items()})


def _fill(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The reverse of `_template`."""
    if isinstance(template, _Slot):
        return tensors[template.index]
    if not isinstance(template, _Branch):
        return template
    children = {k: _fill(v, tensors) for k, v in template.children.items()}
    match template.how:
        case "fields":
            return template.kind(*children.values())
        case "items":
            return template.kind(children.values())
        case "mapping":
            return template.kind(children)
        case "init":
            return template.kind(**children)
    made: Any = object.__new__(template.kind)
    made.__dict__.update(children)
    return made


def _match(template: Any, value: Any, name: str, found: dict[int, Tensor]) -> None:
    """Collect the tensors of `value`, which must be built like `template`."""
    if isinstance(template, _Slot):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor, as it was when the graph was exported; got {type(value).__name__}"
            )
        found[template.index] = value
        return
    branch = _open(value)
    if isinstance(template, _Branch):
        if branch is None or branch.children.keys() != template.children.keys():
            raise TypeError(f"{name} must be built as it was when the graph was exported: {template.kind.__name__}")
        for key, child in template.children.items():
            _match(child, branch.children[key], f"{name}[{key!r}]", found)
    elif isinstance(value, Tensor) or (template is not value and template != value):
        raise TypeError(f"{name} is fixed to {template!r}, as it was when the graph was exported")


@dataclass
class _Call:
    """How the model is called: its signature, the example's arguments without tensors, the output without tensors."""

    signature: inspect.Signature
    arguments: dict[str, Any]
    tensors: list[Tensor]
    outputs: dict[bool, Any]  # by training
    fixed: set[bool]  # the modes in which the batch size is fixed

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs) -> _Call:
        """Read off the example."""
        args, kwargs = as_call(example_inputs)
        signature = inspect.signature(model.forward)
        tensors: list[Tensor] = []
        bound = signature.bind(*args, **kwargs).arguments
        return cls(signature, {k: _template(v, tensors) for k, v in bound.items()}, tensors, {}, set())

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> list[Tensor]:
        """The tensors of a call, in the order of the example's.

        Raises:
            TypeError: an argument that is not a tensor is not what it was in the example.
            ValueError: a tensor has another shape than in the example (but for the batch size).
        """
        bound = self.signature.bind(*args, **kwargs).arguments
        found: dict[int, Tensor] = {}
        for name, parameter in self.signature.parameters.items():
            if name in self.arguments:
                _match(self.arguments[name], bound.get(name, parameter.default), name, found)
            elif name in bound:
                _match(parameter.default, bound[name], name, found)
        batch = next((t.shape[0] for t in self.tensors if t.dim()), 0)
        sizes = [batch] if training in self.fixed else []
        for i, old in enumerate(self.tensors):
            first = 1 if old.dim() and old.shape[0] == batch else 0
            sizes += found[i].shape[:first]
            if found[i].shape[first:] != old.shape[first:] or (first and sizes[-1] != sizes[0]):
                raise ValueError(
                    f"tensor {i} of the input has shape {tuple(found[i].shape)}; the exported graph was made for "
                    f"{tuple(old.shape)}" + ("" if training in self.fixed else ", with any batch size in common")
                )
        return [found[i] for i in range(len(found))]

    def doubled(self) -> list[Tensor]:
        """The example's tensors; twice, where the batch size is 1: export takes a size of 1 for a constant."""
        if next((t.shape[0] for t in self.tensors if t.dim()), 0) != 1:
            return self.tensors
        return [torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t for t in self.tensors]

    def run(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Call the original with other tensors."""
        bound = self.signature.bind_partial()
        bound.arguments.update({k: _fill(t, tensors) for k, t in self.arguments.items()})
        return model(*bound.args, **bound.kwargs)


class _Flat(nn.Module):
    """`model` with a list of tensors in and a list of tensors out: what is exported."""

    def __init__(self, model: nn.Module, call: _Call, training: bool) -> None:
        super().__init__()
        self.model, self.call, self.mode = model, call, training

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model; the containers of its output are noted."""
        out: list[Tensor] = []
        self.call.outputs[self.mode] = _template(self.call.run(self.model, tensors), out)
        return out


class RebuiltModule(fx.GraphModule):
    """What `rebuild` returns: one graph for train mode, one for eval mode, over the same parameters."""

    def __init__(self, state: nn.Module, graphs: dict[bool, fx.Graph], call: _Call, name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(self, kind).update(getattr(state, kind))
        self._non_persistent_buffers_set.update(state._non_persistent_buffers_set)
        self._call = call
        self._install(graphs)

    def _install(self, graphs: dict[bool, fx.Graph]) -> None:
        self._graphs = graphs
        self._compiled: dict[bool, Any] = {}
        for mode in (not self.training, self.training):
            self.graph = graphs[mode]  # compiles

    def recompile(self) -> Any:
        """Compile the current graph; `forward` takes and gives what the original's does."""
        code = super().recompile()
        cls: Any = type(self)
        for mode, graph in self.__dict__.get("_graphs", {}).items():
            if graph is self._graph:
                self._compiled[mode] = cls.forward
        cls.forward = RebuiltModule._forward
        return code

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self._compiled[self.training](self, *self._call.flat(args, kwargs, self.training))
        return _fill(self._call.outputs[self.training], out)

    def train(self, mode: bool = True) -> RebuiltModule:
        """Switch to the graph of this mode."""
        super().train(mode)
        if self._graph is not self._graphs[mode]:
            self.graph = self._graphs[mode]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RebuiltModule:
        new = RebuiltModule.__new__(RebuiltModule)
        memo[id(self)] = new
        own = ("_graphs", "_compiled", "_graph", "_call")
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in own})
        new._call = self._call
        new._install({mode: copy.deepcopy(graph) for mode, graph in self._graphs.items()})
        return new

    def __reduce__(self) -> Any:
        raise TypeError("a rebuilt model cannot be pickled: save its plan and state_dict (prunewise.save_pruned)")


def _skeleton(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """Plain modules that hold the same tensors under the same names."""
    if id(module) not in seen:
        seen[id(module)] = out = nn.Module()
        out._parameters.update(module._parameters)
        out._buffers.update(module._buffers)
        out._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        out._modules.update({k: m if m is None else _skeleton(m, seen) for k, m in module._modules.items()})
    return seen[id(module)]


# -- export -------------------------------------------------------------------------------------------------------


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model.train(training)`, so that what a user's own `train` keeps frozen stays so; put back afterwards."""
    before = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for m, was in before:
            m.training = was


def _exported(model: nn.Module, call: _Call, training: bool) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of one mode, tensors by the model's own names; and tensors it holds that the model does not name."""
    batch = next((t.shape[0] for t in call.tensors if t.dim()), None)
    free = [{0: torch.export.Dim.AUTO} if t.dim() and t.shape[0] == batch else None for t in call.tensors]
    name, mode = type(model).__name__, "train" if training else "eval"
    module: Any = None
    with _in_mode(model, training), _plain_attention(), torch.enable_grad():
        flat = _Flat(model, call, training).train(training)
        model.train(training)
        for given, shapes in ((call.doubled(), (free,)), (call.tensors, None)):
            try:
                module = torch.export.export(flat, (given,), dynamic_shapes=shapes, strict=False).module()
            except Exception as error:
                text = str(error).strip().partition("\n")[0]
                failure = TraceError(
                    f"torch.export could not capture {name} in {mode} mode: {type(error).__name__}: {text}."
                )
                failure.__cause__ = error
                continue
            places = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
            if not any(
                f and isinstance(p, Tensor) and str(p.shape[0]).isdigit() for p, f in zip(places, free, strict=True)
            ):
                break
            call.fixed.add(training)
    if module is None:
        raise failure
    if training in call.fixed:
        warnings.warn(
            f"the rebuilt {name} takes batches of {batch} only in {mode} mode: its code fixes the size",
            stacklevel=3,
        )
    graph: fx.Graph = module.graph
    _inline(graph, module)
    graph.set_codegen(fx.graph.CodeGen())
    known = {
        n
        for n, _ in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
    constants: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" or (node.op == "call_function" and not node.users and _is_assertion(node)):
            graph.erase_node(node)
        elif node.op == "get_attr":
            target = str(node.target).removeprefix("model.")
            if target not in known:
                value = operator.attrgetter(str(node.target))(module)
                target = f"_constant_{mode}_{len(constants)}"
                constants[target] = value.detach().clone()
            node.target = target
    return graph, constants


def _is_assertion(node: fx.Node) -> bool:
    return _name(node).startswith(("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range"))


def _inline(graph: fx.Graph, module: nn.Module) -> None:
    """Regions without gradient, or with autocast off, become part of the graph."""
    for node in list(graph.nodes):
        kind = str(node.target)
        if kind not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        at = 1 if kind.endswith("enabled") else 4
        if kind.endswith("autocast") and node.args[2]:
            raise VerificationError(f"autocast inside the model is not followed: {_where(node)}")
        inner = operator.attrgetter(node.args[at].target)(module)
        values = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), node.args[at + 1 :], strict=True))
        with graph.inserting_before(node):
            if at == 1:
                ambient = graph.call_function(torch.is_grad_enabled)
                graph.call_function(torch._C._set_grad_enabled, (node.args[0],))
            out: Any = None
            for each in inner.graph.nodes:
                if each.op == "output":
                    out = fx.node.map_arg(each.args[0], values.__getitem__)
                elif each.op != "placeholder":
                    values[each] = graph.node_copy(each, values.__getitem__)
            if at == 1:
                graph.call_function(torch._C._set_grad_enabled, (ambient,))
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(out[user.args[1]])
                graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(out)
        holder = node.args[at]
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def _with_flags(graph: fx.Graph) -> fx.Graph:
    """A copy of an eval graph with every flag for training set."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        if _name(node) == "batch_norm" and _bound(node)["momentum"] == 0.0:  # momentum=None: torch says 0 in eval mode
            _put(node, "momentum", 0.1)
        for flag in ("train", "training"):
            if flag in _bound(node):
                _put(node, flag, True)
    return graph


# -- rewriting ----------------------------------------------------------------------------------------------------


class _Cut:
    """Which labels stay."""

    def __init__(self, grouping: Grouping, flow: Flow, keep: Mapping[str, tuple[int, ...]]) -> None:
        self.grouping, self.flow = grouping, flow
        self.alive = np.ones(len(grouping.roots) + 1, dtype=bool)  # the last one is for labels of no class (-1)
        for group in grouping.groups:
            if group.name in keep:
                gone = np.setdiff1d(np.arange(group.size), np.asarray(keep[group.name], dtype=np.int64))
                self.alive[group.class_ids[gone]] = False

    def run(self, trace: Trace) -> dict[int, Layout]:
        """Layouts of all tensors of a trace of the same model.

        Raises:
            VerificationError: the trace ties or pins channels that the model's own trace leaves free.
        """
        store, roots = self.flow.store, self.grouping.roots
        pins = len(store.pins)
        layouts = _run(self.flow, trace).layouts
        for rectangle in self.flow.rectangles:
            _resolve(self.flow, rectangle)
        self.flow.rectangles.clear()
        now = store.roots(roots)
        if (now != roots)[~self.alive[:-1]].any() or not self.alive[:-1][np.isin(roots, now[now != roots])].all():
            raise VerificationError("the exported graph ties channels that the model does not tie")
        for labels, reason in store.pins[pins:]:
            if not self.alive[self._classes(labels)].all():
                raise VerificationError(f"in the exported graph these channels must stay: {reason}")
        return layouts

    def _classes(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        roots = self.grouping.roots
        found = self.flow.store.roots(labels)
        at = np.minimum(np.searchsorted(roots, found), max(len(roots) - 1, 0))
        return np.where(roots[at] == found, at, -1) if len(roots) else np.full(found.shape, -1)

    def kept(self, layout: Layout, dim: int) -> npt.NDArray[np.bool_] | None:
        """Which indices of a dimension stay; None where all do."""
        block = layout.block_at(dim % max(len(layout.shape), 1))
        if block is None:
            return None
        table = np.moveaxis(block.labels, block.dims.index(dim % len(layout.shape)), 0)
        classes = self._classes(table.reshape(len(table), -1))
        if not (classes == classes[:, :1]).all():  # joint labels that go along another dimension
            return None
        mask = self.alive[classes[:, 0]]
        return None if mask.all() else mask

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """The shape of what stays."""
        masks = [self.kept(layout, d) for d in range(len(layout.shape))]
        return tuple(n if m is None else int(m.sum()) for n, m in zip(layout.shape, masks, strict=True))


def _name(node: fx.Node) -> str:
    """The operator's name without namespace, overload and in-place mark; other functions by their own name."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def _where(node: fx.Node) -> str:
    """How an operation is named to the user: operator, file and line."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{node.target}" + (f" at {lines[-1][0]}:{lines[-1][1]}" if lines else "")


def _bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(dict(zip((a.name for a in schema.arguments), node.args, strict=False)))
    return {**bound, **node.kwargs}


def _put(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of an ATen call."""
    at = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


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


def _rewrite(
    graph: fx.Graph, model: nn.Module, small: nn.Module, inputs: Sequence[Tensor], cut: _Cut,
    constants: Mapping[str, Tensor], training: bool,
) -> None:  # fmt: skip
    """Rewrite the integers of `graph` in place, from the sizes of `model` to those of `small`.

    Raises:
        VerificationError: an operation fails on the smaller tensors, or does not give the predicted shape.
    """
    trace, fake = Trace(), FakeTensorMode(allow_non_fake_inputs=True)
    stack = [""]
    recorder = _Recorder(trace, stack)
    old = _Run(graph, _fakes(fake, model, constants), [fake.from_tensor(t.detach()) for t in inputs])
    for kind, named in (("param", model.named_parameters), ("buffer", model.named_buffers)):
        for name, _ in named(remove_duplicate=False):
            trace.state[name] = recorder.register(old.state[name], kind, name)
    ids: dict[fx.Node, list[int]] = {}
    with torch.no_grad(), fake, recorder:
        for node in graph.nodes:
            stack[0] = _where(node)
            value = old.step(node)
            ids[node] = [
                recorder.register(t, "input" if node.op == "placeholder" else "constant") for t in _tensors(value)
            ]
    trace.outputs = ids[next(reversed(graph.nodes))]
    layouts = cut.run(trace)
    shapes = {n: [t.shape for t in map(trace.tensors.__getitem__, own)] for n, own in ids.items()}
    found = {n: [layouts.get(i) or Layout(s) for i, s in zip(ids[n], shapes[n], strict=True)] for n in ids}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    new = _Run(graph, _fakes(fake, small, constants), [fake.from_tensor(t.detach()) for t in inputs])
    picks: dict[str, tuple[npt.NDArray[np.int64], torch.device]] = {}
    with torch.no_grad(), fake:
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
                    f"cannot be rewritten for the smaller width: {_where(node)}: {error}"
                ) from error
            got = [tuple(int(s) for s in t.shape) for t in _tensors(value)]
            if got != predicted:
                raise VerificationError(f"cannot be rewritten: {_where(node)} gives {got}, should be {predicted}")
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
    cut: _Cut
    picks: dict[str, tuple[npt.NDArray[np.int64], torch.device]]

    def apply(self) -> None:
        """Rewrite; what is not known here is found out by the comparison of shapes that follows."""
        bound, name = _bound(self.node), _name(self.node)
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
            _put(self.node, "repeats", shape[0] // now.numel() if d is None else shape[d] // now[d])
        elif name.startswith("conv") and "groups" in bound:
            self._groups(x, name.startswith("conv_transpose") or bool(bound.get("transposed")), bound)
        elif name in ("group_norm", "native_group_norm"):
            argument = "num_groups" if "num_groups" in bound else "group"
            was, now = self.old.values[x].shape[1], self.new.values[x].shape[1]
            if was != now:
                _put(self.node, argument, now * bound[argument] // was)
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
            _put(self.node, argument, new)

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
            _put(self.node, "index", int(before[given["index"] % len(mask)]))
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
        _put(self.node, "pad", pad)

    def _repeat(self, x: fx.Node, argument: str, bound: dict[str, Any]) -> None:
        times, now = list(bound[argument]), self.new.values[x].shape
        shape = self.predicted[0]
        aligned = (1,) * (len(shape) - len(now)) + tuple(now)
        first = len(shape) - len(times)
        _put(
            self.node,
            argument,
            [self._entry(t, shape[first + i] // aligned[first + i]) for i, t in enumerate(times)],
        )

    def _groups(self, x: fx.Node, transposed: bool, bound: dict[str, Any]) -> None:
        data, weight = self.new.values[x].shape, self.new.values[bound["weight"]].shape
        full = self.predicted[0] if transposed else data
        if bound["groups"] != 1:
            _put(self.node, "groups", full[len(data) - len(weight) + 1] // weight[1])
