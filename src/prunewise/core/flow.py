"""Labels flow through the operations of a trace: the state that the rules read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prunewise.core import labels as lab
from prunewise.core.gains import Gain, GainUse
from prunewise.core.labels import Block, LabelArray, LabelStore, Layout
from prunewise.core.norms import Norm
from prunewise.core.trace import Op, Ref, Trace


@dataclass(frozen=True)
class Rectangle:
    """A dimension was split in several: what stays must be a product of `axes` picks. `labels` is joint over them."""

    labels: LabelArray
    axes: tuple[int, ...]  # the axes along which things may be removed
    where: str


@dataclass(frozen=True)
class Demand:
    """Channels summed over: a removed channel must contribute zero here.

    `site` is the (parameter name, dimension) that multiplies them, so that masking it removes the contribution; None
    where two activations meet, or channels are simply added up.
    """

    labels: LabelArray
    site: tuple[str, int] | None
    op: Op
    operands: tuple[int, ...]  # the tensors whose entries would have to be zero, any one of them being enough


@dataclass
class Flow:
    """Everything known about the labels of one model, filled trace by trace."""

    store: LabelStore = field(default_factory=LabelStore)
    state: dict[str, Layout] = field(default_factory=dict)  # parameter and buffer layouts, by name
    rectangles: list[Rectangle] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    layouts: dict[int, Layout] = field(default_factory=dict)
    other_uses: dict[str, str] = field(default_factory=dict)  # parameter -> an operation that does not just read by it
    origins: dict[int, str] = field(default_factory=dict)  # tensor id -> the parameter it is a plain view of
    group_counts: dict[int, LabelArray] = field(default_factory=dict)  # op index -> labels of its groups (conv, norm)
    norms: list[tuple[Norm, LabelArray]] = field(default_factory=list)  # and the labels of the channels they average
    multiples: list[tuple[LabelArray, int]] = field(default_factory=list)  # a kernel takes no other numbers of these
    given_up: dict[tuple[str, int], str] = field(default_factory=dict)  # dimensions of the state that stay, and why
    averages_pass: bool = False  # averages pin nothing: what they may leave out was found out before
    gains: dict[str, Gain] = field(default_factory=dict)  # by the names of both of its parameters
    made_up_for: bool = False  # while True, nothing is fixed: it is a step to a normalised weight
    _fixed_norms: set[str] = field(default_factory=set)  # norms that some call gives channels that must stay
    _norm_ops: dict[int, LabelArray] = field(default_factory=dict)  # op index -> the channels of the norm it is part of
    _starts: list[int] = field(default_factory=list)
    _dims: list[tuple[str, int]] = field(default_factory=list)

    @property
    def sites(self) -> set[tuple[str, int]]:
        """The parameter dimensions that read channels."""
        return {d.site for d in self.demands if d.site is not None}

    def begin(self, trace: Trace) -> None:
        """Start on a trace; labels of parameters and buffers are shared between all traces of a flow."""
        self.trace, self.layouts, self.origins, self._norm_ops = trace, {}, {}, {}
        for name, index in trace.state.items():
            info = trace.tensors[index]
            if info.name not in self.state:
                self.state[info.name] = self._fresh_state(info.name, info.shape, strong=info.kind == "param")
            self.state[name] = self.state[info.name]
            followed = [b for b in self.state[name].blocks if (info.name, b.dims[0]) not in self.given_up]
            self.layouts[index] = Layout(info.shape, tuple(followed))
            if info.kind == "param":
                self.origins[index] = info.name

    def _fresh_state(self, name: str, shape: tuple[int, ...], *, strong: bool) -> Layout:
        blocks = []
        for dim, size in enumerate(shape):
            if size > 1:
                self._starts.append(len(self.store))
                self._dims.append((name, dim))
                blocks.append(Block((dim,), self.store.fresh(size, strong=strong)))
                if (name, dim) in self.given_up:
                    self.store.pin(blocks[-1].labels, self.given_up[name, dim])
        return Layout(shape, tuple(blocks))

    def pins(self, *, contests: bool = True) -> list[tuple[LabelArray, str]]:
        """Labels that must stay, and why; without `contests`, only those that did not give way to others."""
        found = [pin for i, pin in enumerate(self.store.pins) if contests or i not in self.store.contests]
        for demand in self.demands:
            if demand.site is None:
                found.append((demand.labels.reshape(-1), f"summed over by {self.reason(demand.op)}"))
            elif demand.site[0] in self.other_uses:
                why = f"read by {demand.site[0]}, which also goes into {self.other_uses[demand.site[0]]}"
                found.append((demand.labels.reshape(-1), why))
        for gain in set(self.gains.values()):  # only what is read of a standardised weight can be left out of its mean
            blocks = [self.state[gain.direction].block_at(d) for d in gain.dims if gain.centred]
            for block in blocks:
                if block is not None and (gain.direction, block.dims[0]) not in self.sites:
                    found.append((block.labels, f"{gain.direction} is standardised over it"))
        return found

    def given_way_for_nothing(self) -> dict[tuple[str, int], str]:
        """Dimensions of the state that stay although others gave way to them (experts, to which their hidden units did)."""
        store = self.store
        why: dict[int, str] = {}
        for labels, reason in self.pins(contests=False) if store.contests else ():
            for root in np.unique(store.roots(labels)).tolist():
                why.setdefault(root, reason)
        found = {}
        for number, winner in store.contests.items():
            roots = set(store.roots(winner).reshape(-1).tolist())
            loser = store.roots(store.pins[number][0]).tolist()
            if roots <= why.keys() and not why.keys() & set(loser):
                for name, dim in self._dims:
                    block = self.state[name].block_at(dim)
                    assert block is not None
                    own = store.roots(block.labels).tolist()
                    if roots.issuperset(own):
                        found[name, dim] = why[own[0]]
        return {key: reason for key, reason in found.items() if key not in self.given_up}

    def state_dim(self, labels: LabelArray) -> tuple[str, int] | None:
        """The (name, dimension) of the parameter or buffer whose own labels these are; None if there is no such one."""
        if labels.size == 0:
            return None
        slots = np.searchsorted(self._starts, [labels.min(), labels.max()], side="right") - 1
        if slots[0] != slots[1] or slots[0] < 0:
            return None
        name, dim = self._dims[slots[0]]
        block = self.state[name].block_at(dim)
        return (name, dim) if block is not None and labels.max() <= block.labels[-1] else None

    # -- what rules ask -------------------------------------------------------------------------------------------

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Shape of a tensor of the trace."""
        return self.trace.tensors[tensor].shape

    def of(self, ref: Ref) -> Layout:
        """The layout of an argument. Inputs and constants are fixed in every dimension."""
        return self.layouts.get(ref.id) or Layout(self.shape(ref.id))

    def reason(self, op: Op) -> str:
        """How an operation is named to the user."""
        where = f" at {op.where}" if op.where else ""
        inside = f" in {op.module}" if op.module else ""
        return f"{op.func}{inside}{where}"

    def fix(self, layout: Layout, dims: Sequence[int], op: Op, why: str = "") -> Layout:
        """`layout` with nothing removable along `dims` (negative ones count from the end)."""
        rank = len(layout.shape)
        for dim in () if self.made_up_for else dims:
            layout = lab.fix(self.store, layout, dim % max(rank, 1), f"{why or 'mixed by'} {self.reason(op)}")
        return layout

    def mixing(self, ref: Ref) -> str:
        """How a weight that is normalised is named to the user; "" for anything else."""
        return f"{self.origins[ref.id]} is normalised over it by" if ref.id in self.origins else ""

    def enter_norm(self, norm: Norm, op: Op) -> None:
        """From here on, the operations of `norm` may average over its channels: closed ones are left out there."""
        layout = self.of(Ref(norm.input))
        layout, labels = self.alone(layout, norm.channel % len(layout.shape), op)
        self.layouts[norm.input] = layout
        known = next(((other, theirs) for other, theirs in self.norms if other.path == norm.path), None)
        if known is None and norm.path not in self._fixed_norms and labels is not None:
            self.norms.append((norm, labels))
        elif known is not None and labels is not None and known[0].like(norm) and len(labels) == len(known[1]):
            self.store.unite(known[1], labels)  # a module called twice is hooked once
        else:  # what is left out in one call would be left out in all of them
            self._fixed_norms.add(norm.path)
            if known is not None:
                self.store.pin(known[1], f"also normalised by another call: {self.reason(op)}")
            return
        self._norm_ops.update(dict.fromkeys(norm.ops, labels))

    def note_use(self, name: str, op: Op) -> None:
        """A parameter, or the weight made of it, goes into something that does not just read by it."""
        what = self.gains.get(name)
        for each in (name,) if what is None else (what.gain, what.direction):
            self.other_uses.setdefault(each, self.reason(op))

    def normalised(self, use: GainUse, op: Op) -> Layout:
        """A weight that is normalised with a gain: along the norm it is masked in the direction, else in the gain."""
        gain, direction = (self.state[name] for name in (use.what.gain, use.what.direction))
        blocks = []
        for block in direction.blocks:
            if block.dims[0] not in use.what.dims:
                own = gain.blocks[0] if gain.blocks else None
                self.tie(block.labels, None if own is None else own.labels, op)
                block = Block(block.dims, block.labels if own is None else own.labels)
            blocks.append(block)
        self.gains[use.what.gain] = self.gains[use.what.direction] = use.what
        self.origins[use.result] = use.what.direction
        return Layout(direction.shape, tuple(blocks))

    def mix(self, layout: Layout, dims: Sequence[int], op: Op, why: str = "") -> Layout:
        """As `fix`, for an average over `dims`; inside of a norm the channels stay removable, and their labels."""
        channels, roots = self._norm_ops.get(op.index), self.store.roots
        for dim in dims:
            block = layout.block_at(dim % max(len(layout.shape), 1))
            if (
                block is not None
                and len(block.dims) == 1
                and (
                    self.averages_pass or (channels is not None and np.isin(roots(block.labels), roots(channels)).all())
                )
            ):
                continue
            layout = self.fix(layout, [dim], op, why)
        return layout

    def only(self, layout: Layout, dim: int, op: Op) -> LabelArray | None:
        """The labels of one dimension alone (joint ones are untied from the others), None where it is fixed."""
        return self.alone(layout, dim, op)[1]

    def alone(self, layout: Layout, dim: int, op: Op) -> tuple[Layout, LabelArray | None]:
        """`layout` with `dim` labelled alone, and the labels."""
        block = layout.block_at(dim)
        if block is None:
            return layout, None
        layout = self.fix(layout, [d for d in block.dims if d != dim], op)
        block = layout.block_at(dim)
        assert block is not None
        return layout, block.labels

    def join(self, layouts: list[Layout], shape: tuple[int, ...], op: Op) -> Layout:
        """Element-wise combination."""
        return lab.join(self.store, layouts, shape, f"meets a fixed dimension in {self.reason(op)}")

    def tie(self, a: LabelArray | None, b: LabelArray | None, op: Op) -> None:
        """Unite two dimensions; where one is fixed, so becomes the other."""
        if a is not None and b is not None:
            self.store.unite(a, b)
        elif a is not None or b is not None:
            self.store.pin(a if a is not None else b, f"meets a fixed dimension in {self.reason(op)}")  # type: ignore[arg-type]

    def reshape(self, layout: Layout, shape: tuple[int, ...], op: Op) -> Layout:
        """`view`; a dimension that is split leaves a rectangle behind."""
        result = lab.reshape(self.store, layout, shape, f"reshaped by {self.reason(op)}")
        known = {id(b) for b in layout.blocks}
        for block in result.blocks:
            if len(block.dims) > 1 and id(block) not in known:
                self.rectangles.append(Rectangle(block.labels, tuple(range(len(block.dims))), self.reason(op)))
        return result

    def demand(
        self,
        labels: LabelArray | None,
        op: Op,
        operands: tuple[int, ...],
        weight: int | None = None,
        weight_labels: LabelArray | None = None,
    ) -> None:
        """Note that channels with these labels are summed over, weighted by tensor `weight` if there is one."""
        if labels is None:
            return
        site = None
        if weight is not None and weight in self.origins and weight_labels is not None:
            site = self.state_dim(weight_labels)
            gain, name = self.gains.get(self.origins[weight]), self.origins[weight]
            if site is not None and site[0] != name and (gain is None or site[0] != gain.gain):
                site = None  # labels of what the weight is multiplied by
        self.demands.append(Demand(labels, site, op, operands))


Rule = Callable[[Flow, Op], "Layout | list[Layout]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators, by name without namespace, overload and in-place mark."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register
