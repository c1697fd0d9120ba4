"""Costs: exact for whole widths, differentiable in between."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import prunewise as pw
from prunewise.core.cost import CostModel
from tests.zoo import build

MODELS = ["resnet_b", "resnext", "mobilenet_v2", "bert", "mlp_batchnorm"]


def known(names: list[str]) -> list[str]:
    from tests.zoo import ZOO

    return [n for n in names if n in ZOO] or sorted(ZOO)[:3]


def test_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    cost = pw.measure(model, torch.zeros(2, 3, 6, 6))
    assert cost.macs == 2 * 16 * 8 * 3 * 9 + 2 * 128 * 5
    assert cost.params == 8 * 3 * 9 + 128 * 5 + 5
    assert cost.activation_bytes == 4 * 2 * (128 + 128 + 5)
    assert [(r.name, r.macs) for r in cost.by_layer() if r.macs] == [("0", 6912), ("3", 1280)]
    for kind in ("macs", "params", "activation_bytes"):
        assert sum(getattr(r, kind) for r in cost.by_layer()) == cost.as_dict()[kind]


@pytest.mark.parametrize("name", known(MODELS))
def test_tensor_and_integers_agree(name: str) -> None:
    model, inputs = build(name)
    costs = CostModel.of(model, inputs)
    rng = random.Random(0)
    for _ in range(3):
        widths = {g.name: rng.randint(1, g.size) for g in costs.groups}
        kept = torch.tensor([float(widths[g.name]) for g in costs.groups], dtype=torch.float64)
        for kind, value in costs(widths).as_dict().items():
            assert isinstance(value, int)
            assert float(costs.tensor(kind, kept)) == value


@pytest.mark.parametrize("name", known(MODELS))
@pytest.mark.parametrize("kind", ["macs", "params", "activation_bytes"])
def test_gradient_against_finite_differences(name: str, kind: str) -> None:
    model, inputs = build(name)
    costs = CostModel.of(model, inputs)
    torch.manual_seed(0)
    sizes = torch.tensor([float(g.size) for g in costs.groups], dtype=torch.float64)
    kept = (sizes * (0.3 + 0.6 * torch.rand(len(sizes), dtype=torch.float64))).requires_grad_(True)
    (gradient,) = torch.autograd.grad(costs.tensor(kind, kept), kept)
    scale = float(costs({}).as_dict()[kind])
    for i in range(min(len(sizes), 6)):
        step = torch.zeros_like(kept)
        step[i] = 1e-4
        with torch.no_grad():
            up, down = costs.tensor(kind, kept + step), costs.tensor(kind, kept - step)
        assert float((up - down) / 2e-4) == pytest.approx(float(gradient[i]), rel=1e-5, abs=1e-7 * scale)
    assert (gradient >= 0).all()


def test_whole_widths_and_none_are_the_same() -> None:
    model, inputs = build(known(MODELS)[0])
    costs = CostModel.of(model, inputs)
    assert costs({}) == costs(costs.widths) == pw.measure(model, inputs)


def test_tied_parameters_count_once_and_their_use_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    cost = pw.measure(model, torch.zeros(3, 4))
    assert (cost.params, cost.macs) == (16, 2 * 3 * 16)


def test_frozen_and_unused_parameters_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model.spare = nn.Parameter(torch.zeros(7))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    assert pw.measure(model, torch.zeros(1, 4)).params == 27
