"""Importance of layers as a channel plan whose true cost meets the budget."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.recipes import _worth_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.b, self.c = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 24, 1)
        self.d, self.fc = nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.bn(self.a(x)).relu()).relu()).relu()
        return self.fc((x + self.d(x)).relu().mean((2, 3)))


X = torch.zeros(2, 3, 6, 6)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 6, 6, generator=rng), torch.randint(5, (6,), generator=rng)) for _ in range(2)]


@pytest.mark.parametrize("importance", ["capacity", "erk", "lamp", "global_magnitude", "taylor", "uniform"])
@pytest.mark.parametrize("budget", [pw.Budget(macs=0.5), pw.Budget(params=0.3), pw.Budget(macs=0.6, params=0.4)])
def test_the_true_cost_meets_the_budget(net: Net, importance: str, budget: pw.Budget) -> None:
    before = copy.deepcopy(net.state_dict())
    plan = pw.allocate_channels(net, X, budget=budget, importance=importance, data=data(), progress=False)
    small = pw.apply_plan(net, plan, X)
    cost, full = pw.measure(small, X).as_dict(), pw.measure(net, X).as_dict()
    assert cost == plan.cost_after
    shares = {kind: getattr(budget, kind) for kind in ("macs", "params") if getattr(budget, kind) is not None}
    assert all(cost[kind] <= share * full[kind] for kind, share in shares.items())
    assert any(cost[kind] > (share - 0.08) * full[kind] for kind, share in shares.items())  # and uses it
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert plan.notes["importance"] == importance


def widths(plan: pw.ChannelPlan, net: Net) -> dict[str, float]:
    groups = [g for g in pw.channel_groups(net, X) if g.prunable]
    return {g.name: len(plan.keep.get(g.name, range(g.size))) / g.size for g in groups}


def test_uniform_importance_gives_uniform_shares(net: Net) -> None:
    shares = widths(pw.allocate_channels(net, X, budget=pw.Budget(macs=0.5), importance="uniform"), net)
    assert len(shares) == 2
    assert max(shares.values()) - min(shares.values()) <= 2 / 24


def test_an_important_layer_keeps_more_channels(net: Net) -> None:
    def mine(name: str) -> Any:
        return lambda model, layers: {x.name: 5.0 if x.name in name else 1.0 for x in layers}

    first = widths(pw.allocate_channels(net, X, budget=pw.Budget(macs=0.5), importance=mine("ab")), net)
    second = widths(pw.allocate_channels(net, X, budget=pw.Budget(macs=0.5), importance=mine("cd")), net)
    assert first["a"] > second["a"] + 0.2
    assert first["c"] < second["c"] - 0.1


def test_the_channels_of_least_magnitude_go(net: Net) -> None:
    with torch.no_grad():
        net.a.weight[:16] *= 100
        net.b.weight[:16] *= 100
    keep = pw.allocate_channels(net, X, budget=pw.Budget(macs=0.4), importance="uniform").keep["a"]
    assert len(keep) > 16 and set(range(16)) <= set(keep)


def test_gates_can_start_from_it(net: Net) -> None:
    budget = pw.Budget(macs=0.5)
    plan = pw.allocate_channels(net, X, budget=budget, importance="erk", round_to=4)
    assert all(len(kept) % 4 == 0 for kept in plan.keep.values())
    gates = pw.attach_gates(net, X, budget=budget, total_steps=1)
    with pytest.raises(pw.AlreadyGatedError):
        pw.allocate_channels(net, X, budget=budget, importance="erk")
    gates.set_plan(plan)
    assert gates.cost().macs == plan.cost_after["macs"]


def test_importances_count_under_masks_too() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    pw.sparsify_(model, pw.allocate(model, 0.5, "uniform"))

    def widths(first: float, second: float) -> list[int]:
        plan = pw.allocate_channels(
            model, torch.zeros(1, 6), budget=pw.Budget(macs=0.4),
            importance=lambda m, layers: {"0": first, "2": second, "4": 1.0},
        )  # fmt: skip
        return [len(plan.keep[name]) for name in sorted(plan.keep)]

    (a, b), (c, d) = widths(0.1, 1), widths(1, 0.1)
    assert a < c and b > d


def test_what_is_wrong_is_said(net: Net) -> None:
    with pytest.raises(pw.DataError, match="needs data"):
        pw.allocate_channels(net, X, budget=pw.Budget(macs=0.5))
    with pytest.raises(pw.BudgetError):
        pw.allocate_channels(net, X, budget=pw.Budget(macs=0.0001), importance="erk")
    with pytest.raises(pw.PlanError, match="one finite score"):
        pw.allocate_channels(net, X, budget=pw.Budget(macs=0.5), importance="erk", units=lambda m, g: {})


def test_worth_is_the_total_at_which_a_unit_goes() -> None:
    """Against the definition: at a total, the units worth more than it are the square root of the density."""
    layers = {"a": (40, 10), "b": (20, 20)}
    from prunewise.layers.allocators import Total, proportional
    from prunewise.recipes import _DENSITIES

    def plan(density: float) -> pw.SparsityPlan:
        return pw.SparsityPlan(proportional({"a": 3, "b": 1}, Total(layers, 1 - density)), layers)

    plans = [plan(float(d)) for d in _DENSITIES]
    for name in layers:
        worth = _worth_of(50, [name], plans)
        assert (np.diff(worth) <= 0).all()
        for density in (0.8, 0.5, 0.2, 0.05):
            share = math.sqrt(1 - plan(density)[name])
            stay = int((worth > -math.log(density)).sum())
            assert abs(stay - 50 * share) <= 1.5


def test_layers_that_cannot_be_measured_are_passed_over() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2)
            self.spare = nn.Linear(3, 3)
            nn.utils.parametrizations.weight_norm(self.head)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.second(self.first(x).relu()).relu())
            return out

    data = [torch.randn(8, 6)]
    plan = pw.allocate_channels(Odd(), data[0], budget=pw.Budget(macs=0.5), data=data, progress=False)
    assert plan.cost_after["macs"] <= 0.5 * plan.cost_before["macs"]
