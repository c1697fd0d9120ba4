"""Channel groups: what can be removed, and why the rest cannot."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import nn

from prunewise.core.choice import matcher
from prunewise.core.gains import Gain
from prunewise.core.labels import LabelArray, Layout
from prunewise.core.rules.contract import KERNEL
from prunewise.core.structure import Structure, analyse
from prunewise.core.trace import Inputs

if TYPE_CHECKING:
    from prunewise.core.branches import Branch


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer: row `u` of `indices` holds what unit `u` of the group owns of it."""

    name: str
    dim: int
    indices: npt.NDArray[np.int64]  # (units, entries of a unit)
    role: str  # "in": multiplied with the channels and summed over; "out": everything else
    gain: Gain | None = None  # set where a norm runs over this dimension, which a gain makes up for


@dataclass(frozen=True)
class ChannelGroup:
    """Units that are alike and can be removed one by one.

    Attributes:
        name: path of the layer that produces the channels; unique in the model.
        size: number of units (channels, attention heads, conv groups, ...).
        prunable: whether units may be removed.
        reason: why not, naming the operation and the line of code; "" where prunable.
        members: the parameter and buffer dimensions that are sliced when a unit goes.
        multiple: kept units must be a multiple of this (or all), because a kernel takes no other widths.
    """

    name: str
    size: int
    prunable: bool
    reason: str
    members: tuple[Member, ...]
    multiple: int = 1
    class_ids: npt.NDArray[np.int64] = field(repr=False, default_factory=lambda: np.zeros(0, np.int64), compare=False)

    def __str__(self) -> str:
        state = "" if self.prunable else f"  pinned: {self.reason}"
        return f"{self.name}: {self.size} units, {len(self.members)} members{state}"


Choice = str | Iterable[str] | Callable[[ChannelGroup], bool] | None


@dataclass
class Grouping:
    """The groups of a model, and which class of labels belongs to which unit."""

    structure: Structure
    groups: list[ChannelGroup]
    roots: LabelArray  # class id -> root label, sorted
    group_of: npt.NDArray[np.int64]  # class id -> index into groups; -1: not a channel
    branches: tuple[Branch, ...] = ()  # residual branches, where they were looked for (`core.blocks`)

    def classes(self, labels: LabelArray) -> npt.NDArray[np.int64]:
        """Class ids of labels; -1 for those that own nothing of any parameter or buffer."""
        roots = self.structure.flow.store.roots(labels)
        at = np.minimum(np.searchsorted(self.roots, roots), max(len(self.roots) - 1, 0))
        if not len(self.roots):
            return np.full(roots.shape, -1, dtype=np.int64)
        return np.where(self.roots[at] == roots, at, -1)

    def alive(self, keep: Mapping[str, Sequence[int]]) -> npt.NDArray[np.bool_]:
        """Which classes stay under `keep`, by class id; the last entry is for labels of no class (-1)."""
        alive = np.ones(len(self.roots) + 1, dtype=bool)
        for group in self.groups:
            if group.name in keep:
                alive[group.class_ids] = False
                alive[group.class_ids[list(keep[group.name])]] = True
        return alive

    def kept(self, layout: Layout, dim: int, alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
        """Which indices of a dimension (negative ones count from the end) stay with these classes; None where all do."""
        dim %= max(len(layout.shape), 1)
        block = layout.block_at(dim)
        if block is None:
            return None
        table = np.moveaxis(block.labels, block.dims.index(dim), 0)
        classes = self.classes(table.reshape(len(table), -1))
        if not (classes == classes[:, :1]).all():  # joint labels that go along another dimension
            return None
        mask: npt.NDArray[np.bool_] = alive[classes[:, 0]]
        return None if mask.all() else mask


def channel_groups(model: nn.Module, example_inputs: Inputs) -> list[ChannelGroup]:
    """The channel groups of a model, found by tracing it; nothing of the model is changed.

    Args:
        model: any module, on any device (the meta device too).
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).

    Returns:
        Groups in the order in which the model uses them, pinned ones (`prunable` False, with `reason`) included.

    Raises:
        TraceError: the forward pass fails on `example_inputs`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> for group in channel_groups(model, torch.zeros(1, 3, 8, 8)):
        ...     print(group.name, group.size, group.reason.partition(" in ")[0] or "prunable")
        0 8 prunable
        0.weight[1] 3 meets a fixed dimension
        3 4 an output of the model
    """
    return find_groups(analyse(model, example_inputs)).groups


def find_groups(structure: Structure) -> Grouping:
    """Classes of labels, and the groups of alike classes."""
    flow = structure.flow
    store = flow.store
    slots = _state_slots(structure)
    if not slots:
        return Grouping(structure, [], np.zeros(0, np.int64), np.zeros(0, np.int64))
    everything = np.concatenate([store.roots(labels) for _, _, labels in slots])
    roots, inverse = np.unique(everything, return_inverse=True)
    n = len(roots)
    grouping = Grouping(structure, [], roots, np.zeros(n, np.int64))
    reasons, reason_of = _pins(structure, grouping, slots)
    # Classes with the same footprint (same dimensions of the same tensors, as often, also in activations) are alike.
    signature = np.zeros(n, dtype=np.uint64)
    rng = np.random.default_rng(0)
    start = 0
    first_slot = np.full(n, len(slots), dtype=np.int64)
    for slot, (_, _, labels) in enumerate(slots):
        ids = inverse[start : start + len(labels)]
        start += len(labels)
        np.add.at(signature, ids, rng.integers(1, 2**63, dtype=np.uint64))
        first_slot[ids[first_slot[ids] == len(slots)]] = slot
    seen: set[int] = set()  # operations pass labels on: the same array is the label of many tensors
    for each in structure.passes:
        for layout in each.layouts.values():
            for block in layout.blocks:
                if id(block.labels) not in seen:
                    seen.add(id(block.labels))
                    ids = grouping.classes(block.labels.reshape(-1))
                    np.add.at(signature, ids[ids >= 0], rng.integers(1, 2**63, dtype=np.uint64))
    signature[reason_of >= 0] ^= rng.integers(1, 2**63, dtype=np.uint64)
    order = np.lexsort((np.arange(n), signature, first_slot))
    cut = np.flatnonzero((np.diff(signature[order]) != 0) | (np.diff(first_slot[order]) != 0)) + 1
    bundles = sorted(np.split(order, cut), key=lambda ids: (first_slot[ids[0]], ids[0]))
    group_of = grouping.group_of
    bundles = [ids for ids in bundles if not _is_kernel(reasons, int(reason_of[ids[0]]))]
    group_of[:] = -1
    for number, ids in enumerate(bundles):
        group_of[ids] = number
    members = _members(slots, inverse, bundles, group_of, n, structure)
    multiples = _multiples(structure, grouping)
    taken: set[str] = set()
    for number, ids in enumerate(bundles):
        pinned = reason_of[ids[0]] >= 0
        name = _name(members[number], taken)
        reason = reasons[int(reason_of[ids[0]])] if pinned else ""
        group = ChannelGroup(name, len(ids), not pinned, reason, members[number], multiples.get(number, 1), ids)
        grouping.groups.append(group)
    return grouping


def _multiples(structure: Structure, grouping: Grouping) -> dict[int, int]:
    """By number of group: what its width must be a multiple of, where there is such a thing."""
    found: dict[int, int] = {}
    for labels, multiple in structure.flow.multiples:
        ids = grouping.classes(labels)
        for number in np.unique(grouping.group_of[ids[ids >= 0]]):
            found[int(number)] = math.lcm(found.get(int(number), 1), multiple)
    return found


def _is_kernel(reasons: list[str], reason: int) -> bool:
    return reason >= 0 and reasons[reason].startswith(KERNEL)


def _state_slots(structure: Structure) -> list[tuple[str, int, LabelArray]]:
    """(name, dim, labels) of every labelled dimension of parameters and buffers, in order of use, producers first."""
    flow = structure.flow
    sites = flow.sites
    when: dict[str, int] = {}
    for each in structure.passes:
        for op in each.trace.ops:
            for index in op.inputs:
                info = each.trace.tensors[index]
                if info.kind in ("param", "buffer"):
                    when.setdefault(info.name, len(when))
    kinds = {t.name: t.kind for t in structure.trace.tensors if t.kind in ("param", "buffer")}
    unique = list(dict.fromkeys(structure.trace.tensors[i].name for i in structure.trace.state.values()))
    slots = []
    for name in unique:
        for block in flow.state[name].blocks:
            dim = block.dims[0]
            late = (name, dim) in sites
            slots.append(((late, kinds[name] != "param", when.get(name, len(when)), dim), name, dim, block.labels))
    slots.sort(key=lambda s: s[0])
    return [(name, dim, labels) for _, name, dim, labels in slots]


def _pins(
    structure: Structure, grouping: Grouping, slots: list[tuple[str, int, LabelArray]]
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Reasons, and for each class the index of the first one that pins it (-1: prunable)."""
    flow = structure.flow
    reason_of = np.full(len(grouping.roots), -1, dtype=np.int64)
    reasons: dict[str, int] = {}
    consumed = np.zeros(len(grouping.roots), dtype=bool)
    for demand in flow.demands:
        ids = grouping.classes(demand.labels.reshape(-1))
        consumed[ids[ids >= 0]] = True
    for labels, reason in flow.pins():
        ids = grouping.classes(labels)
        ids = ids[ids >= 0]
        fresh = ids[reason_of[ids] < 0]
        reason_of[fresh] = reasons.setdefault(reason, len(reasons))
    for ids in _made_anew(structure, grouping, slots):
        fresh = ids[reason_of[ids] < 0]
        reason_of[fresh] = reasons.setdefault(
            "made by a buffer that is not saved with the model, whose code may make it anew, at its full size",
            len(reasons),
        )
    unused = ~consumed & (reason_of < 0)
    reason_of[unused] = reasons.setdefault("nothing in the model reads these channels by a weight", len(reasons))
    return list(reasons), reason_of


def _made_anew(
    structure: Structure, grouping: Grouping, slots: list[tuple[str, int, LabelArray]]
) -> Iterator[npt.NDArray[np.int64]]:
    """Classes that buffers outside the state_dict hold, and no other tensor but those that read them."""
    unsaved = structure.trace.unsaved
    sites = structure.flow.sites
    others = [labels for name, dim, labels in slots if name not in unsaved and (name, dim) not in sites]
    saved = grouping.classes(np.concatenate(others)) if others else np.zeros(0, dtype=np.int64)
    for name, _, labels in slots:
        if name in unsaved:
            yield np.setdiff1d(grouping.classes(labels), saved)


def _members(
    slots: list[tuple[str, int, LabelArray]],
    inverse: npt.NDArray[np.int64],
    bundles: Sequence[npt.NDArray[np.int64]],
    group_of: npt.NDArray[np.int64],
    n_classes: int,
    structure: Structure,
) -> list[tuple[Member, ...]]:
    sites = structure.flow.sites
    unit_of = np.zeros(n_classes, dtype=np.int64)
    for ids in bundles:
        unit_of[ids] = np.arange(len(ids))
    members: list[list[Member]] = [[] for _ in bundles]
    start = 0
    for name, dim, labels in slots:
        ids = inverse[start : start + len(labels)]
        start += len(labels)
        groups = group_of[ids]
        gain = structure.flow.gains.get(name)
        gain = gain if gain is not None and name == gain.direction and dim in gain.dims else None
        for number in np.unique(groups[groups >= 0]):
            at = np.flatnonzero(groups == number)
            units = unit_of[ids[at]]
            at = at[np.argsort(units, kind="stable")]
            role = "in" if (name, dim) in sites else "out"
            members[number].append(Member(name, dim, at.reshape(len(bundles[number]), -1), role, gain))
    return [tuple(m) for m in members]


def _name(members: tuple[Member, ...], taken: set[str]) -> str:
    """The path of the producing layer; the parameter and dimension where that is taken or not the layer's output."""
    first = members[0]
    path, _, leaf = first.name.rpartition(".")
    name = path if path and leaf == "weight" and first.dim == 0 else f"{first.name}[{first.dim}]"
    if name in taken and name == path:
        name = f"{first.name}[{first.dim}]"
    base, k = name, 2
    while name in taken:
        name, k = f"{base}#{k}", k + 1
    taken.add(name)
    return name


def select(groups: Sequence[ChannelGroup], include: Choice = None, exclude: Choice = None) -> list[ChannelGroup]:
    """The prunable groups that `include` names and `exclude` does not.

    Both take a name, a shell pattern (`"layer1.*"`), several of these, or a callable from group to bool. A pattern
    matches a group's name or the name of any layer in it.

    Raises:
        PlanError: a name or pattern fits no group at all.
    """

    def unknown(pattern: str) -> str:
        known = ", ".join(sorted({re.sub(r"(?<=\.)\d+", "*", g.name) for g in groups if g.prunable})[:12])
        return f"no channel group matches {pattern!r}; there are groups like: {known}"

    wanted = matcher(groups, include, True, _names, unknown)
    unwanted = matcher(groups, exclude, False, _names, unknown)
    return [g for g in groups if g.prunable and wanted(g) and not unwanted(g)]


def _names(group: ChannelGroup) -> set[str]:
    made = {m.name for m in group.members if m.role == "out"}
    return {group.name} | made | {name.rpartition(".")[0] for name in made}
