"""The slips that are easiest to make, at every entrance: an error of ours that names the remedy, and nothing done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import prunewise as pw

X = torch.zeros(2, 4)
BATCHES = [(torch.randn(8, 4), torch.arange(8) % 2)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda b: pw.plan_channels(net(), X, budget=b),
        lambda b: pw.attach_gates(net(), X, budget=b, total_steps=3),
        lambda b: pw.allocate_channels(net(), X, budget=b, importance="erk"),
        lambda b: pw.compress(net(), BATCHES, budget=b, epochs=1, progress=False),
    ],
)
def test_a_number_for_a_budget(call: Callable[[Any], Any]) -> None:
    with pytest.raises(pw.BudgetError, match=r"budget=0.5 should be a Budget, for example Budget\(macs=0.5\)"):
        call(0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: pw.measure(m, X),
        lambda m: pw.channel_groups(m, X),
        lambda m: pw.plan_channels(m, X, budget=pw.Budget(macs=0.5)),
        lambda m: pw.attach_gates(m, X, budget=pw.Budget(macs=0.5), total_steps=3),
        lambda m: pw.compress(m, BATCHES, budget=pw.Budget(macs=0.5), epochs=1, progress=False),
        lambda m: pw.allocate(m, 0.5, "erk"),
        lambda m: pw.compactness(m, BATCHES, evaluate=lambda model, data: 1.0),
    ],
)
def test_a_path_for_a_model(call: Callable[[Any], Any]) -> None:
    with pytest.raises(pw.PlanError, match=r"should be an nn.Module, and is a str"):
        call("model.pt")


def test_a_model_for_a_factory(tmp_path: Path) -> None:
    model = net()
    plan = pw.plan_channels(model, X, budget=pw.Budget(macs=0.5))
    pw.save_pruned(tmp_path / "small", pw.apply_plan(model, plan, X), plan)
    pw.save_sparse(tmp_path / "sparse", model)
    for load in (
        lambda f: pw.load_pruned(tmp_path / "small", f),
        lambda f: pw.load_sparse(tmp_path / "sparse", f),
    ):
        for factory in (model, "net"):
            with pytest.raises(pw.CheckpointError, match=r"the factory is a (Sequential|str): give a function without"):
                load(factory)


@pytest.mark.parametrize("data", [TensorDataset(*BATCHES[0]), BATCHES[0][0], 5])
@pytest.mark.parametrize("importance", ["capacity", "fisher", "owl", "loss_increase"])
def test_samples_for_batches(importance: str, data: Any) -> None:
    with pytest.raises(
        pw.DataError, match=r"needs batches, and data is a \w+: give a DataLoader, or a list of batches"
    ):
        pw.allocate(net(), 0.5, importance, data)


def test_a_method_that_needs_data_names_methods_that_do_not() -> None:
    with pytest.raises(pw.DataError, match=r"method 'wanda' needs data.*\(magnitude, random, ...\)"):
        pw.sparsify_(net(), pw.allocate(net(), 0.5, "erk"), "wanda")


def test_gates_that_are_hardened_too_early_say_so() -> None:
    gates = pw.attach_gates(net(), X, budget=pw.Budget(macs=0.5), total_steps=300)
    with pytest.warns(UserWarning, match="hardened after 0 of total_steps=300 steps, above the budget") as caught:
        gates.finish()
    assert caught[0].filename == __file__


def test_a_budget_shows_what_was_given() -> None:
    assert (
        repr(pw.Budget(macs=0.5, latency_ms="2 ms", device="cpu"))
        == "Budget(macs=0.5, latency_ms='2 ms', device='cpu')"
    )
