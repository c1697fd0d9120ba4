"""`allocate`: every importance by name, on small models."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.layers.allocate import _OURS, _PUBLISHED

NAMES = [*_OURS, *_PUBLISHED]
SHAPES_ONLY = ("uniform", "erk", "params")
WEIGHTS = ("lamp", "global_magnitude", "stable_rank", "alpha")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=6), nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3)
    )  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 2, 4, 4, generator=rng), torch.randint(3, (4,), generator=rng)) for _ in range(3)]


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 0.9999999])
@pytest.mark.parametrize("importance", NAMES)
def test_every_importance_meets_the_total(importance: str, sparsity: float) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    plan = pw.allocate(model, sparsity, importance, data(), progress=False)
    size = 108 + 6 + 240 + 30
    assert list(plan) == ["0", "2", "4", "6"]
    assert sum(plan.sizes.values()) == size
    assert plan.kept == max(1, math.floor((1 - sparsity) * size + 0.5))
    assert all(0 <= s <= 1 for s in plan.values())
    assert plan.notes["importance"] == importance
    assert pw.SparsityPlan.from_dict(plan.to_dict()) == plan
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_capacity_needs_no_targets_and_the_first_samples_are_enough() -> None:
    inputs = torch.randn(64, 2, 4, 4)
    plan = pw.allocate(net(), 0.5, data=[inputs], progress=False)
    assert plan.notes["importance"] == "capacity"
    assert plan.keep == pw.allocate(net(), 0.5, data=inputs[:32].split(5), progress=False).keep
    never_ends = iter(lambda: inputs[:8], None)
    assert sum(pw.allocate(net(), 0.5, data=never_ends, progress=False).keep.values()) == 192


def test_capacity_keeps_more_of_the_layer_that_moves_the_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(16, 16), nn.Linear(16, 16)
            self.quiet.load_state_dict(self.loud.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return 10 * self.loud(x) + self.quiet(x)

    plan = pw.allocate(Two(), 0.7, data=[torch.randn(40, 16)], progress=False)
    assert plan["loud"] < 0.6 < 0.8 < plan["quiet"]
    assert dict(pw.allocate(Two(), 0.7, "lamp")) == {"loud": plan.sparsity, "quiet": plan.sparsity}


def test_capacity_names_a_layer_that_the_outputs_do_not_depend_on() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(pw.DataError, match="never depend on 'spare'.*exclude='spare'"):
        pw.allocate(Unused(), 0.5, data=[torch.randn(3, 4)], progress=False)
    no_gradients = nn.Linear(4, 4)
    no_gradients.forward = torch.no_grad()(no_gradients.forward)
    with pytest.raises(pw.DataError, match="can be differentiated"):
        pw.allocate(no_gradients, 0.5, data=[torch.randn(3, 4)], progress=False)


@pytest.mark.parametrize("importance", SHAPES_ONLY)
def test_shapes_are_enough(importance: str) -> None:
    with torch.device("meta"):
        meta = net()
    assert pw.allocate(meta, 0.8, importance).keep == pw.allocate(net(), 0.8, importance).keep


@pytest.mark.parametrize("importance", [*WEIGHTS, "capacity", "owl", "taylor"])
def test_a_model_on_the_meta_device_needs_its_weights(importance: str) -> None:
    with torch.device("meta"), pytest.raises(pw.PlanError, match="meta device: load the weights"):
        pw.allocate(net(), 0.8, importance, data())


@pytest.mark.parametrize("importance", sorted(set(NAMES) - set(SHAPES_ONLY) - set(WEIGHTS)))
def test_missing_and_empty_data(importance: str) -> None:
    with pytest.raises(pw.DataError, match=f"{importance}'? needs data"):
        pw.allocate(net(), 0.5, importance)
    with pytest.raises(pw.DataError, match="empty"):
        pw.allocate(net(), 0.5, importance, [], progress=False)


def test_floor() -> None:
    plan = pw.allocate(net(), 0.9, lambda model, layers: {x.name: float(x.name == "4") for x in layers})
    assert [plan.keep[n] for n in ("0", "2", "6")] == [2, 1, 1]  # a tenth of the total density, rounded up
    plan = pw.allocate(net(), 0.9, "lamp", floor=0.05)
    assert max(plan.values()) <= 0.95
    with pytest.raises(pw.SparsityError, match="lower one of them"):
        pw.allocate(net(), 0.9, "erk", floor=0.2)


def test_excluded_layers_are_not_counted() -> None:
    plan = pw.allocate(net(), 0.5, "uniform", exclude=["0", "6"])
    assert dict(plan.keep) == {"2": 3, "4": 120}


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    for importance in NAMES:
        batches = [(torch.randn(6, 8), torch.randint(4, (6,)))]
        plan = pw.allocate(model, 0.5, importance, batches, progress=False)
        assert plan.sizes == {"0": 64, "2": 32}
        assert plan.kept == 48


def test_one_layer_gets_the_total() -> None:
    for importance in NAMES:
        plan = pw.allocate(
            nn.Linear(5, 5), 0.3, importance, [(torch.randn(6, 5), torch.randint(5, (6,)))], progress=False
        )
        assert dict(plan.keep) == {"": 18}


def test_numbers_of_numpy_will_do() -> None:
    plan = pw.allocate(net(), np.float32(0.5), "erk")
    assert plan.kept == 192 and plan.notes["sparsity"] == "0.5"


def test_seven_billion_weights_on_the_meta_device() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(4))
            self.mlp = nn.ModuleList([nn.Linear(4096, 11008), nn.Linear(4096, 11008), nn.Linear(11008, 4096)])

    with torch.device("meta"):
        model = nn.ModuleList(Block() for _ in range(32))
    plan = pw.allocate(model, 0.7, "erk")
    assert len(plan) == 7 * 32
    assert plan.kept == math.floor((1 - 0.7) * sum(plan.sizes.values()) + 0.5) > 1.9e9


def test_the_loss_and_dicts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            out = self.b(self.a(x).relu())
            return {"logits": out} if labels is None else {"loss": nn.functional.cross_entropy(out, labels)}

    model = Model()
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    for importance in ("capacity", "taylor", "fisher", "loss_increase", "owl"):
        plan = pw.allocate(model, 0.5, importance, [{"x": x, "labels": y}], progress=False)
        assert plan.kept == 14
    mine = pw.allocate(
        model, 0.5, "taylor", [x], loss=lambda m, b: nn.functional.cross_entropy(m(b)["logits"], y), progress=False
    )
    assert mine.keep == pw.allocate(model, 0.5, "taylor", [{"x": x, "labels": y}], progress=False).keep


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.01, math.nan, 90])
def test_totals_out_of_range(sparsity: float) -> None:
    with pytest.raises(pw.SparsityError, match=r"\[0, 1\)"):
        pw.allocate(net(), sparsity, "erk")


def test_unknown_names() -> None:
    with pytest.raises(pw.PlanError, match="unknown importance 'magic': use capacity, effective_rank"):
        pw.allocate(net(), 0.5, "magic")
    with pytest.raises(pw.PlanError, match="no layer matches 'layer1'"):
        pw.allocate(net(), 0.5, "erk", exclude="layer1")


@pytest.mark.parametrize("importance", NAMES)
def test_nan_in_weights_is_named(importance: str) -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    if importance in SHAPES_ONLY:
        pw.allocate(model, 0.5, importance)
        return
    with pytest.raises(pw.NonFiniteError, match="weight of '4'"):
        pw.allocate(model, 0.5, importance, data(), progress=False)


@pytest.mark.parametrize("importance", ["capacity", "owl", "rate", "taylor", "fisher", "loss_increase"])
def test_nan_in_activations_is_an_error(importance: str) -> None:
    with pytest.raises(pw.NonFiniteError, match="'0'"):
        pw.allocate(net(), 0.5, importance, [(x * math.nan, y) for x, y in data()], progress=False)


def test_progress_is_shown_only_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    pw.allocate(net(), 0.5, data=data())
    assert capsys.readouterr().out == ""
