"""Latency budgets: the prediction is exact where time is known, rises with every width, and is never above the budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prunewise as pw
from prunewise.channels import latency
from prunewise.channels.latency import LatencyModel, measure_latency
from prunewise.core.cost import CostModel
from prunewise.core.surgery import Surgeon
from tests.zoo import ZOO


def time_is_macs(calls: Sequence[Callable[[], Any]], *_: Any, **__: Any) -> list[float]:
    """Stands for the clock: a call takes a millisecond for every thousand multiply-adds."""
    times = []
    for call in calls:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        times.append(counter.get_total_flops() / 2 / 1000)
    return times


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "interleaved", time_is_macs)


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip
    return model.eval(), torch.randn(2, 3, 12, 12)


def modelled() -> tuple[nn.Module, torch.Tensor, CostModel, LatencyModel]:
    model, x = network()
    costs = CostModel.of(model, x)
    return model, x, costs, LatencyModel.of(costs, model, x)


def test_where_time_is_macs_the_prediction_is_too(ideal: None) -> None:
    _, _, costs, predicted = modelled()
    assert predicted({}) == pytest.approx(costs({}).macs / 1000, rel=1e-9) == predicted.full_ms
    for widths in ({"0": 17}, {"0": 40, "3": 31}, {"3": 1, "7": 3}, {"0": 1, "3": 1, "7": 1}):
        # Piecewise bilinear is exact for products of two widths; the least slope adds 1 % of a layer at most, twice.
        assert predicted(widths) == pytest.approx(costs(widths).macs / 1000, abs=0.02 * predicted.full_ms)


@pytest.mark.parametrize("name", ["resnet_a", "mobilenet_v2", "densenet"])
def test_prediction_of_whole_architectures(ideal: None, name: str) -> None:
    entry = ZOO[name]
    model, inputs = entry.factory().eval(), entry.example_inputs()
    costs = CostModel.of(model, inputs)
    predicted = LatencyModel.of(costs, model, inputs)
    assert predicted({}) == pytest.approx(costs({}).macs / 1000, rel=1e-6)
    half = {g.name: max(1, g.size // 2) for g in costs.groups}
    assert predicted(half) == pytest.approx(costs(half).macs / 1000, abs=0.05 * predicted.full_ms)


@pytest.mark.parametrize("name", sorted(ZOO)[::4])
def test_every_kind_of_network_can_be_measured(name: str) -> None:
    entry = ZOO[name]
    model, inputs = entry.factory().eval(), entry.example_inputs()
    costs = CostModel.of(model, inputs)
    predicted = LatencyModel.of(costs, model, inputs, seconds=0)
    assert predicted({}) == pytest.approx(predicted.full_ms, rel=1e-6)
    least = predicted({g.name: 1 for g in costs.groups})
    assert 0 <= predicted.constant_ms <= least + 1e-9
    assert least < predicted.full_ms or not costs.groups


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_never_falls_as_a_width_grows(data: st.DataObject) -> None:
    _, _, costs, predicted = _noisy()
    widths = {g.name: data.draw(st.integers(1, g.size)) for g in costs.groups}
    group = data.draw(st.sampled_from(list(costs.groups)))
    more = {**widths, group.name: data.draw(st.integers(widths[group.name], group.size))}
    assert predicted(more) >= predicted(widths) - 1e-12
    if more != widths:
        assert predicted(more) > predicted(widths)


_NOISY: list[Any] = []


def _noisy() -> tuple[nn.Module, torch.Tensor, CostModel, LatencyModel]:
    """Measured so briefly that the raw times surely do not rise everywhere."""
    if not _NOISY:
        model, x = network()
        costs = CostModel.of(model, x)
        _NOISY.append((model, x, costs, LatencyModel.of(costs, model, x, seconds=0)))
    return _NOISY[0]  # type: ignore[no-any-return]


def test_gradient_is_the_slope(ideal: None) -> None:
    _, _, costs, predicted = modelled()
    kept = torch.tensor([20.5, 37.5, 7.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(predicted.tensor, (kept,))
    (slope,) = torch.autograd.grad(predicted.tensor(kept), kept)
    (true,) = torch.autograd.grad(costs.tensor("macs", kept) / 1000, kept)
    assert (slope > 0).all()
    assert torch.allclose(slope, true, rtol=0.1)


def test_plan_is_within_the_budget_and_no_unit_more_fits(ideal: None) -> None:
    model, x, costs, predicted = modelled()
    plan = pw.plan_channels(model, x, budget=pw.Budget(latency_ms=0.5, latency_model=predicted))
    widths = {g.name: len(plan.keep.get(g.name, range(g.size))) for g in costs.groups}
    assert predicted(widths) <= 0.5 * predicted.full_ms
    for group in costs.groups:
        if widths[group.name] < group.size:
            assert predicted({**widths, group.name: widths[group.name] + 1}) > 0.5 * predicted.full_ms
    assert float(plan.notes["latency_ms"]) == pytest.approx(predicted(widths), rel=1e-5)
    assert float(plan.notes["latency_ms_before"]) == pytest.approx(predicted.full_ms, rel=1e-5)
    pw.apply_plan(model, plan, x)


def test_the_small_network_is_measured_where_the_budget_was(ideal: None) -> None:
    model, x, costs, predicted = modelled()
    small, plan = _finished(model, x, predicted)
    measured = float(plan.notes["latency_ms_measured"])
    assert measured == pytest.approx(pw.measure(small, x).macs / 1000, rel=1e-5)
    assert measured == pytest.approx(float(plan.notes["latency_ms"]), abs=0.02 * predicted.full_ms)
    elsewhere = LatencyModel.from_dict({**predicted.to_dict(), "device": "a phone"})
    assert "latency_ms_measured" not in _finished(network()[0], x, elsewhere)[1].notes
    assert set(_finished(network()[0], x, None)[1].notes) == {"importance"}


def _finished(model: nn.Module, x: torch.Tensor, predicted: LatencyModel | None) -> tuple[nn.Module, pw.ChannelPlan]:
    budget = pw.Budget(latency_ms=0.5, latency_model=predicted) if predicted else pw.Budget(macs=0.5)
    gates = pw.attach_gates(model, x, budget=budget, total_steps=5)
    small = gates.finish()
    return small, gates.plan


def test_several_limits_hold_together(ideal: None) -> None:
    model, x, costs, predicted = modelled()
    plan = pw.plan_channels(model, x, budget=pw.Budget(latency_ms=0.8, params=0.3, latency_model=predicted))
    widths = {name: len(kept) for name, kept in plan.keep.items()}
    assert predicted(widths) <= 0.8 * predicted.full_ms
    assert costs(widths).params <= 0.3 * costs({}).params


def test_milliseconds_and_fractions(ideal: None) -> None:
    model, x, _, predicted = modelled()
    full = predicted.full_ms
    limit = {"latency_ms": full}
    assert pw.Budget(latency_ms=0.5).limits(limit) == {"latency_ms": 0.5 * full}
    assert pw.Budget(latency_ms=1.0).limits(limit) == {"latency_ms": full}
    assert pw.Budget(latency_ms=1).limits(limit) == {"latency_ms": 1.0}
    assert pw.Budget(latency_ms=2.5).limits(limit) == {"latency_ms": 2.5}
    assert pw.Budget(latency_ms="0.25 ms").limits(limit) == {"latency_ms": 0.25}
    plan = pw.plan_channels(model, x, budget=pw.Budget(latency_ms=f"{0.5 * full} ms", latency_model=predicted))
    assert plan.keep == pw.plan_channels(model, x, budget=pw.Budget(latency_ms=0.5, latency_model=predicted)).keep


@pytest.mark.parametrize(
    "value", [0, 0.0, -1, -0.5, True, float("nan"), float("inf"), "fast", "0 ms", "-1ms", "3 s", [1]]
)
def test_what_is_no_latency(value: Any) -> None:
    with pytest.raises(pw.BudgetError, match="latency_ms"):
        pw.Budget(latency_ms=value)


def test_device_without_latency() -> None:
    with pytest.raises(pw.BudgetError, match="give latency_ms="):
        pw.Budget(macs=0.5, device="cpu")


def test_floor_above_the_budget(ideal: None) -> None:
    model, x, _, predicted = modelled()
    with pytest.raises(pw.BudgetError, match=r"latency_ms cannot come below .* ms do not depend on any width"):
        pw.plan_channels(model, x, budget=pw.Budget(latency_ms=1e-4, latency_model=predicted))


def test_meta_device() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4)
    with pytest.raises(pw.BudgetError, match="meta device"):
        pw.plan_channels(model, x, budget=pw.Budget(latency_ms=0.5))


def test_as_data(ideal: None, tmp_path: Path) -> None:
    _model, _x, _costs, predicted = modelled()
    predicted.save(tmp_path / "latency.json")
    again = LatencyModel.load(tmp_path / "latency.json")
    assert again.to_dict() == predicted.to_dict()
    for widths in ({}, {"0": 13}, {"3": 50, "7": 2}):
        assert again(widths) == predicted(widths)
    other = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 2))
    with pytest.raises(pw.BudgetError, match="another network"):
        pw.plan_channels(other, torch.zeros(1, 12), budget=pw.Budget(latency_ms=0.5, latency_model=again))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(schema_version=99),
        lambda d: d.pop("operations"),
        lambda d: d.pop("full_ms"),
        lambda d: d["terms"][0].update(operation="none"),
        lambda d: d["terms"][0].update(sizes=[[1, {"nobody": 1}]]),
        lambda d: next(iter(d["operations"].values())).update(ms=[[1.0]]),
        lambda d: d.update(groups=[]),
    ],
)
def test_damaged_data(ideal: None, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    data = modelled()[3].to_dict()
    damage(data)
    (tmp_path / "latency.json").write_text(json.dumps(data))
    with pytest.raises(pw.BudgetError, match="measure again"):
        LatencyModel.load(tmp_path / "latency.json")
    (tmp_path / "latency.json").write_text(json.dumps(data)[:50])
    with pytest.raises(pw.BudgetError, match="not a latency model"):
        LatencyModel.load(tmp_path / "latency.json")


def test_bound_to_a_smaller_network(ideal: None) -> None:
    model, x, costs, predicted = modelled()
    keep = {"0": tuple(range(40)), "3": tuple(range(50)), "7": tuple(range(11))}
    small = Surgeon(costs, x).cut(model, keep)
    bound = predicted.bind(CostModel.of(small, x))
    assert bound({}) == pytest.approx(predicted({name: len(kept) for name, kept in keep.items()}), rel=1e-9)
    assert bound({"3": 20}) == pytest.approx(predicted({"0": 40, "3": 20, "7": 11}), rel=1e-9)


def test_measured_for_real() -> None:
    model, x = network()
    before = [p.clone() for p in model.parameters()]
    model[0].train()
    costs = CostModel.of(model, x)
    predicted = LatencyModel.of(costs, model, x, "cpu", seconds=0.5)
    assert 0 < predicted(dict.fromkeys(costs.widths, 1)) < predicted({}) == pytest.approx(predicted.full_ms)
    assert 0 < measure_latency(model, x, seconds=0) < 1e4
    assert model[0].training and not model[1].training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "cpu" in predicted.device


def test_a_fraction_of_an_odd_count_is_not_rounded_up() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)), torch.zeros(1, 3)
    plan = pw.plan_channels(model, x, budget=pw.Budget(macs=0.58))  # of 25: 14.5, and 15 is the cost of three units
    assert plan.cost_after["macs"] == 10
