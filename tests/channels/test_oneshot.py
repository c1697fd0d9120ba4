"""One-shot plans and the importances they rank by."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.channels import importance as imp
from prunewise.channels.oneshot import rank_share


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))


X = torch.zeros(2, 3, 6, 6, dtype=torch.float64)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    nn.init.uniform_(model.bn.weight, -2, 2)
    return model


def batches(n: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.randint(0, 4, (5,))) for _ in range(n)]


def prunable(model: nn.Module) -> list[pw.ChannelGroup]:
    return [g for g in pw.channel_groups(model, X) if g.prunable]


def test_bn_scale(net: Net) -> None:
    scores = imp.bn_scale(net, prunable(net)[:1])
    np.testing.assert_allclose(scores["a"], net.bn.weight.detach().abs().numpy())
    with pytest.raises(pw.PlanError, match="'b' has no normalisation layer"):
        imp.bn_scale(net, prunable(net))


def test_taylor_is_the_squared_gradient_of_a_gate(net: Net) -> None:
    """Against a gate put on the activation itself."""
    net.eval()
    groups = prunable(net)
    want = {g.name: np.zeros(g.size) for g in groups}
    for x, y in batches():
        one, two = (torch.ones(n, 1, 1, dtype=torch.float64, requires_grad=True) for n in (8, 6))
        h = net.bn(net.a(x)).relu() * one
        h = net.b(h).relu() * two
        nn.functional.cross_entropy(net.fc(h.mean((2, 3))), y).backward()
        for name, g in (("a", one), ("b", two)):
            assert g.grad is not None
            want[name] += g.grad.flatten().numpy() ** 2 / 2
    got = imp.taylor(net, groups, data=batches())
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-8)


def test_taylor_leaves_the_model_as_it_was(net: Net) -> None:
    net.train()
    net.a.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    imp.taylor(net, prunable(net), data=batches())
    assert net.training
    assert not net.a.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_taylor_takes_any_loss_and_needs_data(net: Net) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().mean()

    plan = pw.plan_channels(net, X, budget=pw.Budget(macs=0.5), importance="taylor", data=batches(), loss=loss)
    assert plan.notes["allocation"] == "global"
    with pytest.raises(pw.PlanError, match="needs data"):
        pw.plan_channels(net, X, budget=pw.Budget(macs=0.5), importance="taylor")


def test_random_is_the_same_for_the_same_seed(net: Net) -> None:
    def plan(seed: int) -> dict[str, tuple[int, ...]]:
        return dict(pw.plan_channels(net, X, budget=pw.Budget(macs=0.5), importance="random", seed=seed).keep)

    assert plan(3) == plan(3)
    assert any(plan(3) != plan(s) for s in range(4, 8))


def test_magnitude_keeps_the_largest_filters() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 0.1, 5.0, 0.2, 4.0, 0.3])[:, None].expand(6, 4))
    plan = pw.plan_channels(model, torch.zeros(1, 4), budget=pw.Budget(macs=0.5))
    assert plan.keep["0"] == (0, 2, 4)


def test_scaling_a_layer_does_not_move_a_uniform_plan(net: Net) -> None:
    """Uniform allocation ranks within groups only: the same share of every group stays."""
    plan = pw.plan_channels(net, X, budget=pw.Budget(params=0.5))
    with torch.no_grad():
        net.a.weight.mul_(1000)
    assert pw.plan_channels(net, X, budget=pw.Budget(params=0.5)).keep == plan.keep
    shares = [len(plan.keep.get(g.name, range(g.size))) / g.size for g in prunable(net)]
    assert max(shares) - min(shares) <= 0.25


def test_a_callable(net: Net) -> None:
    def mine(model: nn.Module, groups: Any) -> dict[str, np.ndarray]:
        return {g.name: np.arange(g.size, dtype=float) for g in groups}

    plan = pw.plan_channels(net, X, budget=pw.Budget(macs=0.5), importance=mine)
    for name, keep in plan.keep.items():
        assert keep == tuple(range(plan.sizes[name]))[-len(keep) :]
    assert plan.notes["importance"] == "mine"


@pytest.mark.parametrize(
    "scores",
    [lambda m, g: {}, lambda m, g: {x.name: np.ones(x.size + 1) for x in g}, lambda m, g: {x.name: 1.0 for x in g}],
)
def test_scores_of_the_wrong_shape(net: Net, scores: Any) -> None:
    with pytest.raises(pw.PlanError, match="one score for each"):
        pw.plan_channels(net, X, budget=pw.Budget(macs=0.5), importance=scores)


def test_level_allocation_keeps_as_much_of_groups_of_one_size() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(5)], torch.nn.Linear(16, 3))
    x, budget = torch.zeros(1, 16), pw.Budget(macs=0.47)
    uniform = pw.plan_channels(model, x, budget=budget)
    level = pw.plan_channels(model, x, budget=budget, allocation="level")
    assert len({len(kept) for kept in uniform.keep.values()}) == 2, "filled up to the budget"
    assert {len(kept) for kept in level.keep.values()} == {min(len(kept) for kept in uniform.keep.values())}
    assert all(set(level.keep[name]) <= set(kept) for name, kept in uniform.keep.items())
    assert level.cost_after["macs"] == pw.measure(pw.apply_plan(model, level, x), x).macs


@pytest.mark.parametrize("setting", [{"importance": "magic"}, {"allocation": "magic"}])
def test_unknown_names(net: Net, setting: Any) -> None:
    with pytest.raises(pw.PlanError, match="magic"):
        pw.plan_channels(net, X, budget=pw.Budget(macs=0.5), **setting)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_weights_that_are_not_finite(net: Net, allocation: Any) -> None:
    with torch.no_grad():
        net.a.weight[2] = float("nan")
    with pytest.raises(pw.NonFiniteError, match="'a'"):
        pw.plan_channels(net, X, budget=pw.Budget(macs=0.5), allocation=allocation)


def test_the_model_is_not_changed(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    pw.plan_channels(net, X, budget=pw.Budget(macs=0.5))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_round_to(net: Net) -> None:
    plan = pw.plan_channels(net, X, budget=pw.Budget(macs=0.7), round_to=4)
    for group in prunable(net):
        n = len(plan.keep.get(group.name, range(group.size)))
        assert n % 4 == 0 or n == group.size


def test_rank_share() -> None:
    assert rank_share(np.array([5.0, -1.0, 7.0, 0.0])).tolist() == [0.625, 0.125, 0.875, 0.375]
    assert rank_share(np.zeros(2)).tolist() == [0.75, 0.25]  # ties: the lower index is worth more


@pytest.mark.parametrize("how", ["magnitude", "bn_scale", "gates"])
def test_weights_under_a_mask_count_as_they_act(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    nn.init.uniform_(model[1].weight, 0.5, 1)
    with torch.no_grad():
        model[0].weight[:4] *= 10
        model[1].weight[:4] *= 10
    masked = (1, "weight") if how == "bn_scale" else (0, "weight")
    mask = torch.ones_like(getattr(model[masked[0]], masked[1]))
    mask[:4] = 0
    nn.utils.prune.custom_from_mask(model[masked[0]], masked[1], mask)
    x, budget = torch.randn(2, 3, 8, 8), pw.Budget(macs=0.6)
    if how == "gates":
        gates = pw.attach_gates(model, x, budget=budget, total_steps=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(4):
            optimizer.zero_grad()
            (model(x).square().mean() + gates.penalty()).backward()
            optimizer.step()
            gates.step()
        plan = gates.harden()
    else:
        plan = pw.plan_channels(model, x, budget=budget, importance=how)
    (kept,) = plan.keep.values()
    assert set(kept) <= {4, 5, 6, 7}
