"""The control: the target falls to the budget, is met exactly, and nothing reopens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunewise as pw
from prunewise.channels.control import GateControl, Schedule
from prunewise.channels.descent import DescentControl
from prunewise.channels.oneshot import limits_for
from prunewise.core.cost import CostModel


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)
    )


MODEL = net()
COSTS = CostModel.of(MODEL, torch.zeros(1, 3))


def control(budget: pw.Budget, steps: int = 40, kind: type[GateControl] = GateControl, **schedule: Any) -> GateControl:
    limits = limits_for(MODEL, COSTS, budget, None, None, 1, 1)
    settings_ = Schedule(**{"observe": 0.1, "close": 0.8, "updates": 10, **schedule})
    return kind(limits, steps, settings_, torch.device("cpu"))


def widths(c: GateControl) -> dict[str, int]:
    return {name: len(kept) for name, kept in c.keep.items()}


def run(c: GateControl, seed: int, steps: int | None = None) -> list[dict[str, tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(c.total_steps if steps is None else steps):
        scale = torch.rand(1, generator=generator)
        c.observe([torch.randn(g.size, generator=generator) * scale for g in c.limits.groups])
        c.update()
        seen.append(dict(c.keep))
    return seen


@given(st.integers(0, 10**6), st.floats(0.2, 0.95))
@settings(max_examples=25)
def test_budget_met_exactly_frozen_afterwards_and_nothing_reopens(seed: int, share: float) -> None:
    c = control(pw.Budget(macs=share))
    targets = []
    before: dict[str, tuple[int, ...]] = dict(c.keep)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, 41):
        c.observe([torch.randn(g.size, generator=generator) for g in c.limits.groups])
        changed = c.update()
        assert changed == (c.keep != before)
        assert all(set(c.keep[n]) <= set(before[n]) for n in before), "a gate reopened"
        assert step >= 4 or not changed
        targets.append(c.target()["macs"])
        if step >= 32:
            assert c.frozen
            assert step == 32 or not changed
        before = dict(c.keep)
    assert targets == sorted(targets, reverse=True)
    full, limit = COSTS({}).macs, share * COSTS({}).macs
    assert targets[-1] == pytest.approx(limit)
    assert targets[0] == pytest.approx(full)
    assert COSTS(widths(c)).macs <= limit
    for group in c.limits.groups:  # no closed unit could be open
        if widths(c)[group.name] < group.size:
            pass  # closed earlier for good: what fits at the end may stay closed


def test_the_cost_follows_the_target() -> None:
    c = control(pw.Budget(macs=0.4), steps=100)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        c.observe([torch.randn(g.size, generator=generator) for g in c.limits.groups])
        if c.update():
            assert COSTS(widths(c)).macs <= max(c.target()["macs"], c.limits.absolute["macs"]) + 0.5


def test_what_matters_stays() -> None:
    """Units whose gates see a gradient stay; those that see none go."""
    c = control(pw.Budget(macs=0.45))
    useful = {g.name: set(range(0, g.size, 2)) for g in c.limits.groups}
    for _ in range(40):
        c.observe(
            [torch.tensor([1.0 if u in useful[g.name] else 1e-4 for u in range(g.size)]) for g in c.limits.groups]
        )
        c.update()
    for group in c.limits.groups:
        kept = set(c.keep[group.name])
        assert kept <= useful[group.name] or useful[group.name] <= kept


def test_ranking_decides_within_a_group_and_masses_between() -> None:
    c = control(pw.Budget(macs=0.5))
    c.ranking = lambda: {g.name: np.arange(g.size, dtype=float) for g in c.limits.groups}
    run(c, 0)
    for group in c.limits.groups:
        kept = c.keep[group.name]
        assert kept == tuple(range(group.size - len(kept), group.size))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_steps_that_are_not_finite_do_not_count(bad: float) -> None:
    one, other = control(pw.Budget(macs=0.5)), control(pw.Budget(macs=0.5))
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        gradients = [torch.randn(g.size, generator=generator) for g in one.limits.groups]
        if step % 5 != 2:
            one.observe(gradients)
        broken = [g.clone() for g in gradients]
        if step % 5 == 2:
            broken[1][0] = bad
        other.observe(broken)
        one.update()
        other.update()
    assert one.keep == other.keep


def test_no_finite_gradient_at_all_is_an_error() -> None:
    c = control(pw.Budget(macs=0.5))
    with pytest.raises(pw.NonFiniteError, match="no gradient of any gate was finite"):
        for _ in range(40):
            c.observe([torch.full((g.size,), float("nan")) for g in c.limits.groups])
            c.update()


@pytest.mark.parametrize("kind", [GateControl, DescentControl])
@pytest.mark.parametrize("at", [1, 10, 25, 39])
def test_resuming_is_undisturbed(kind: type[GateControl], at: int) -> None:
    whole = control(pw.Budget(macs=0.5), kind=kind)
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(g.size, generator=generator) for g in whole.limits.groups] for _ in range(40)]
    first, second = control(pw.Budget(macs=0.5), kind=kind), control(pw.Budget(macs=0.5), kind=kind)
    for step, g in enumerate(gradients):
        if step == at:
            second.load_state_dict(first.state_dict())
        for c in (whole, first if step < at else second):
            c.observe(g)
            c.update()
    assert whole.keep == second.keep
    assert whole.frozen
    assert second.frozen
    for a, b in zip(whole._mass, second._mass, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [GateControl, DescentControl])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 200])
def test_runs_of_any_length_end_at_the_budget(kind: type[GateControl], steps: int) -> None:
    c = control(pw.Budget(macs=0.5), steps=steps, kind=kind)
    run(c, 1)
    assert c.frozen
    assert COSTS(widths(c)).macs <= 0.5 * COSTS({}).macs


def test_state_is_plain_data() -> None:
    c = control(pw.Budget(macs=0.5))
    run(c, 0, 20)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(plain(v) for v in value)
        return value is None or isinstance(value, (int, float, str, bool, torch.Tensor))

    assert plain(c.state_dict())
