"""Importances of layers against their definitions, written out slowly."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.layers import importance as imp
from prunewise.layers.masks import top, with_weights
from prunewise.layers.weights import find_layers


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()  # fmt: skip


def batches(size: int = 4) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 2, 4, 4, generator=rng).double(), torch.randint(3, (12,), generator=rng)
    return list(zip(x.split(size), y.split(size), strict=True))


def random_covariance(rank: int, n: int = 6) -> np.ndarray:
    a = np.random.default_rng(rank).normal(size=(n, rank))
    return a @ a.T


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_effective_rank_and_rate(rank: int) -> None:
    covariance = random_covariance(rank)
    values = np.maximum(np.linalg.eigvalsh(covariance), 0)
    share = values[values > 1e-10] / values.sum()
    tensor = torch.from_numpy(covariance)
    assert imp.effective_rank(tensor) == pytest.approx(math.exp(-sum(s * math.log(s) for s in share)), rel=1e-9)
    assert 1 - 1e-12 <= imp.effective_rank(tensor) <= rank + 1e-9
    by_det = 0.5 * np.linalg.slogdet(np.eye(6) + 6 * covariance / (0.25 * np.trace(covariance)))[1] / math.log(2)
    assert imp.coding_rate(tensor) == pytest.approx(by_det, rel=1e-9)
    for measure in (imp.effective_rank, imp.coding_rate):
        assert measure(tensor * 1e6) == pytest.approx(measure(tensor), rel=1e-9)
        assert measure(torch.zeros(4, 4)) == 0


def test_white_activations_give_erdos_renyi() -> None:
    (layer,) = find_layers(nn.Conv2d(6, 10, 3))
    assert imp.per_weight(6, 10, layer) == pytest.approx((6 + 10 + 3 + 3) / 540)
    (layer,) = find_layers(nn.Linear(6, 10))
    assert imp.per_weight(6, 10, layer) == pytest.approx(16 / 60)


def test_stable_rank_and_freedom() -> None:
    matrix = np.random.default_rng(0).normal(size=(2, 5, 3))
    expected = sum((s**2).sum() / s[0] ** 2 for s in (np.linalg.svd(m, compute_uv=False) for m in matrix))
    assert imp.stable_rank(torch.from_numpy(matrix)) == pytest.approx(expected, rel=1e-9)
    assert imp.stable_rank(torch.from_numpy(matrix) * 1e-12) == pytest.approx(expected, rel=1e-9)
    assert imp.stable_rank(torch.zeros(1, 3, 3)) == 0
    (layer,) = find_layers(nn.Linear(6, 4))
    assert imp.freedom(4, layer) == pytest.approx(1)  # a matrix of full rank is free in all its weights
    assert imp.freedom(1, layer) == pytest.approx(9 / 24)


def test_tail_exponent() -> None:
    matrix = np.random.default_rng(0).normal(size=(9, 20))
    values = np.sort(np.linalg.svd(matrix, compute_uv=False) ** 2)[::-1]
    k = 4
    expected = 1 + k / sum(math.log(values[i] / values[k]) for i in range(k))
    assert imp.tail_exponent(torch.from_numpy(matrix)) == pytest.approx(expected, rel=1e-9)
    heavy = matrix * np.exp(np.linspace(0, 4, 9))[:, None]
    assert imp.tail_exponent(torch.from_numpy(heavy)) < expected
    for undefined in (torch.zeros(9, 9), torch.eye(9), torch.randn(2, 50)):
        assert math.isnan(imp.tail_exponent(undefined))


def test_outlier_ratio() -> None:
    rng = np.random.default_rng(0)
    matrix, squares = rng.normal(size=(2, 3, 4)) ** 3, rng.random((2, 4))
    scores = [abs(matrix[g, i, j]) * math.sqrt(squares[g, j]) for g in range(2) for i in range(3) for j in range(4)]
    expected = sum(s > 2 * sum(scores) / 24 for s in scores) / 24
    got = imp.outlier_ratio(torch.from_numpy(matrix), torch.from_numpy(squares), factor=2)
    assert 0 < expected < 1 and got == pytest.approx(expected)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_gradients_do_not_depend_on_batches(size: int) -> None:
    model = net()
    layers = find_layers(model)
    ((x, y),) = batches(12)
    nn.functional.cross_entropy(copy.deepcopy(model).eval()(x), y)  # the same mode as inside
    reference = copy.deepcopy(model).eval()
    nn.functional.cross_entropy(reference(x), y).backward()
    found = imp.mean_gradients(model, layers, batches(size))
    masses = imp.fisher_mass(model, layers, batches(size))
    for layer in layers:
        expected = reference.get_submodule(layer.name).weight.grad
        torch.testing.assert_close(found[layer.name], expected, rtol=1e-9, atol=1e-14)
    mass = dict.fromkeys(masses, 0.0)
    for i in range(12):
        reference.zero_grad()
        nn.functional.cross_entropy(reference(x[i : i + 1]), y[i : i + 1]).backward()
        for name in mass:
            weight = reference.get_submodule(name).weight
            mass[name] += float((weight.grad * weight.detach()).square().sum()) / 24
    assert masses == pytest.approx(mass, rel=1e-9)


def test_taylor_mass() -> None:
    weight, gradient = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[2.0, 1.0], [5.0, -1.0]])
    assert imp.taylor_mass(gradient, weight) == 7


@pytest.mark.parametrize("size", [3, 12])
def test_loss_increase_by_removing_half(size: int) -> None:
    model = net().eval()
    before = copy.deepcopy(model.state_dict())
    found = imp.loss_increase(model, find_layers(model), batches(size))
    ((x, y),) = batches(12)
    for name, rise in found.items():
        other = copy.deepcopy(model)
        weight = other.get_submodule(name).weight
        with torch.no_grad():
            weight[weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() // 2).values] = 0
            expected = nn.functional.cross_entropy(other(x), y) - nn.functional.cross_entropy(model(x), y)
        assert rise == pytest.approx(max(0.0, float(expected)), rel=1e-9, abs=1e-12)
    assert any(found.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_gradients_leave_the_model_as_it_was() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        imp.mean_gradients(model, find_layers(model), batches())
        imp.fisher_mass(model, find_layers(model), batches())
    assert not model[0].weight.requires_grad and model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_losses_are_named() -> None:
    model = net()
    with pytest.raises(pw.NonFiniteError, match="gradient of '0'"):
        imp.mean_gradients(model, find_layers(model), [(x * math.nan, y) for x, y in batches()])
    with pytest.raises(pw.NonFiniteError, match="loss is not finite"):
        imp.loss_increase(model, find_layers(model), [(x * math.nan, y) for x, y in batches()])
    with pytest.raises(pw.DataError, match="targets"):
        imp.mean_gradients(model, find_layers(model), [x for x, _ in batches()])


def test_weights_come_back_after_an_error() -> None:
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), with_weights([(find_layers(model)[0], torch.zeros(3, 3))]):
        assert not model.weight.any()
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_top_is_exact_under_ties(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, -torch.inf]], dtype=dtype)
    order = [0, 2, 3, 4, 1, 5]
    for keep in range(7):
        assert top(scores, keep).flatten().nonzero().flatten().tolist() == sorted(order[:keep])
