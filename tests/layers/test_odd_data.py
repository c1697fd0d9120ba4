"""Batches, outputs and losses of every kind; what is no use is said."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.core.batch import cross_entropy
from prunewise.layers import importance as imp
from prunewise.layers.weights import find_layers

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


class Named(nn.Module):
    """Takes x by name, and gives its outputs as one likes."""

    def __init__(self, give: Callable[[Tensor], Any] = lambda out: out) -> None:
        super().__init__()
        self.body, self.give = net(), give

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.body(x)
        if labels is not None:
            return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}
        return self.give(out)


class OwnDict(dict[str, Tensor]):
    pass


@pytest.mark.parametrize("kind", [dict, OwnDict, UserDict])
@pytest.mark.parametrize("importance", ["capacity", "taylor", "fisher", "loss_increase", "effective_rank"])
def test_any_mapping_is_a_batch(importance: str, kind: Any) -> None:
    batches = [kind(x=X[i : i + 5], labels=Y[i : i + 5]) for i in (0, 5, 10)]
    plan = pw.allocate(Named(), 0.5, importance, batches, progress=False)
    pairs = pw.allocate(net(), 0.5, importance, [(X[i : i + 5], Y[i : i + 5]) for i in (0, 5, 10)], progress=False)
    assert list(plan.keep.values()) == list(pairs.keep.values())


@dataclass
class Outputs:
    logits: Tensor
    hidden: list[Any]


@pytest.mark.parametrize("give", [lambda o: Outputs(o, [None]), lambda o: UserDict(a=o), lambda o: {"a": {"b": (o,)}}])
def test_outputs_in_any_container(give: Any) -> None:
    plan = pw.allocate(Named(give), 0.5, data=[X], progress=False)
    assert list(plan.keep.values()) == list(pw.allocate(net(), 0.5, data=[X], progress=False).keep.values())


def test_settings_beside_the_samples_do_not_count_as_samples() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.body(x * scale)
            return out

    plan = pw.allocate(Scaled(), 0.5, data=[{"scale": torch.ones(1), "x": X}], progress=False)
    assert list(plan.keep.values()) == list(pw.allocate(net(), 0.5, data=[X], progress=False).keep.values())


def test_batches_that_are_objects_are_refused() -> None:
    @dataclass
    class Batch:
        x: Tensor
        y: Tensor

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch.x), batch.y)

    for importance in ("fisher", "taylor"):
        with pytest.raises(pw.DataError, match="holds no tensor"):
            pw.allocate(net(), 0.5, importance, [Batch(X, Y)], loss=loss, progress=False)


def test_tables_beside_the_samples_do_not_count_as_samples() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[-1])

    layers = find_layers(model := net())
    tables = [(X, torch.zeros(9), torch.zeros(9), Y)]
    assert imp.fisher_mass(model, layers, tables, loss=loss) == imp.fisher_mass(model, layers, [(X, Y)], loss=loss)


def test_a_criterion_is_a_loss() -> None:
    model, layers = net(), find_layers(net())
    layers = find_layers(model)
    assert imp.fisher_mass(model, layers, [(X, Y)], loss=nn.CrossEntropyLoss()) == imp.fisher_mass(
        model, layers, [(X, Y)]
    )


def test_losses_of_half_precision_are_taken_in_single() -> None:
    model, batch = net(torch.bfloat16), (X.bfloat16(), Y)
    found = cross_entropy(model, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nn.functional.cross_entropy(model(batch[0]).float(), Y))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]).square(), r"one number and is \(\d+, 3\)"),
        (lambda m, b: 1.0, "one number and is float"),
        (lambda m, b: m(b[0]).mean().detach(), "depends on no weight"),
        (lambda m, b: m[0](b[0]).mean(), "loss never depends on '2'.*exclude='2'"),
    ],
)
@pytest.mark.parametrize("method", ["taylor", "movement", "fisher"])
def test_losses_that_are_no_use(method: str, loss: Any, message: str) -> None:
    model = net()
    with pytest.raises(pw.DataError, match=message):
        if method == "fisher":
            pw.allocate(model, 0.5, method, [(X, Y)], loss=loss, progress=False)
        else:
            pw.sparsify_(model, pw.allocate(model, 0.5, "erk"), method, data=[(X, Y)], loss=loss, progress=False)
    assert "0.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("importance", ["taylor", "fisher", "loss_increase"])
def test_targets_and_outputs_that_the_default_loss_cannot_take(importance: str) -> None:
    with pytest.raises(pw.DataError, match="tensors, or loss="):
        pw.allocate(net(), 0.5, importance, [(X, Y.tolist())], progress=False)
    with pytest.raises(pw.DataError, match="returns a Outputs and no tensor of logits: give loss="):
        pw.allocate(Named(lambda o: Outputs(o, [])), 0.5, importance, [(X, Y)], progress=False)
    with pytest.raises(pw.DataError, match=f"importance '{importance}' needs data, and all batches are empty"):
        pw.allocate(net(), 0.5, importance, [(X[:0], Y[:0])], progress=False)
    with pytest.raises(pw.DataError, match=f"importance '{importance}' needs data: give data="):
        pw.allocate(net(), 0.5, importance)


@pytest.mark.parametrize("importance", ["capacity", "taylor", "loss_increase", "owl"])
def test_batches_made_in_inference_mode(importance: str) -> None:
    expected = pw.allocate(net(), 0.5, importance, [(X, Y)], progress=False)
    with torch.inference_mode():
        batch = (X.clone(), Y.clone())
        assert pw.allocate(net_outside(), 0.5, importance, [batch], progress=False) == expected
    assert pw.allocate(net(), 0.5, importance, [batch], progress=False) == expected


def net_outside() -> nn.Module:
    with torch.inference_mode(False):
        return net()


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = net()
    with pytest.raises(pw.PlanError, match="'0' was made under torch.inference_mode"):
        pw.allocate(model, 0.5, "loss_increase", [(X, Y)], progress=False)


def test_masks_made_in_inference_mode_can_be_trained_with() -> None:
    model = net()
    with torch.inference_mode():
        pw.sparsify_(model, pw.allocate(model, 0.5, "erk"), "random")
    nn.functional.cross_entropy(model(X), Y).backward()
    assert all(p.grad is not None for p in model.parameters())


def agreement(model: nn.Module, wanted: Tensor) -> float:
    return float((model(X).argmax(1) == wanted).double().mean())


def test_autocast_does_not_hide_what_was_removed() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight *= 20
    accuracies: dict[bool, Any] = {}
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found = pw.compactness(model, model(X).argmax(1), evaluate=agreement, progress=False)
            rises = imp.loss_increase(model, find_layers(model), [(X, Y)])
        accuracies[on] = [row.density for row in found.layers]
        assert all(rises.values()) and min(accuracies[on]) > 0.02
    assert accuracies[True] == pytest.approx(accuracies[False], rel=0.5)


@pytest.mark.parametrize("importance", ["capacity", "taylor", "fisher", "loss_increase", "owl"])
def test_models_under_masks_are_left_as_they_were(importance: str) -> None:
    model = net()
    pw.sparsify_(model, pw.allocate(model, 0.5, "erk"))
    before = {layer.name: layer.module.weight.clone() for layer in find_layers(model)}
    pw.allocate(model, 0.7, importance, [(X, Y)], progress=False)
    copied = copy.deepcopy(model)
    for layer in find_layers(copied):
        assert torch.equal(layer.module.weight, before[layer.name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": ["erk"]}, "unknown importance"),
        ({"importance": lambda m, layers: None}, "gave a NoneType"),
        ({"importance": lambda m, layers: {"0": "much", "2": 1}}, "'0' should be a number, and is 'much'"),
        ({"importance": lambda m, layers: {"0": 1j, "2": 1}}, "'0' should be a number"),
        ({"importance": lambda m, layers: {"0": torch.ones(2), "2": 1}}, "'0' should be a number"),
        ({"importance": "erk", "floor": "0.1"}, "floor='0.1'"),
    ],
)
def test_settings_of_other_types(settings: Any, message: str) -> None:
    with pytest.raises(pw.PrunewiseError, match=message):
        pw.allocate(net(), 0.5, **settings)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    import numpy as np

    plan = pw.allocate(net(), np.float16(0.5), lambda m, layers: {"0": torch.tensor(2.0), "2": np.float32(1)})
    assert plan.keep == pw.allocate(net(), 0.5, lambda m, layers: {"0": 2, "2": 1}).keep
    big = nn.Linear(1, 50_001, bias=False)
    assert pw.allocate(big, np.float16(0.5), "uniform").kept == 25_001
