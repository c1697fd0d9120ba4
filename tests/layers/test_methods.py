"""Pruning methods: exact counts, and what they choose, against slow definitions."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import prunewise as pw
from prunewise.layers import methods
from prunewise.layers.methods import asked_by, find_method
from prunewise.layers.sparsegpt import reconstruct
from prunewise.layers.sparsify import Masks
from prunewise.layers.weights import find_layers
from tests.oracle.sparsegpt import sparsegpt

MODULES = {
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (5, 4, 4, 4)),
    "grouped": (lambda: nn.Conv1d(8, 4, 2, groups=2), (5, 8, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 6, 2, groups=2), (5, 8, 3)),
}


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.mark.parametrize("method", [*methods.METHODS, prune.L1Unstructured, prune.RandomUnstructured])
@pytest.mark.parametrize("what", MODULES)
@given(ties=st.booleans(), share=st.floats(0, 1))
def test_counts_are_exact(what: str, method: Any, ties: bool, share: float) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[what]
    module = make()
    if ties:
        nn.init.constant_(module.weight, 0.5)
    layers = find_layers(module)
    keep = round(share * layers[0].size)
    mask, updated = Masks(module, layers, method, [torch.randn(shape)], loss).choose({"": keep})[""]
    assert mask.shape == module.weight.shape and mask.dtype == torch.bool
    assert int(mask.sum()) == keep
    assert (updated is not None) == (method == "sparsegpt" and 0 < keep < layers[0].size)


def choose(module: nn.Module, method: Any, keep: int, data: Any = None) -> Tensor:
    return Masks(module, find_layers(module), method, data, loss).choose({"": keep})[""][0]


def after_a_first_round(method: Any, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a second round keeps of a layer whose smallest weights went in a first one; what lives, and the gradient."""
    torch.manual_seed(0)
    module, x = nn.Linear(12, 10), torch.randn(20, 12)
    pw.sparsify_(module, pw.SparsityPlan({"": 90}, {"": (10, 12)}))
    alive = module.weight_mask.bool()
    loss(module, x).backward()
    return choose(module, method, keep, [x]), alive, module.weight_orig.grad


@pytest.mark.parametrize("method", ["magnitude", "taylor", "movement", "random", "channel_l1", "wanda"])
def test_a_second_round_ranks_what_is_left_by_the_same_rule(method: str) -> None:
    torch.manual_seed(0)
    weight = nn.Linear(12, 10).weight.detach()
    mask, alive, gradient = after_a_first_round(method, 50)
    assert int(mask.sum()) == 50 and not (mask & ~alive).any()
    if method in ("magnitude", "taylor", "movement"):
        product = weight * gradient
        score = {"magnitude": weight.abs(), "taylor": product.abs(), "movement": -product}[method]
        assert score[mask].min() >= score[alive & ~mask].max()
    elif method == "random":
        assert float(weight.abs()[mask].mean()) == pytest.approx(float(weight.abs()[alive].mean()), rel=0.1)
        assert torch.equal(mask, after_a_first_round(method, 50)[0])
    elif method == "channel_l1":
        whole = [bool((m == a).all()) for m, a in zip(mask, alive, strict=True)]
        assert sum(whole) + sum(not m.any() for m in mask) >= 9
    else:
        assert mask.sum(1).tolist() == [5] * 10


def test_wanda_takes_all_of_an_output_that_has_little_left() -> None:
    module, x = nn.Linear(6, 3), torch.ones(2, 6)
    alive = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    prune.custom_from_mask(module, "weight", alive)
    assert choose(module, "wanda", 8, [x]).sum(1).tolist() in ([1, 4, 3], [1, 3, 4])
    assert choose(module, "wanda", 2, [x]).sum() == 2 and choose(module, "wanda", 11, [x]).sum(1).tolist() == [1, 5, 5]


def test_a_pattern_prefers_a_living_zero() -> None:
    module = nn.Linear(4, 1)
    prune.custom_from_mask(module, "weight", torch.tensor([[0.0, 0, 1, 1]]))
    with torch.no_grad():
        module.weight_orig[:] = 0
    assert choose(module, "2:4", 2).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("cls", [prune.CustomFromMask, prune.LnStructured, prune.Identity])
def test_classes_that_need_more_than_an_amount_are_named(cls: Any) -> None:
    with pytest.raises(pw.MethodError, match=rf"{cls.__name__} cannot be made with amount= alone: give partial"):
        choose(nn.Linear(4, 4), cls, 8)


def test_channel_l1_keeps_whole_filters() -> None:
    module = nn.ConvTranspose1d(3, 4, 2)  # filters lie along dimension 1
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0])[None, :, None].expand(3, 4, 2))
        module.weight[1, 2, 0] = 2.5
    mask = choose(module, "channel_l1", 13)
    assert mask.sum((0, 2)).tolist() == [0, 6, 1, 6]
    assert mask[1, 2, 0]


@pytest.mark.parametrize("keep", [6, 20, 22])
def test_wanda_row_by_row(keep: int) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(8, 4).double(), torch.randn(30, 8).double() * torch.arange(1, 9)
    mask = choose(module, "wanda", keep, [x[:7], x[7:]])
    scores = np.abs(module.weight.detach().numpy()) * np.linalg.norm(x.numpy(), axis=0)
    for row in range(4):
        kept = np.flatnonzero(mask[row])
        assert len(kept) in (keep // 4, keep // 4 + 1)
        assert set(kept) == set(np.argsort(-scores[row])[: len(kept)])
    extra = [np.sort(scores[r])[::-1][keep // 4] for r in range(4)]  # the next score of each row
    best = np.argsort(extra)[::-1][: keep % 4]
    assert {r for r in range(4) if int(mask[r].sum()) > keep // 4} == set(best.tolist())


def test_taylor_and_movement() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(5, 4).double(), torch.randn(9, 5).double()
    reference = nn.Linear(5, 4).double()
    reference.load_state_dict(module.state_dict())
    loss(reference, x).backward()
    product = (reference.weight * reference.weight.grad).detach().numpy().reshape(-1)
    for method, scores in (("taylor", np.abs(product)), ("movement", -product)):
        mask = choose(module, method, 7, [x])
        assert set(mask.flatten().nonzero().flatten().tolist()) == set(np.argsort(-scores)[:7].tolist())


@pytest.mark.parametrize("block", [3, 4, 128])
def test_sparsegpt_against_inverses_for_every_column(block: int) -> None:
    rng = np.random.default_rng(0)
    weight, inputs = rng.normal(size=(5, 10)), rng.normal(size=(40, 10)) @ rng.normal(size=(10, 10))
    mask, updated = reconstruct(
        torch.from_numpy(weight)[None], torch.from_numpy(inputs.T @ inputs)[None], 23, block=block, damping=0.01
    )
    keeps = [int(mask[0, :, s : s + block].sum()) for s in range(0, 10, block)]
    assert sum(keeps) == 23
    assert all(abs(k - 23 / 50 * 5 * min(block, 10 - i * block)) <= 1 for i, k in enumerate(keeps))
    expected_mask, expected = sparsegpt(weight, inputs, keeps, block, 0.01)
    assert (mask[0].numpy() == expected_mask).all()
    np.testing.assert_allclose(updated[0].numpy(), expected, rtol=1e-7, atol=1e-10)


def test_sparsegpt_keeps_the_output_better_than_wanda_and_magnitude() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 16) @ torch.randn(16, 64) + 0.3 * torch.randn(400, 64)  # inputs that say much of each other
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        torch.manual_seed(1)
        module = nn.Linear(64, 32).requires_grad_(False)
        before = module(x)
        pw.sparsify_(module, pw.allocate(module, 0.5, "uniform"), method, data=[x], progress=False)
        errors[method] = float((module(x) - before).square().mean())
    assert errors["sparsegpt"] < 0.5 * min(errors["wanda"], errors["magnitude"])


def test_sparsegpt_with_inputs_that_are_always_zero() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(6, 4), torch.randn(20, 6)
    x[:, [1, 4]] = 0
    mask, updated = Masks(module, find_layers(module), "sparsegpt", [x]).choose({"": 20})[""]
    assert updated is not None and torch.isfinite(updated).all()
    kept = mask[:, [1, 4]]
    assert int(kept.sum()) == 4  # all that feeds from live inputs stays
    assert torch.equal(updated[:, [1, 4]][kept], module.weight[:, [1, 4]].detach()[kept])
    everywhere = Masks(module, find_layers(module), "sparsegpt", [x * 0]).choose({"": 20})[""]
    assert int(everywhere[0].sum()) == 20


@pytest.mark.parametrize("module", [nn.Linear(8, 3), nn.Conv2d(4, 3, 3), nn.ConvTranspose1d(8, 3, 2)])
def test_two_of_four_along_the_input_channels(module: nn.Module) -> None:
    (layer,) = find_layers(module)
    mask = choose(module, "2:4", layer.size // 2)
    along = layer.weight.movedim(layer.input_dim, -1).reshape(-1, 4)
    for values, kept in zip(along, mask.movedim(layer.input_dim, -1).reshape(-1, 4), strict=True):
        assert int(kept.sum()) == 2
        assert values[kept].abs().min() >= values[~kept].abs().max()


def test_patterns_that_cannot_be() -> None:
    with pytest.raises(pw.MethodError, match="multiples of 4, and '' has 6: leave it out"):
        choose(nn.Linear(6, 4), "2:4", 12)
    with pytest.raises(pw.MethodError, match="2:4 keeps 16 of the 32 weights of '', and the plan 17"):
        choose(nn.Linear(8, 4), "2:4", 17)


def test_structured_classes_of_torch() -> None:
    module = nn.Linear(5, 4)
    method = partial(prune.LnStructured, n=1, dim=0)
    mask = choose(module, method, 15)
    weakest = int(module.weight.abs().sum(1).argmin())
    assert mask.all(1).tolist() == [i != weakest for i in range(4)] and not mask[weakest].any()
    with pytest.raises(pw.MethodError, match="whole channels of 5 weights of ''"):
        choose(module, method, 16)


def test_random_depends_on_seed_and_layer_only() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    layers = find_layers(model)
    one = Masks(model, layers, "random", seed=1).choose({"0": 40, "1": 40})
    torch.manual_seed(5)
    again = Masks(model, layers[1:], "random", seed=1).choose({"1": 40})
    assert torch.equal(one["1"][0], again["1"][0])
    assert not torch.equal(one["0"][0], one["1"][0])
    assert not torch.equal(Masks(model, layers, "random", seed=2).choose({"1": 40})["1"][0], one["1"][0])


def test_what_methods_ask_for() -> None:
    assert asked_by(partial(methods.sparsegpt, block=4)) == ("hessian", "layer")
    with pytest.raises(pw.MethodError, match="not for everything"):
        methods.asks("everything")
    for unknown in ("magic", "4:2", 3, None):
        with pytest.raises(pw.PlanError, match="unknown method"):
            find_method(unknown)  # type: ignore[arg-type]
