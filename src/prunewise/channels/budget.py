"""What a pruned network may cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from prunewise.channels.latency import LatencyModel
from prunewise.core.cost import Cost, CostModel
from prunewise.core.errors import BudgetError
from prunewise.core.groups import ChannelGroup

_KINDS = ("macs", "params", "activation_bytes", "latency_ms")
_MILLISECONDS = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*ms\s*")


@dataclass(frozen=True, repr=False)
class Budget:
    """Upper limits of a network's cost; at least one. A float in (0, 1] is a fraction of the original, an int a count.

    Attributes:
        macs: multiply-adds of one forward pass on the example inputs, all samples of the batch together.
        params: parameters.
        activation_bytes: bytes that the forward pass writes.
        latency_ms: milliseconds of one forward pass on the example inputs (their batch size counts), as predicted from
            measurements of every layer on `device`; `gates.finish()` measures the small network itself. A float in (0, 1] is
            a fraction of the measured full latency; an int, or a float above 1, is milliseconds; so is text with the unit,
            for less than one: "0.25 ms".
        device: where latency is measured; default: where the model is.
        latency_model: measurements made before (`LatencyModel.of`, `LatencyModel.load`); default: measure now.

    Raises:
        BudgetError: a value is not a fraction in (0, 1] nor a positive count, or there is none.

    Example:
        >>> Budget(macs=0.5, params=100_000).given()
        {'macs': 0.5, 'params': 100000}
    """

    macs: float | int | None = None
    params: float | int | None = None
    activation_bytes: float | int | None = None
    latency_ms: float | int | str | None = None
    device: torch.device | str | None = None
    latency_model: LatencyModel | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.given()
        if not given:
            raise BudgetError("a budget needs at least one limit, for example Budget(macs=0.5)")
        for name, value in given.items():
            if name == "latency_ms":
                _milliseconds(self.latency_ms, 1.0)
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BudgetError(f"{name}={value!r} should be a fraction in (0, 1] (float) or a count (int)")
            if isinstance(value, float) and not 0 < value <= 1:
                raise BudgetError(f"{name}={value} is not a fraction in (0, 1]; write an int for a count")
            if isinstance(value, int) and value < 1:
                raise BudgetError(f"{name}={value} should be a positive count, or a fraction in (0, 1] (float)")
        if self.latency_ms is None and (self.device is not None or self.latency_model is not None):
            raise BudgetError("device= and latency_model= are for latency: give latency_ms= as well")

    def __repr__(self) -> str:
        device = {} if self.device is None else {"device": str(self.device)}
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in (self.given() | device).items())})"

    def given(self) -> dict[str, float | int | str]:
        """The limits that are set, as written."""
        return {name: value for name in _KINDS if (value := getattr(self, name)) is not None}

    def limits(self, full: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, for a network that costs `full` (by kind) unpruned."""
        found = {}
        for name, value in self.given().items():
            if name == "latency_ms":
                found[name] = _milliseconds(self.latency_ms, full[name])
            else:
                assert not isinstance(value, str)
                found[name] = value * full[name] if isinstance(value, float) else value
        return found

    def check_reachable(
        self,
        costs: CostModel,
        groups: list[ChannelGroup],
        floors: Mapping[str, int],
        latency: LatencyModel | None = None,
    ) -> dict[str, float]:
        """The absolute limits, if pruning `groups` down to `floors` units can meet them.

        Raises:
            BudgetError: what must stay costs more; the message says how much that is, and what pins most of it.
        """
        whole: dict[str, float] = {**costs({}).as_dict()}
        least = costs(floors)
        lowest: dict[str, float] = {**least.as_dict()}
        if latency is not None:
            whole["latency_ms"], lowest["latency_ms"] = latency({}), latency(floors)
        limits = self.limits(whole)
        for name, limit in limits.items():
            floor, full = lowest[name], whole[name]
            if floor > limit:
                raise BudgetError(
                    f"{name} cannot come below {_shown(floor)} ({floor / full:.3f} of {_shown(full)}); the budget asks for "
                    f"{_shown(limit)} ({limit / full:.3f}). {_stays(least, latency, name)}. "
                    f"Pinned: {_pins(costs, groups)}. Raise the budget, or include more groups"
                )
        return limits


def _milliseconds(value: float | int | str | None, full_ms: float) -> float:
    """A latency limit in milliseconds."""
    remedy = "write a fraction of the full latency (a float in (0, 1]), milliseconds (a number above 1), or '0.25 ms'"
    if isinstance(value, str):
        match = _MILLISECONDS.fullmatch(value)
        if match is None or float(match[1]) <= 0:
            raise BudgetError(f"latency_ms={value!r} is not a number of milliseconds: {remedy}")
        return float(match[1])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise BudgetError(f"latency_ms={value!r} is not a latency: {remedy}")
    return value * full_ms if isinstance(value, float) and value <= 1 else float(value)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _stays(least: Cost, latency: LatencyModel | None, name: str) -> str:
    if name == "latency_ms":
        assert latency is not None
        return f"Of that, {latency.constant_ms:.4g} ms do not depend on any width (measured on {latency.device})"
    return f"Layers that keep most of it: {_heaviest(least, name)}"


def _heaviest(least: Cost, kind: str) -> str:
    rows = sorted(least.by_layer(), key=lambda row: -getattr(row, kind))[:3]
    return ", ".join(f"{row.name or 'the model itself'} ({getattr(row, kind):,})" for row in rows)


def _pins(costs: CostModel, groups: list[ChannelGroup]) -> str:
    chosen = {g.name for g in groups}
    pinned = [g for g in costs.grouping.groups if g.name not in chosen]
    pinned.sort(key=lambda g: -g.size)
    shown = [f"{g.name} ({g.reason or 'excluded'})" for g in pinned[:3]]
    return "; ".join(shown) or "nothing but the last unit of each group"
