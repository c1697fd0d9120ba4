"""Weights that are normalised over their inputs, with a gain: inputs can go, and the gain makes up for the norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunewise as pw
from prunewise.channels.importance import taylor
from prunewise.core.gains import Gain, find_gains
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from prunewise.core.trace import record
from tests.oracle.gated import removable

pytestmark = pytest.mark.usefixtures("one_thread")
NEW, OLD = nn.utils.parametrizations.weight_norm, nn.utils.weight_norm
Norm = Callable[..., nn.Module]


class Between(nn.Module):
    """A plain layer, the layer in question, a plain layer."""

    def __init__(self, layer: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.a, self.layer, self.b = before, layer, after

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.layer(self.a(x).relu()).relu())


def linear(norm: Norm) -> tuple[nn.Module, Tensor]:
    return Between(norm(nn.Linear(8, 6)), nn.Linear(4, 8), nn.Linear(6, 2)), torch.randn(3, 4)


def images(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    return Between(layer, nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)), torch.randn(2, 3, 5, 5)


CASES: dict[str, Callable[[Norm], tuple[nn.Module, Tensor]]] = {
    "linear": linear,
    "linear, along the inputs": lambda norm: linear(partial(norm, dim=1)),
    "linear, one norm for all": lambda norm: linear(partial(norm, dim=None)),
    "conv": lambda norm: images(norm(nn.Conv2d(8, 6, 3))),
    "conv, along the inputs": lambda norm: images(norm(nn.Conv2d(8, 6, 3), dim=1)),
    "conv, along the kernel": lambda norm: images(norm(nn.Conv2d(8, 6, 3), dim=3)),
    "conv, one norm for all": lambda norm: images(norm(nn.Conv2d(8, 6, 3), dim=None)),
    "transposed": lambda norm: images(norm(nn.ConvTranspose2d(8, 6, 2), dim=1)),
    "transposed, along the inputs": lambda norm: images(norm(nn.ConvTranspose2d(8, 6, 2))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", [NEW, OLD], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_inputs_and_outputs_can_go(norm: Norm, case: str) -> None:
    model, x = CASES[case](norm)
    assert sorted(removable(model, x).values()) == [6, 8]


def test_groups_and_depth() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), NEW(nn.Conv2d(8, 8, 3, groups=2)), nn.ReLU(), NEW(nn.Conv2d(8, 8, 3, groups=8)),
        NEW(nn.Conv2d(8, 4, 1)), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert sorted(removable(model, torch.randn(2, 3, 6, 6)).values()) == [4, 4, 4]


class ByHand(nn.Module):
    """A layer whose weight `form` computes."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor], gain: tuple[int, ...] = (6, 1)) -> None:
        super().__init__()
        self.v, self.g, self.form = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.ones(gain)), form

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.form(self.v, self.g))


def within(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    return Between(layer, nn.Linear(4, 8), nn.Linear(6, 2)), torch.randn(3, 4)


BY_HAND: dict[str, ByHand] = {
    "gain times direction over norm": ByHand(lambda v, g: g * v / v.norm(dim=1, keepdim=True)),
    "gain over norm first": ByHand(lambda v, g: v * (g / v.norm(dim=1, keepdim=True))),
    "normalize": ByHand(lambda v, g: F.normalize(v, dim=1) * g),
    "linalg": ByHand(lambda v, g: g * (v / torch.linalg.vector_norm(v, dim=1)[:, None])),
    "a vector": ByHand(lambda v, g: g[:, None] * F.normalize(v), (6,)),
    "one norm": ByHand(lambda v, g: v / v.norm() * g, ()),
    "along the inputs": ByHand(lambda v, g: F.normalize(v, dim=0) * g, (1, 8)),
    "written from the other side": ByHand(lambda v, g: (g.t() * v.t() / v.t().norm(dim=0)).t()),
}


@pytest.mark.parametrize("form", BY_HAND)
def test_by_hand(form: str) -> None:
    assert sorted(removable(*within(BY_HAND[form])).values()) == [6, 8]


NOT_SO: dict[str, ByHand] = {
    "no gain": ByHand(lambda v, g: F.normalize(v, dim=1)),
    "another norm": ByHand(lambda v, g: g * v / v.norm(p=1, dim=1, keepdim=True)),
    "squared": ByHand(lambda v, g: g * v / v.norm(dim=1, keepdim=True) ** 2),
    "norm used elsewhere": ByHand(lambda v, g: (n := v.norm(dim=1, keepdim=True)) * 0.1 + g * v / n),
    "gain used elsewhere": ByHand(lambda v, g: g * v / v.norm(dim=1, keepdim=True) + g),
    "weight used elsewhere": ByHand(lambda v, g: (w := g * v / v.norm(dim=1, keepdim=True)) / w.sum()),
    "a large floor": ByHand(lambda v, g: g * v / v.norm(dim=1, keepdim=True).clamp_min(10.0)),
}


@pytest.mark.parametrize("form", NOT_SO)
def test_what_is_no_such_weight_pins_its_inputs(form: str) -> None:
    model, x = within(NOT_SO[form])
    groups = {g.name: g for g in pw.channel_groups(model, x)}
    assert not groups["a"].prunable
    assert "test_gains.py:" in groups["a"].reason
    if any(g.prunable for g in groups.values()):
        removable(model, x, seeds=1)


def test_a_layer_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.b = nn.Linear(4, 8), NEW(nn.Linear(8, 8)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.shared(self.shared(self.a(x)).relu()))

    assert list(removable(Twice(), torch.randn(3, 4)).values()) == [8]


def test_a_branch_that_ends_in_one_can_go() -> None:
    class Branch(nn.Module):
        def __init__(self, norm: Norm) -> None:
            super().__init__()
            self.up, self.down = norm(nn.Conv1d(8, 12, 3, padding=1)), norm(nn.Conv1d(12, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv1d(3, 8, 1), nn.ModuleList([Branch(NEW), Branch(NEW)]), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            for branch in self.b:
                x = x + branch(x)
            return self.head(x.mean(2))

    assert sorted(removable(Residual(), torch.randn(2, 3, 6), drop=True).values()) == [8, 12, 12]


def test_directions_with_nothing_left_give_zero() -> None:
    model, x = linear(NEW)
    with torch.no_grad():
        model.layer.parametrizations.weight.original1[:3, :4] = 0.0
    surgeon = Surgeon.of(model, x)
    keep = {"a": (1, 2)}
    with masked(model, surgeon.grouping, keep):
        want = model(x)
    small = surgeon.sliced(model, keep)
    assert want.isfinite().all()
    torch.testing.assert_close(small(x), want)
    assert (small.layer.weight[:3] == 0).all()
    gates = pw.attach_gates(model, x, budget=pw.Budget(macs=0.9), total_steps=10)
    keep = {g.name: keep.get(g.name, tuple(range(g.size))) for g in gates.groups}
    gates._show(keep)
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("norm", [NEW, partial(NEW, dim=1), partial(NEW, dim=None)])
def test_the_slope_of_a_gate_is_that_of_masking_the_weight(norm: Norm) -> None:
    model, x = linear(norm)
    model, x = model.double(), x.double()
    with torch.no_grad():
        weight = model.layer.weight.clone()
    mask = torch.ones(8, dtype=torch.float64, requires_grad=True)
    hidden = model.a(x).relu()
    loss = model.b(F.linear(hidden, weight * mask, model.layer.bias).relu()).square().mean()
    loss.backward()
    groups = [g for g in pw.channel_groups(model, x) if g.name == "a"]
    scores = taylor(model, groups, data=[x], loss=lambda m, batch: m(batch).square().mean())
    torch.testing.assert_close(torch.from_numpy(scores["a"]), mask.grad**2)
    gates = pw.attach_gates(model, x, budget=pw.Budget(macs=0.9), total_steps=10, include="a")
    model(x).square().mean().backward()
    torch.testing.assert_close(next(iter(gates.parameters())).grad, mask.grad.float())


class Standardised(nn.Conv2d):
    """A convolution whose weights have no mean and a deviation of one over the inputs of each output."""

    def __init__(self, *args: int, groups: int = 1, layer_norm: bool = False) -> None:
        super().__init__(*args, groups=groups)
        self.gain, self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)), self.weight[0].numel() ** -0.5
        self.layer_norm = layer_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_norm:
            w = F.layer_norm(self.weight, self.weight.shape[1:], eps=1e-3) * self.gain
        else:
            flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
            w = F.batch_norm(flat, None, None, gain, training=True, eps=1e-3).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, groups=self.groups)


class Residual(nn.Module):
    def __init__(self, **kwargs: bool) -> None:
        super().__init__()
        self.stem, self.up = Standardised(3, 8, 1, **kwargs), Standardised(8, 12, 2, **kwargs)
        self.grouped, self.down = Standardised(12, 12, 3, groups=2, **kwargs), Standardised(12, 8, 2, **kwargs)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x[..., 2:-2, 2:-2] + self.down(self.grouped(self.up(x.relu()).relu()).relu()))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_standardised_weights(layer_norm: bool) -> None:
    found = removable(Residual(layer_norm=layer_norm), torch.randn(2, 3, 6, 6))
    assert sorted(found.values()) == [6, 6, 8]


def test_copies_follow_their_own_weights() -> None:
    model, x = linear(NEW)
    gates = pw.attach_gates(model, x, budget=pw.Budget(macs=0.5), total_steps=10)
    gates.control.keep = {g.name: tuple(range(g.size // 2)) for g in gates.groups}
    gates._show(gates.control.keep)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(torch.randn_like(p))
    gated, other = average(x), model(x)
    small = gates.finish(average)
    torch.testing.assert_close(small(x), gated)
    assert not torch.allclose(gated, other)


def test_training_with_gates_and_shrinking() -> None:
    torch.manual_seed(0)
    model, x = linear(NEW)
    gates = pw.attach_gates(model, x, budget=pw.Budget(macs=0.5), total_steps=12, shrink_every=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(12):
        loss = model(x).square().mean() + gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step(optimizer)
    gated = model(x)
    small = gates.finish()
    torch.testing.assert_close(small(x), gated)
    assert small.layer.parametrizations.weight.original1.shape == small.layer.weight.shape
    assert small.layer.weight.numel() < 48


def test_lower_precision_and_no_values() -> None:
    model, x = linear(NEW)
    plan = pw.plan_channels(model, x, budget=pw.Budget(macs=0.5))
    pw.apply_plan(model.bfloat16(), plan, x.bfloat16())
    assert pw.apply_plan(model.to("meta"), plan, x.to("meta")).layer.weight.is_meta


def test_factor_is_a_matter_of_norms() -> None:
    gain = Gain("g", "v", (1,))
    whole = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    factor = gain.factor(whole, torch.tensor([[1.0, 0.0]]), torch.ones(2, 1))
    assert [round(f, 6) for f in factor.flatten().tolist()] == [0.6, 0.0]
    assert gain.filled(whole).tolist() == [[3.0, 4.0], [1.0, 1.0]]


def test_found_where_it_is_computed() -> None:
    model, x = linear(NEW)
    (use,) = find_gains(record(model, x))
    weight = "layer.parametrizations.weight.original"
    assert use.what == Gain(f"{weight}0", f"{weight}1", (1,))
