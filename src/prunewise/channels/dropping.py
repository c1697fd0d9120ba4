"""When a whole residual block goes: its worth against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from prunewise.core.branches import Branch
from prunewise.core.errors import PlanError
from prunewise.core.groups import ChannelGroup

if TYPE_CHECKING:
    from prunewise.channels.choose import Limits


def droppable(branches: Sequence[Branch], groups: Sequence[ChannelGroup], min_keep: int) -> tuple[Branch, ...]:
    """The branches all of whose groups may be pruned to nothing.

    Raises:
        PlanError: `min_keep` asks for more than one unit of every group.
    """
    if min_keep > 1:
        raise PlanError(
            f"drop_blocks=True leaves nothing of a block, min_keep={min_keep} forbids that: give one of them"
        )
    chosen = {g.name for g in groups}
    return tuple(b for b in branches if not b.reason and chosen.issuperset(b.groups))


def block_worth(
    branch: Branch,
    mass: float,
    limits: Limits,
    start: Mapping[str, int],
    units: Sequence[tuple[float, str, int]],
) -> float:
    """The price at which the block goes, in worth per cost, comparable with the units' own.

    At a price t, units worth less than t are gone; the block is worth keeping as long as its mass exceeds t times
    the cost of what is left of it. The price is the lowest at which it does not.

    Args:
        branch: the block.
        mass: what the loss would lose with the block, in the unit of the channels' masses.
        limits: the constraints.
        start: widths before anything goes.
        units: (worth, group, units) of what can be removed of the block's groups, ascending.
    """
    own = [u for u in units if u[1] in branch.groups]
    weights = _weights(limits, start)

    def ratio(removed: int) -> float:
        widths = dict(start)
        for _, name, size in own[:removed]:
            widths[name] -= size
        gone = {**widths, **dict.fromkeys(branch.groups, 0)}
        saved = _weighted(limits, widths, weights) - _weighted(limits, gone, weights)
        return mass / max(saved, 1e-30)

    low, high = 0, len(own)
    while low < high:
        middle = (low + high) // 2
        if ratio(middle) <= own[middle][0]:
            high = middle
        else:
            low = middle + 1
    return max(ratio(low), own[low - 1][0] if low else 0.0)


def _totals(limits: Limits, widths: Mapping[str, int]) -> dict[str, float]:
    kept = torch.tensor([float(widths.get(g.name, g.size)) for g in limits.costs.groups], dtype=torch.float64)
    return {kind: float(limits.tensor(kind, kept)) for kind in limits.absolute}


def _weights(limits: Limits, widths: Mapping[str, int]) -> dict[str, float]:
    """How much each kind of cost counts: as in `Limits.marginal`."""
    values = _totals(limits, widths)
    over = {kind: max(0.0, value / limits.absolute[kind] - 1) for kind, value in values.items()}
    return {k: (over[k] if any(over.values()) else 1.0) / limits.absolute[k] for k in values}


def _weighted(limits: Limits, widths: Mapping[str, int], weights: Mapping[str, float]) -> float:
    return sum(weights[kind] * value for kind, value in _totals(limits, widths).items())
