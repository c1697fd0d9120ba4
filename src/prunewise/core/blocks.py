"""Residual branches that can be dropped as a whole, and how.

A branch is what computes `y` in `x + y`: the operations whose results flow nowhere else (the exclusive backward
slice of `y`). Where the layers in it are modules of their own, the small model has `Dropped` in their places,
which hands on zeros, so the sum is the identity. In the gated model a branch gate on the last affine parameters
before `y` (a norm's scale and shift, a linear layer's weight and bias, a layer scale) makes `y` exactly zero.

A branch is offered only if a channel group in it is a *cut*: with all its units closed, `y` is a constant that
depends on nothing. Whatever cannot be followed is refused with a reason, and its groups keep a unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from prunewise.core.branches import Branch, Leaf, Stub
from prunewise.core.calls import Call, View
from prunewise.core.cost import multiply_adds
from prunewise.core.errors import TraceError
from prunewise.core.groups import ChannelGroup, Grouping
from prunewise.core.trace import Inputs, Op, Ref, Trace
from prunewise.core.trials import tried
from prunewise.core.values import Values, zeroing


def with_branches(grouping: Grouping, model: nn.Module, example_inputs: Inputs) -> Grouping:
    """`grouping` with the residual branches of `model`, which it was made from."""
    return replace(grouping, branches=tuple(find_branches(grouping, model, example_inputs)))


class _Refused(Exception):
    """A branch cannot be dropped; the message says why."""


def find_branches(grouping: Grouping, model: nn.Module, example_inputs: Inputs) -> list[Branch]:
    """The residual branches of a model, in the order of execution; those that cannot be dropped say why.

    Args:
        grouping: the groups of `model`.
        model: not changed (modules are swapped for a moment, for a trial on fake tensors).
        example_inputs: those that `grouping` was made with.
    """
    trace = grouping.structure.trace
    view = View.of(model, example_inputs, training=False, asks_at=trace.asks_at)
    if [(o.func, o.outputs) for o in view.values.trace.ops] != [(o.func, o.outputs) for o in trace.ops]:
        return []  # the forward pass is not the same twice: nothing can be said of it
    try:
        trained: View | None = View.of(model, example_inputs, training=True, asks_at=trace.asks_at)
    except TraceError:
        trained = None
    finder = _Finder(grouping, model, view, trained)
    found = [b for op, skip, y in view.sums if (b := finder.branch(op, skip, y)) is not None]
    return tried(_named(found, trace), model, example_inputs, trace)


def _named(found: list[Branch], trace: Trace) -> list[Branch]:
    """Unique names: the block's path, or that of the module that does most where a block has several branches."""
    bases = [b.name for b in found]
    taken: set[str] = set()
    result = []
    for branch in found:
        base = branch.name
        if bases.count(base) > 1 and branch.stubs:
            ran = [trace.ops[i].module for i in branch.gone_ops]
            base = max((s.path for s in branch.stubs), key=lambda p: sum(m == p or m.startswith(f"{p}.") for m in ran))
        name, k = base, 2
        while name in taken:
            name, k = f"{base}#{k}", k + 1
        taken.add(name)
        result.append(replace(branch, name=name))
    return result


class _Finder:
    """Looks at one addition after another."""

    def __init__(self, grouping: Grouping, model: nn.Module, view: View, trained: View | None) -> None:
        self.grouping, self.view, self.trained = grouping, view, trained
        self.values = view.values
        self.trace = view.values.trace
        self.called = {c.path for c in view.calls}
        self.paths = [path for path, _ in model.named_modules() if path in self.called]
        self.holders: dict[str, list[str]] = {}  # parameter or buffer -> paths of the modules that hold it
        first: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    name = first.setdefault(id(tensor), f"{path}.{leaf}" if path else leaf)
                    self.holders.setdefault(name, []).append(path)

    def branch(self, op: Op, skip: int, y: int) -> Branch | None:
        """The branch of one addition; None where it is no residual branch with layers in it."""
        values = self.values
        inside = values.slice_of(y)
        entries = {v for i in inside for v in values.reads[i] if values.producer[v] not in inside}
        entries = {v for v in entries if not values.is_state(v)}
        if not any(_weighs(self.trace.ops[i], values) for i in inside):
            return None
        from_ = entries & values.cone(skip)
        if not from_:
            return None
        stubs = [p for p in self.paths if self.view.whole(p, inside)]
        stubs = [p for p in stubs if not any(p.startswith(f"{q}.") for q in stubs)]
        name = stubs[0] if len(stubs) == 1 else _common([p.split(".") for p in stubs]) or op.module
        where = op.where
        try:
            if not any(values.info(v).shape == values.info(y).shape for v in from_):
                raise _Refused("its input and its output differ in shape: it is not the identity that would be left")
            return self._checked(Branch(name, where, inside=inside), stubs, from_, y)
        except _Refused as refusal:
            groups = self._reading_groups(inside)
            return Branch(name, where, f"{refusal} ({where})", groups=groups, inside=inside)

    def _reading_groups(self, inside: frozenset[int]) -> tuple[str, ...]:
        """Prunable groups all of whose tensors are read inside only."""
        return tuple(
            g.name for g in self.grouping.groups if g.prunable and all(self._only_in(m.name, inside) for m in g.members)
        )

    def _only_in(self, name: str, inside: frozenset[int], view: View | None = None) -> bool:
        values = (view or self.view).values
        index = values.trace.state.get(name)
        value = values.first(index) if index is not None else None
        if value is None:
            return False
        return all(r in inside or r in values.dead for r in values.consumers[value])

    def _checked(self, branch: Branch, paths: list[str], from_: set[int], y: int) -> Branch:
        values, inside = self.values, branch.inside
        if not paths:
            raise _Refused("its layers are not modules of their own")
        stubs, gone_ops, carried, fresh = self._carry(paths, from_, inside, y)
        paths = [s.path for s in stubs]
        gone = frozenset(n for n, holders in self.holders.items() if all(self._under(h, paths) for h in holders))
        stays = sorted(inside - gone_ops)
        read = {values.info(v).name for i in stays for v in values.reads[i] if values.is_state(v)}
        groups = [g for g in self.grouping.groups if g.prunable and all(m.name in gone for m in g.members)]
        own = self._reading_groups(inside)
        for group in self.grouping.groups:
            if group.name in own and any(m.name in read for m in group.members):
                raise _Refused(f"{group.name!r} is read by code outside its modules")
        cuts = tuple(g.name for g in groups if self._is_cut(g, inside, y))
        if not cuts:
            raise _Refused("no channel group in it turns it off")
        parameters = self._zero(y, inside)
        if parameters is None:
            raise _Refused("no affine parameters of its own stand before the addition")
        self._check_training(paths, parameters)
        entry = next(v for v in sorted(from_) if values.info(v).shape == values.info(y).shape)
        return replace(
            branch, cuts=cuts, groups=tuple(g.name for g in groups), parameters=tuple(sorted(parameters)), stubs=tuple(stubs),
            gone=gone, gone_ops=gone_ops, carried=carried, entry=values.tensor[entry], fresh=fresh,
        )  # fmt: skip

    @staticmethod
    def _under(holder: str, paths: list[str]) -> bool:
        return any(holder == p or holder.startswith(f"{p}.") for p in paths)

    def _carry(
        self, paths: list[str], from_: set[int], inside: frozenset[int], y: int
    ) -> tuple[list[Stub], frozenset[int], frozenset[int], int]:
        """Follow zeros from stub to stub up to `y`."""
        values = self.values
        like = values.info(y)
        calls = [c for c in self.view.calls if c.path in paths]
        owner = {i: c for c in calls for i in range(c.start, c.end)}
        # Value -> whether it is zero, for all that has the shape of the entry when the branch is dropped.
        zero = {v: False for v in from_ if values.info(v).shape == like.shape and values.info(v).dtype == like.dtype}
        stubs: dict[str, Stub] = {}
        carried: set[int] = set()
        done: set[int] = set()
        for index in sorted(inside):
            call = owner.get(index)
            if call is None:
                op = self.trace.ops[index]
                if _weighs(op, values):
                    raise _Refused(f"{op.func} computes between its modules")
                if any(v in zero for v in values.reads[index]):
                    carried.add(index)
                    outputs = values.makes[index][: len(op.outputs)]
                    zero.update(dict.fromkeys(outputs, False))
                    seen = values.arguments[index]
                    if outputs and any(
                        all(isinstance(r, Ref) and zero.get(seen[r.id], False) for r in alternative)
                        for alternative in zeroing(op)
                    ):
                        zero[outputs[0]] = True
            elif id(call) not in done:
                done.add(id(call))
                known = [(k, values.at(t, call.start)) for k, t in call.arguments]
                held = [(k, v) for k, v in known if v is not None and v in zero]
                if not held:
                    raise _Refused(f"{call.path} does not take a tensor of the block's shape")
                place, value = held[0]
                makes_zeros = not zero[value]
                output = self._output(call, call.output, {v: k for k, v in known}, zero, inside)
                stub = Stub(call.path, place, output, makes_zeros)
                before = stubs.setdefault(call.path, stub)
                if (before.argument, before.output) != (stub.argument, stub.output):
                    raise _Refused(f"{call.path} is called in two ways")
                stubs[call.path] = replace(stub, zeros=stub.zeros or before.zeros)
        if not zero.get(y, False):
            raise _Refused("after its last module it does not stay zero")
        fresh = sum(stubs[c.path].zeros for c in calls if id(c) in done)
        for path in paths:  # called from within another one, but held elsewhere as well
            stubs.setdefault(path, Stub(path, 0, Leaf("carried"), True))
        return list(stubs.values()), frozenset(owner), frozenset(carried), fresh

    def _output(
        self, call: Call, nest: Any, places: dict[Any, Any], zero: dict[int, bool], inside: frozenset[int]
    ) -> Any:
        values = self.values
        if isinstance(nest, dict):
            return {k: self._output(call, v, places, zero, inside) for k, v in nest.items()}
        if isinstance(nest, (tuple, list)):
            return type(nest)(self._output(call, v, places, zero, inside) for v in nest)
        if isinstance(nest, Leaf):
            return nest
        value = values.at(nest.id, call.end) if nest.id >= 0 else None
        if value is None:
            raise _Refused(f"{call.path} returns an object that is not a tensor, tuple, list or dict")
        if values.producer[value] in inside:
            if not values.dead.issuperset(values.consumers[value]):
                zero[value] = True
                return Leaf("carried")
            return Leaf("constant")
        if value in places:
            return Leaf("argument", places[value])
        if values.dead.issuperset(values.consumers[value]) and value not in values.results:
            return Leaf("constant")
        raise _Refused(f"{call.path} returns a tensor that is used elsewhere")

    def _is_cut(self, group: ChannelGroup, inside: frozenset[int], y: int) -> bool:
        """True where `y` depends on nothing from outside when all units of the group are closed."""
        values = self.values
        sites = {}
        for member in group.members:
            if member.role == "in":
                shape = self.trace.tensors[self.trace.state[member.name]].shape
                sites[(member.name, member.dim)] = member.indices.size == shape[member.dim]
        closed = {
            d.op.index
            for d in self.grouping.structure.flow.demands
            if d.site is not None and sites.get(d.site) and self._is_mine(d.op)
        }
        live: set[int] = set()
        for index in sorted(inside):
            op = self.trace.ops[index]
            reads = values.reads[index]
            if index in closed:
                added = op.args.get("self") if op.name in ("addmm", "baddbmm", "addmv") else None
                reads = [values.arguments[index][added.id]] if isinstance(added, Ref) else []
            outside = (v for v in reads if values.producer[v] not in inside and not values.is_state(v))
            if any(v in live for v in reads) or any(True for _ in outside):
                live.update(values.makes[index])
        return y not in live

    def _is_mine(self, op: Op) -> bool:
        ops = self.grouping.structure.trace.ops
        return op.index < len(ops) and ops[op.index] is op

    def _zero(self, value: int, inside: frozenset[int], depth: int = 0) -> set[str] | None:
        """Parameters, used in the branch only, that make a value zero when they are; the nearest ones."""
        values = self.values
        if depth > 100:
            return None
        if values.is_state(value):
            info = values.info(value)
            gain = self.grouping.structure.flow.gains.get(info.name)
            name = info.name if gain is None else gain.gain  # a direction has no norm where it is zero
            return {name} if info.kind == "param" and self._only_in(name, inside) else None
        index = values.producer[value]
        if index not in inside or value not in values.makes[index][:1]:
            return None
        seen = values.arguments[index]
        found: list[tuple[bool, int, set[str]]] = []
        for alternative in zeroing(self.trace.ops[index]):
            parts = [self._zero(seen[r.id], inside, depth + 1) if isinstance(r, Ref) else None for r in alternative]
            if parts and all(p is not None for p in parts):
                own = all(values.is_state(v) for r in alternative for v in self._roots(seen[r.id]))
                found.append((not own, len(found), set().union(*(p or set() for p in parts))))
        return min(found)[2] if found else None

    def _roots(self, value: int) -> Iterator[int]:
        """Where a value comes from: through all operations, to what no operation made."""
        return (v for v in self.values.cone(value) if self.values.producer[v] < 0)

    def _check_training(self, paths: list[str], parameters: set[str]) -> None:
        """In train mode the same modules must be a branch of their own, too."""
        if self.trained is None:
            return
        values = self.trained.values
        ran = {c.path for c in self.trained.calls}
        for _, _, y in self.trained.sums:
            inside = values.slice_of(y)
            whole = all(p not in ran or self.trained.whole(p, inside) for p in paths)
            if whole and all(self._only_in(p, inside, self.trained) for p in parameters):
                return
        raise _Refused("in train mode something else reads it")


def _common(paths: list[list[str]]) -> str:
    """The path that all of these start with."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same)


def _weighs(op: Op, values: Values) -> bool:
    """True for products of tensors: what multiply-adds are counted of."""
    return bool(multiply_adds(op, lambda t: values.trace.tensors[t].shape))
