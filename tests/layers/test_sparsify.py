"""Masks in force: through training, files, ties; and nothing changed where something is wrong."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import prunewise as pw
from prunewise.layers.methods import METHODS


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def data() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 2, 4, 4, generator=rng), torch.randint(3, (6,), generator=rng)) for _ in range(3)]


def counts(model: nn.Module) -> dict[str, int]:
    return {n: int((m.weight != 0).sum()) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_keeps_what_the_plan_says(method: str) -> None:
    model = net()
    plan = pw.allocate(model, 0.7, "erk")
    assert pw.sparsify_(model, plan, method, data=data(), progress=False) is model
    assert counts(model) == dict(plan.keep)
    model(data()[0][0])
    assert counts(model) == dict(plan.keep)
    for name in plan:
        assert prune.is_pruned(model.get_submodule(name))


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_masks_stay_in_force_under_momentum_and_decay(optimizer_first: bool) -> None:
    model = net()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    optimizer = torch.optim.SGD(model.parameters(), **options)

    def train() -> None:
        for x, y in data() * 3:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    if optimizer_first:
        train()  # momentum of weights that will be removed
    plan = pw.allocate(model, 0.7, "erk")
    pw.sparsify_(model, plan)
    masks = {n: model.get_submodule(n).weight_mask.clone() for n in plan}
    if not optimizer_first:
        optimizer = torch.optim.SGD(model.parameters(), **options)
    before = model[4].weight.clone()
    train()
    out = model.eval()(data()[0][0])
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[mask == 0].any()
    assert not torch.equal(before, model[4].weight)
    pw.make_permanent_(model)
    assert counts(model) == dict(plan.keep)
    assert sorted(model.state_dict()) == sorted(net().state_dict())
    assert isinstance(model[4].weight, nn.Parameter)
    torch.testing.assert_close(model(data()[0][0]), out)


def test_state_dicts_survive_files(tmp_path: Path) -> None:
    model = pw.sparsify_(net(), pw.allocate(net(), 0.7, "erk")).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    again = pw.attach_masks_(net(), state)
    again.load_state_dict(state)
    x = data()[0][0]
    assert torch.equal(again.eval()(x), model(x))
    assert counts(again) == counts(model)
    pw.make_permanent_(model)
    plain = net()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(x), model(x))
    with pytest.raises(pw.PlanError, match=r"'0.weight_mask' is a mask of shape \(6, 2, 3, 3\)"):
        pw.attach_masks_(nn.Sequential(nn.Linear(2, 2)), state)


def test_a_sparse_model_can_be_copied_and_pickled() -> None:
    model = pw.sparsify_(net(), pw.allocate(net(), 0.7, "erk")).eval()
    x = data()[0][0]
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    with torch.no_grad():
        model(x)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_tied_weights_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b, self.head = (
                nn.Embedding(7, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 7),
            )
            self.b.weight, self.head.weight = self.a.weight, self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.embed(x))))

    model = Tied()
    pw.sparsify_(model, pw.allocate(model, 0.5, "erk"))
    ids = torch.arange(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        nn.functional.cross_entropy(model(ids), ids).backward()
        optimizer.step()
        model(ids)
        assert torch.equal(model.a.weight, model.b.weight) and torch.equal(model.embed.weight, model.head.weight)
        assert int((model.a.weight != 0).sum()) + int((model.head.weight != 0).sum()) == 22
    pw.make_permanent_(model)
    assert model.a.weight is model.b.weight and model.embed.weight is model.head.weight


def test_a_tie_of_any_name_has_the_mask_and_loses_it() -> None:
    class Kernel(nn.Module):
        def __init__(self, encoder: nn.Linear) -> None:
            super().__init__()
            self.kernel = encoder.weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel

    encoder = nn.Linear(8, 8)
    model = nn.Sequential(encoder, Kernel(encoder))
    plan = pw.SparsityPlan({"0": 8}, {"0": (8, 8)})
    pw.sparsify_(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    model(torch.randn(3, 8))
    assert torch.equal(model[1].kernel, encoder.weight) and int((encoder.weight != 0).sum()) == 8
    prune.custom_from_mask(encoder, "bias", torch.ones(8))
    model.append(prune.l1_unstructured(nn.LayerNorm(8), "weight", amount=2))
    pw.make_permanent_(model)
    assert model[1].kernel is encoder.weight and int((encoder.weight != 0).sum()) == 8
    assert [n for n, _ in model.named_buffers()] == ["0.bias_mask", "2.weight_mask"]  # biases and norms do not count


def test_masks_that_cannot_be_gone_on_from() -> None:
    plan = pw.SparsityPlan({"0": 3}, {"0": (4, 4)})
    soft = nn.Sequential(nn.Linear(4, 4))
    prune.custom_from_mask(soft[0], "weight", torch.full((4, 4), 0.5))
    own = nn.Sequential(nn.Linear(4, 4))
    own[0].register_buffer("weight_mask", torch.ones(4, 4))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    prune.custom_from_mask(tied[1], "weight", torch.eye(4))
    listed = nn.Sequential(nn.Linear(4, 4), nn.ParameterList())
    listed[1].append(listed[0].weight)
    for model, message in (
        (listed, "'0' shares its weight with '1.0', where no mask can stand"),
        (soft, "'0' has values other than 0 and 1"),
        (own, "'0' has a weight_mask of its own"),
        (tied, "'0' and '1' share a weight, with different masks"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(pw.PlanError, match=message):
            pw.sparsify_(model, plan)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    pw.make_permanent_(own)  # no mask of ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_left_is_counted_exactly(dtype: torch.dtype) -> None:
    model = nn.Linear(300, 300).to(dtype)
    shapes = {"": (300, 300)}
    pw.sparsify_(model, pw.SparsityPlan({"": 70_001}, shapes))
    with pytest.raises(pw.PlanError, match="has 70001 weights left"):
        pw.sparsify_(model, pw.SparsityPlan({"": 70_002}, shapes))
    pw.sparsify_(model, pw.SparsityPlan({"": 60_001}, shapes))
    assert int(torch.count_nonzero(model.weight_mask)) == 60_001


def test_plans_of_other_types() -> None:
    for plan, message in (
        ({"0": 0.5}, "should be a SparsityPlan, as allocate makes it, and is a dict"),
        (pw.SparsityPlan({"0": 2.5}, {"0": (6, 2, 3, 3)}), "keeps 2.5 of the 108"),  # type: ignore[dict-item]
    ):
        with pytest.raises(pw.PlanError, match=message):
            pw.sparsify_(net(), plan)  # type: ignore[arg-type]
    assert counts(pw.sparsify_(net(), pw.SparsityPlan({"0": np.int64(9)}, {"0": (6, 2, 3, 3)})))["0"] == 9


def test_masks_of_biases_and_of_shared_modules_are_attached() -> None:
    def shared() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = shared()
    pw.sparsify_(model, pw.allocate(model, 0.5, "erk"))
    prune.custom_from_mask(model[0], "bias", torch.tensor([1.0, 0, 1, 0]))
    again = pw.attach_masks_(shared(), model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_frozen_layers_stay_frozen() -> None:
    model = net().requires_grad_(False)
    pw.sparsify_(model, pw.allocate(model, 0.5, "erk"), "taylor", data=data(), progress=False)
    assert not any(p.requires_grad for p in pw.make_permanent_(model).parameters())


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "channel_l1", "taylor"])
def test_sparser_and_sparser(method: str) -> None:
    model = net()
    gone: dict[str, Tensor] = {}
    for sparsity in (0.3, 0.6, 0.9):
        plan = pw.allocate(model, sparsity, "erk")
        pw.sparsify_(model, plan, method, data=data(), seed=int(sparsity * 10), progress=False)
        assert counts(model) == dict(plan.keep)
        for name in plan:
            mask = model.get_submodule(name).weight_mask == 0
            assert mask[gone.get(name, mask)].all()  # nothing comes back
            gone[name] = mask
    with pytest.raises(pw.PlanError, match="weights left under the mask in force"):
        pw.sparsify_(model, pw.allocate(model, 0.5, "erk"), method, data=data(), progress=False)


def test_patterns_and_reconstruction_start_from_a_dense_layer() -> None:
    model = nn.Linear(8, 8)
    pw.sparsify_(model, pw.SparsityPlan({"": 40}, {"": (8, 8)}))
    with torch.no_grad():
        model.weight_mask[0] = 0
        model.weight_mask[0, 0] = 1
        model.weight_mask[1:4] = 1
    plan = pw.SparsityPlan({"": 32}, {"": (8, 8)})
    with pytest.raises(pw.MethodError, match="cannot go on from the mask in force on ''"):
        pw.sparsify_(model, plan, "2:4")
    pw.sparsify_(pw.make_permanent_(model), plan, "2:4")


class Wrong:
    """Methods that do what they must not."""

    @staticmethod
    def count(weight: Tensor, keep: int) -> Tensor:
        return torch.ones_like(weight)

    @staticmethod
    def shape(weight: Tensor, keep: int) -> Tensor:
        return torch.ones(keep)

    @staticmethod
    def kind(weight: Tensor, keep: int) -> Any:
        return [True] * keep

    @staticmethod
    def values(weight: Tensor, keep: int) -> Tensor:
        return weight.abs()

    @staticmethod
    def weights(weight: Tensor, keep: int) -> Any:
        return METHODS["magnitude"](weight, keep), weight * math.nan

    @staticmethod
    def update(weight: Tensor, keep: int) -> Any:
        return METHODS["magnitude"](weight, keep), weight[0]

    @staticmethod
    def edits(weight: Tensor, keep: int) -> Tensor:
        weight.zero_()
        raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"method": Wrong.count}, pw.MethodError, "keeps 108 weights of '0' and was asked for"),
        ({"method": Wrong.shape}, pw.MethodError, r"for '0': it should return a keep mask of shape \(6, 2, 3, 3\)"),
        ({"method": Wrong.kind}, pw.MethodError, "gave list for '0'"),
        ({"method": Wrong.values}, pw.MethodError, "other than 0 and 1 for '0'"),
        ({"method": Wrong.weights}, pw.NonFiniteError, "weights for '0' that are not finite"),
        ({"method": Wrong.update}, pw.MethodError, "weights of another shape"),
        ({"method": Wrong.edits}, RuntimeError, "mine"),
        ({"method": "magic"}, pw.PlanError, "unknown method 'magic'"),
        ({"method": "2:4"}, pw.MethodError, "'0' has 2"),
        ({"method": "wanda"}, pw.DataError, "method 'wanda' needs data"),
        ({"method": "taylor"}, pw.DataError, "method 'taylor' needs data"),
        ({"method": "sparsegpt", "data": []}, pw.DataError, "loader is empty"),
        (
            {"method": "sparsegpt", "data": [torch.full((2, 2, 4, 4), math.nan)]},
            pw.NonFiniteError,
            "activations of '0'",
        ),
        ({"plan": pw.SparsityPlan({"x": 3}, {"x": (3, 3)})}, pw.PlanError, "layer 'x' that the model does not have"),
        ({"plan": pw.SparsityPlan({"0": 3, "x": 3}, {"0": (6, 2, 3, 3), "x": (3, 3)})}, pw.PlanError, "layer 'x'"),
        ({"plan": pw.SparsityPlan({"4": 3}, {"4": (3, 3)})}, pw.PlanError, r"'4' has shape \(8, 24\)"),
    ],
)
def test_what_is_wrong_changes_nothing(setting: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    plan = setting.pop("plan", None) or pw.allocate(model, 0.5, "erk")
    with pytest.raises(error, match=message):
        pw.sparsify_(model, plan, progress=False, **setting)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nan_weights_are_refused() -> None:
    model = net()
    plan = pw.allocate(model, 0.5, "erk")
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    with pytest.raises(pw.NonFiniteError, match="weight of '4'"):
        pw.sparsify_(model, plan)
    assert "4.weight_mask" not in model.state_dict()


def test_layers_outside_the_plan_are_left_alone() -> None:
    model = net()
    plan = pw.allocate(model, 0.5, "erk", exclude="0")
    pw.sparsify_(model, plan)
    assert counts(model)["0"] == 108 and not prune.is_pruned(model[0])


def test_nothing_and_everything_removed() -> None:
    model = pw.sparsify_(net(), pw.allocate(net(), 0.0, "erk"))
    assert counts(model) == {"0": 108, "4": 192, "6": 24}
    model = pw.sparsify_(net(), pw.allocate(net(), 0.9999999, "erk"))
    assert sum(counts(model).values()) == 1
    assert torch.isfinite(model(data()[0][0])).all()


def test_a_stream_without_a_length_is_data_too() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            yield from torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    model = net()
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    plan = pw.allocate(model, 0.5, data=loader, progress=False)
    pw.sparsify_(model, plan, "wanda", data=loader, progress=False)
    assert counts(model) == dict(plan.keep)
