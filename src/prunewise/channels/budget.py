"""What a pruned network may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from prunewise.core.cost import Cost, CostModel
from prunewise.core.errors import BudgetError
from prunewise.core.groups import ChannelGroup


@dataclass(frozen=True)
class Budget:
    """Upper limits of a network's cost; at least one. A float in (0, 1] is a fraction of the original, an int a count.

    Attributes:
        macs: multiply-adds of one forward pass on the example inputs.
        params: parameters.
        activation_bytes: bytes that the forward pass writes.

    Raises:
        BudgetError: a value is not a fraction in (0, 1] nor a positive int, or there is none.

    Example:
        >>> Budget(macs=0.5, params=100_000)
        Budget(macs=0.5, params=100000, activation_bytes=None)
    """

    macs: float | int | None = None
    params: float | int | None = None
    activation_bytes: float | int | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if not given:
            raise BudgetError("a budget needs at least one limit, for example Budget(macs=0.5)")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BudgetError(f"{name}={value!r} should be a fraction in (0, 1] (float) or a count (int)")
            if isinstance(value, float) and not 0 < value <= 1:
                raise BudgetError(f"{name}={value} is not a fraction in (0, 1]; write an int for a count")
            if isinstance(value, int) and value < 1:
                raise BudgetError(f"{name}={value} should be a positive count, or a fraction in (0, 1] (float)")

    def given(self) -> dict[str, float | int]:
        """The limits that are set, as written."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def limits(self, full: Cost) -> dict[str, float]:
        """Absolute limits, for a network that costs `full` unpruned."""
        costs = full.as_dict()
        return {
            name: value * costs[name] if isinstance(value, float) else value for name, value in self.given().items()
        }

    def check_reachable(
        self, costs: CostModel, groups: list[ChannelGroup], floors: Mapping[str, int]
    ) -> dict[str, float]:
        """The absolute limits, if pruning `groups` down to `floors` units can meet them.

        Raises:
            BudgetError: what must stay costs more; the message says how much that is, and what pins most of it.
        """
        limits = self.limits(costs({}))
        least = costs(floors)
        for name, limit in limits.items():
            floor = least.as_dict()[name]
            if floor > limit:
                full = costs({}).as_dict()[name]
                raise BudgetError(
                    f"{name} cannot come below {floor:,} ({floor / full:.3f} of {full:,}); the budget asks for "
                    f"{limit:,.0f} ({limit / full:.3f}). Layers that keep most of it: {_heaviest(costs, least, name)}. "
                    f"Pinned: {_pins(costs, groups)}. Raise the budget, or include more groups"
                )
        return limits


def _heaviest(costs: CostModel, least: Cost, kind: str) -> str:
    rows = sorted(least.by_layer(), key=lambda row: -getattr(row, kind))[:3]
    return ", ".join(f"{row.name or 'the model itself'} ({getattr(row, kind):,})" for row in rows)


def _pins(costs: CostModel, groups: list[ChannelGroup]) -> str:
    chosen = {g.name for g in groups}
    pinned = [g for g in costs.grouping.groups if g.name not in chosen]
    pinned.sort(key=lambda g: -g.size)
    shown = [f"{g.name} ({g.reason or 'excluded'})" for g in pinned[:3]]
    return "; ".join(shown) or "nothing but the last unit of each group"
