"""Which units stay, given how much each is worth and what it costs: the exact end of every method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from prunewise.channels.dropping import block_worth
from prunewise.channels.latency import LatencyModel
from prunewise.core.branches import Branch
from prunewise.core.cost import CostModel
from prunewise.core.errors import NonFiniteError
from prunewise.core.groups import ChannelGroup

Scores = npt.NDArray[np.float64]


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
        least = -(-max(1, self.min_keep) // self.round_to) * self.round_to
        return min(group.size, least)

    @property
    def floors(self) -> dict[str, int]:
        """`floor` of every group; nothing of those in blocks that may go."""
        return {g.name: self.floor(g) for g in self.groups} | self.without([b.name for b in self.branches])

    def without(self, branches: Iterable[str]) -> dict[str, int]:
        """The widths of all groups in these branches: zero."""
        gone = set(branches)
        return {name: 0 for b in self.branches if b.name in gone for name in b.groups}

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
    ranked = {}
    full = {}
    blocks: list[tuple[float, str, int]] = []  # (worth, group, units in the block), the first to go first
    for group in limits.groups:
        values = np.asarray(worth[group.name], dtype=np.float64)
        if not np.isfinite(values).all():
            raise NonFiniteError(f"the importance of {group.name!r} is not finite: look at the loss and the weights")
        units = np.arange(group.size) if start is None else np.asarray(start[group.name], dtype=np.int64)
        order = units[np.lexsort((-units, values[units]))]
        ranked[group.name] = order
        full[group.name] = len(units)
        at, running = 0, -np.inf
        for size in _block_sizes(len(units), min(limits.floor(group), len(units)), limits.round_to):
            running = max(running, float(values[order[at : at + size]].mean()))
            blocks.append((running, group.name, size))
            at += size
    # Stable: among equals, the blocks of one group stay in their order.
    blocks.sort(key=lambda block: block[0])

    whole: list[tuple[float, str, int]] = []  # whole branches; of size 0, to tell them from units
    for branch in limits.branches:
        if masses is not None and any(full[name] for name in branch.groups):
            whole.append((block_worth(branch, masses[branch.name], limits, full, blocks), branch.name, 0))
    blocks = sorted([*blocks, *whole], key=lambda block: block[0])

    def removed(count: int) -> tuple[dict[str, int], set[str]]:
        result = dict(full)
        for _, name, size in blocks[:count]:
            if size:
                result[name] -= size
        return result, {name for _, name, size in blocks[:count] if not size}

    def widths(units: dict[str, int], gone: set[str]) -> dict[str, int]:
        return {**units, **limits.without(gone)}

    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high) // 2
        if limits.met(widths(*removed(middle)), slack):
            high = middle
        else:
            low = middle + 1
    left, gone = removed(low)
    stuck: set[str] = set()  # the blocks of a group differ in size: past one that does not fit, widths would be uneven
    for _, name, size in reversed(blocks[:low]):
        if name in stuck or (size and name in limits.without(gone)):
            continue
        trial = ({**left, name: left[name] + size}, gone) if size else (left, gone - {name})
        if limits.met(widths(*trial), slack):
            left, gone = trial
        else:
            stuck.add(name)
    kept = widths(left, gone)
    return {name: tuple(sorted(order[len(order) - kept[name] :].tolist())) for name, order in ranked.items()}


def _block_sizes(size: int, floor: int, round_to: int) -> Sequence[int]:
    """How many units go at a time, so that what stays is a multiple of `round_to` (or everything)."""
    sizes = []
    left = size
    while left > floor:
        step = left % round_to or round_to
        if left - step < floor:
            break
        sizes.append(step)
        left -= step
    return sizes
