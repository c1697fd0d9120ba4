"""Which units stay, given how much each is worth and what it costs: the exact end of every method."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from prunewise.channels.dropping import block_worth, droppable
from prunewise.channels.latency import LatencyModel
from prunewise.core.branches import Branch
from prunewise.core.cost import CostModel
from prunewise.core.errors import NonFiniteError, PlanError
from prunewise.core.groups import ChannelGroup

Scores = npt.NDArray[np.float64]
Removal = tuple[float, str, int]  # worth, name of a group, how many of its units; or of a whole branch, and 0


@dataclass(frozen=True)
class Limits:
    """The constraints on a choice: absolute cost limits by kind, least units of each group, and multiples.

    Kinds are those of `Cost`, and "latency_ms" where there is a `latency` model.
    """

    costs: CostModel
    groups: tuple[ChannelGroup, ...]
    absolute: Mapping[str, float]
    min_keep: int = 1
    round_to: int = 1
    latency: LatencyModel | None = None
    branches: tuple[Branch, ...] = ()  # residual blocks that may go as a whole

    def totals(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Every cost by kind, with `widths[name]` units of each group; groups not named are kept whole."""
        found: dict[str, float] = {**self.costs(widths).as_dict()}
        if self.latency is not None:
            found["latency_ms"] = self.latency(widths)
        return found

    def tensor(self, kind: str, kept: torch.Tensor) -> torch.Tensor:
        """One cost as a float64 scalar, differentiable in the widths `kept`, in the order of `costs.groups`."""
        if kind == "latency_ms":
            assert self.latency is not None
            return self.latency.tensor(kept)
        return self.costs.tensor(kind, kept)

    def notes(self, keep: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """What a plan should say of its latency: predicted, before and after, and where it was measured."""
        if self.latency is None:
            return {}
        after = self.latency({name: len(kept) for name, kept in keep.items()})
        return {
            "latency_ms": f"{after:.6g}",
            "latency_ms_before": f"{self.latency.full_ms:.6g}",
            "latency_device": self.latency.device,
        }

    def floor(self, group: ChannelGroup) -> int:
        """The fewest units that `group` may keep."""
        step = self.step(group)
        return min(group.size, -(-max(1, self.min_keep) // step) * step)

    def step(self, group: ChannelGroup) -> int:
        """What the kept units of `group` are a multiple of (or all of them)."""
        return math.lcm(self.round_to, group.multiple)

    @property
    def floors(self) -> dict[str, int]:
        """`floor` of every group; nothing of those in blocks that may go."""
        return {g.name: self.floor(g) for g in self.groups} | self.without([b.name for b in self.branches])

    def without(self, branches: Iterable[str]) -> dict[str, int]:
        """The widths of all groups in these branches: zero."""
        gone = set(branches)
        return {name: 0 for b in self.branches if b.name in gone for name in b.groups}

    def after(self, costs: CostModel, keep: Mapping[str, Sequence[int]]) -> Limits:
        """The limits for the network cut down to `keep`, which costs `costs`: the groups are the old ones, smaller.

        Groups of a single unit are left out.

        Raises:
            PlanError: the smaller network does not have these groups, or none of them is left.
        """
        found = {g.name: g for g in costs.groups}
        groups = []
        for group in self.groups:
            size = len(keep[group.name])
            if size > 1:
                if group.name not in found or found[group.name].size != size:
                    raise PlanError(f"group {group.name!r} changes its shape when shrunk")
                groups.append(found[group.name])
        if not groups:
            raise PlanError("no group has more than one unit left")
        latency = self.latency.bind(costs) if self.latency is not None else None
        names = {b.name for b in self.branches}
        branches = tuple(b for b in costs.grouping.branches if b.name in names)
        if branches:
            branches = droppable(branches, groups, self.min_keep)
        return replace(self, costs=costs, groups=tuple(groups), latency=latency, branches=branches)

    def met(self, widths: Mapping[str, int], slack: Mapping[str, float] | None = None) -> bool:
        """True where every cost is within its limit (or within `slack`, where given)."""
        kept = torch.tensor([float(widths.get(g.name, g.size)) for g in self.costs.groups], dtype=torch.float64)
        limits = slack if slack is not None else self.absolute
        values = {kind: float(self.tensor(kind, kept)) for kind in limits}
        return all(
            # Counts are integers up to rounding; a limit need not be one.
            value <= limit if kind == "latency_ms" else value < math.floor(limit) + 0.5
            for (kind, limit), value in zip(limits.items(), values.values(), strict=True)
        )

    def marginal(self, widths: Mapping[str, int]) -> dict[str, float]:
        """What one more unit of each group costs, as a share of the limits (summed over those that are exceeded)."""
        with torch.inference_mode(False), torch.enable_grad():  # callers may have switched gradients off
            kept = torch.tensor([float(widths.get(g.name, g.size)) for g in self.costs.groups], dtype=torch.float64)
            kept.requires_grad_(True)
            total = torch.zeros((), dtype=torch.float64)
            values = {kind: self.tensor(kind, kept) for kind in self.absolute}
            over = {k: max(0.0, float(v.detach()) / self.absolute[k] - 1) for k, v in values.items()}
            for kind, value in values.items():
                weight = over[kind] if any(over.values()) else 1.0
                total = total + weight * value / self.absolute[kind]
            (gradient,) = torch.autograd.grad(total, kept)
        share = dict(zip((g.name for g in self.costs.groups), gradient.tolist(), strict=True))
        return {g.name: max(share[g.name], 1e-30) for g in self.groups}


def choose_units(
    worth: Mapping[str, Scores],
    limits: Limits,
    slack: Mapping[str, float] | None = None,
    start: Mapping[str, tuple[int, ...]] | None = None,
    masses: Mapping[str, float] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Remove the units of least worth until the limits are met, then put back what still fits.

    Args:
        worth: for each group, what a unit is worth per unit of cost (higher = keep), shape (units,);
            comparable between groups.
        limits: the constraints.
        slack: looser cost limits to stop at instead (used on the way to the final ones).
        start: the units to choose from (default: all); what is not among them is gone already.
        masses: what the blocks that may go are worth as a whole, by name (not divided by cost).

    Returns:
        For each group, the indices of the units that stay, ascending. Ties go to the lower index. If even the
        floors do not meet the limits, the floors.
    """
    order = {g.name: _ascending(g, worth[g.name], None if start is None else start[g.name]) for g in limits.groups}
    full = {name: len(units) for name, units in order.items()}
    removals = [r for g in limits.groups for r in _of_units(g, np.asarray(worth[g.name]), order[g.name], limits)]
    # Stable: among equals, the removals of one group stay in their order.
    removals.sort(key=lambda removal: removal[0])
    branches = [b for b in limits.branches if masses is not None and any(full[name] for name in b.groups)]
    whole = [(block_worth(b, (masses or {})[b.name], limits, full, removals), b.name, 0) for b in branches]
    removals = sorted([*removals, *whole], key=lambda removal: removal[0])
    widths = _remove(removals, full, limits, slack)
    return {name: tuple(sorted(units[len(units) - widths[name] :].tolist())) for name, units in order.items()}


def _ascending(group: ChannelGroup, worth: Scores, start: Sequence[int] | None) -> npt.NDArray[np.int64]:
    """The units to choose from, the first to go first."""
    values = np.asarray(worth, dtype=np.float64)
    if not np.isfinite(values).all():
        raise NonFiniteError(f"the importance of {group.name!r} is not finite: look at the loss and the weights")
    units = np.arange(group.size) if start is None else np.asarray(start, dtype=np.int64)
    return units[np.lexsort((-units, values[units]))]


def _of_units(group: ChannelGroup, worth: Scores, order: npt.NDArray[np.int64], limits: Limits) -> Iterator[Removal]:
    """What can be removed of a group, one after another; none is worth less than the one before it."""
    at, running = 0, -np.inf
    for size in _block_sizes(len(order), min(limits.floor(group), len(order)), limits.step(group)):
        running = max(running, float(worth[order[at : at + size]].mean()))
        yield running, group.name, size
        at += size


def _remove(
    removals: Sequence[Removal], full: Mapping[str, int], limits: Limits, slack: Mapping[str, float] | None
) -> dict[str, int]:
    """The widths after the fewest `removals` that meet the limits, less those that can be taken back."""

    def after(count: int) -> tuple[dict[str, int], set[str]]:
        units = dict(full)
        for _, name, size in removals[:count]:
            if size:
                units[name] -= size
        return units, {name for _, name, size in removals[:count] if not size}

    def widths(units: Mapping[str, int], gone: set[str]) -> dict[str, int]:
        return {**units, **limits.without(gone)}

    fewest = bisect_left(range(len(removals)), True, key=lambda count: limits.met(widths(*after(count)), slack))
    units, gone = after(fewest)
    stuck: set[str] = set()  # a group's removals differ in size: past one that must stay, widths would be uneven
    for _, name, size in reversed(removals[:fewest]):
        if name in stuck or (size and name in limits.without(gone)):
            continue
        trial = ({**units, name: units[name] + size}, gone) if size else (units, gone - {name})
        if limits.met(widths(*trial), slack):
            units, gone = trial
        else:
            stuck.add(name)
    return widths(units, gone)


def _block_sizes(size: int, floor: int, multiple: int) -> Sequence[int]:
    """How many units go at a time, so that what stays is a multiple of `multiple` (or everything)."""
    sizes = []
    left = size
    while left > floor:
        step = left % multiple or multiple
        if left - step < floor:
            break
        sizes.append(step)
        left -= step
    return sizes
