"""Budgets: what is no budget, and what cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import prunewise as pw

X = torch.zeros(1, 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "given",
    [{}, {"macs": 0.0}, {"macs": 1.0001}, {"macs": -0.5}, {"macs": 0}, {"macs": -3}, {"macs": True}, {"macs": "half"},
     {"macs": float("nan")}, {"macs": float("inf")}, {"params": None}, {"params": [0.5]}, {"activation_bytes": 2.0},
     {"macs": 0.5, "params": 0}],
)  # fmt: skip
def test_what_is_no_budget(given: dict[str, Any]) -> None:
    with pytest.raises(pw.BudgetError) as caught:
        pw.Budget(**given)
    assert isinstance(caught.value, ValueError)
    for name, value in given.items():
        if value is not None and name in str(caught.value):
            assert str(value) in str(caught.value) or repr(value) in str(caught.value)


def test_fractions_and_counts() -> None:
    full = pw.measure(net(), X).as_dict()
    assert pw.Budget(macs=0.5, params=70).limits(full) == {"macs": 0.5 * full["macs"], "params": 70}
    assert pw.Budget(macs=1).limits(full) == {"macs": 1}
    assert pw.Budget(macs=1.0).limits(full) == {"macs": full["macs"]}


@pytest.mark.parametrize("kind", ["macs", "params", "activation_bytes"])
@pytest.mark.parametrize("share", [0.3, 0.45, 0.5, 0.61, 0.999, 1.0])
def test_never_exceeded(kind: str, share: float) -> None:
    try:
        plan = pw.plan_channels(net(), X, budget=pw.Budget(**{kind: share}))
    except pw.BudgetError:
        pytest.skip("below the floor")
    assert plan.cost_after[kind] <= share * plan.cost_before[kind]


def test_counts_of_every_size_are_met_exactly_or_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 7), nn.ReLU(), nn.Linear(7, 2))
    for macs in range(1, 22):
        if macs < 3:
            with pytest.raises(pw.BudgetError):
                pw.plan_channels(model, torch.zeros(1, 1), budget=pw.Budget(macs=macs))
        else:
            plan = pw.plan_channels(model, torch.zeros(1, 1), budget=pw.Budget(macs=macs))
            assert plan.cost_after["macs"] == macs // 3 * 3


@pytest.mark.parametrize("entry", ["plan_channels", "attach_gates"])
def test_what_cannot_be_met_names_floor_layers_and_pins(entry: str) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    more: dict[str, Any] = {"total_steps": 5} if entry == "attach_gates" else {}
    with pytest.raises(pw.BudgetError) as caught:
        getattr(pw, entry)(model, X, budget=pw.Budget(params=0.5), exclude="0", **more)
    message = str(caught.value)
    floor = 50 + 10 + 1 + 2 + 2
    assert f"params cannot come below {floor}" in message
    assert "148" in message
    assert "(0.500)" in message
    assert "0 (excluded)" in message
    assert "an output of the model" in message
    assert list(model.state_dict()) == list(before)
    pw.plan_channels(model, X, budget=pw.Budget(macs=0.5))


@pytest.mark.parametrize(("min_keep", "round_to"), [(5, 4), (3, 2), (1, 4), (9, 1)])
def test_floors_count_min_keep_and_round_to(min_keep: int, round_to: int) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    least = -(-min_keep // round_to) * round_to
    plan = pw.plan_channels(
        model, torch.zeros(1, 4), budget=pw.Budget(macs=7 * least), min_keep=min_keep, round_to=round_to
    )
    assert len(plan.keep["0"]) == least
    with pytest.raises(pw.BudgetError, match=f"below {7 * least} "):
        pw.plan_channels(
            model, torch.zeros(1, 4), budget=pw.Budget(macs=7 * least - 1), min_keep=min_keep, round_to=round_to
        )


def test_several_limits_hold_together() -> None:
    plan = pw.plan_channels(net(), X, budget=pw.Budget(macs=0.9, params=0.4, activation_bytes=120))
    after, before = plan.cost_after, plan.cost_before
    assert after["macs"] <= 0.9 * before["macs"]
    assert after["params"] <= 0.4 * before["params"]
    assert after["activation_bytes"] <= 120


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "many"])
def test_total_steps(steps: Any) -> None:
    with pytest.raises(pw.BudgetError, match="total_steps"):
        pw.attach_gates(net(), X, budget=pw.Budget(macs=0.5), total_steps=steps)


@pytest.mark.parametrize("setting", [{"min_keep": 0}, {"round_to": 0}])
def test_settings_below_one(setting: dict[str, int]) -> None:
    with pytest.raises(pw.PlanError, match="at least 1"):
        pw.plan_channels(net(), X, budget=pw.Budget(macs=0.5), **setting)
