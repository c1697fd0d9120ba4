"""What a model's own `train` does, and modes that differ: nothing of the user's is changed, and both modes are followed."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunewise as pw
from tests.oracle.gated import removable

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* is a graph module"),
]


class Adapted(nn.Linear):
    """A low-rank adapter that is merged into the weight for eval mode (LoRA)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (1 - 2 * mode) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Frozen(nn.Linear):
    """Switches gradients with the mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.requires_grad_(not mode)
        return self


class Refuses(nn.Linear):
    def train(self, mode: bool = True) -> Refuses:
        if mode:
            raise RuntimeError("for inference only")
        return super().train(mode)


@pytest.mark.parametrize("kind", [Adapted, Frozen, Refuses])
def test_a_train_that_changes_more_than_caches_is_not_called(kind: type[nn.Linear]) -> None:
    model = nn.Sequential(kind(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    for module in model:
        module.train(False)
    x = torch.randn(4, 5).double()
    state, want = copy.deepcopy(model.state_dict()), model(x)
    flags, before = [p.requires_grad for p in model.parameters()], [id(p) for p in model.parameters()]
    plan = pw.plan_channels(model, x, budget=pw.Budget(macs=0.6))
    pw.apply_plan(model, plan, x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), want)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert before == [id(p) for p in model.parameters()]


class Swapped(nn.Module):
    """The same operations in another order, and on other parameters, in train mode."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.heads, self.a, self.b, self.c = heads, nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.c, self.b) if self.training else (self.b, self.c)
        x = self.a(x)
        for layer in layers:
            x = layer(x).relu()
        return (self.other if self.training and self.heads else self.head)(x)


@pytest.mark.parametrize("heads", [False, True])
def test_modes_that_run_the_same_operations_on_other_parameters(heads: bool) -> None:
    assert removable(Swapped(heads), torch.randn(4, 5)) == {"a": 8}


class Part(nn.Module):
    """A width in its code makes it a graph; a constant, or gradients, differ by mode."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.b = way, nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).view(-1, 8).relu())
        if self.way == "constant":
            return x * torch.tensor(0.5 if self.training else 2.0)
        with torch.no_grad() if (self.way == "frozen") == self.training else nullcontext():
            return x * 2


class Around(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(5, 6), Part(way), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.first(x)).tanh())


@pytest.mark.parametrize("way", ["constant", "frozen", "frozen in eval mode"])
def test_modes_of_a_part_that_no_operation_tells_apart(way: str) -> None:
    model, x = Around(way), torch.randn(4, 5).double()
    assert removable(model, x)["part.a"] == 8
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.6)), x)
    for training in (False, True):
        for each in (model, small):
            each.train(training).zero_grad()
            each(x).sum().backward()
        assert (model.first.weight.grad is None) == (small.first.weight.grad is None)


class Averaging(Part):
    """A mean that moves in train mode; a graph has no assignments."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).view(-1, 8).relu())
        if self.training:
            moved = self.mean * 0.9 + x.detach().mean(0) * 0.1
            if self.way == "in place":
                self.mean.copy_(moved)
            else:
                self.mean = moved
        return x - self.mean


@pytest.mark.parametrize("way", ["in place", "assigned"])
def test_buffers_that_forward_assigns_to_are_not_lost(way: str) -> None:
    model, x = Around(way), torch.randn(4, 5).double()
    model.part = Averaging(way)
    model.double()
    plan = pw.plan_channels(model, x, budget=pw.Budget(macs=0.6))
    if way == "assigned":
        with pytest.raises(pw.VerificationError, match=r"assigns to the buffer part\.mean, which a graph cannot"):
            pw.apply_plan(model, plan, x)
        return
    small = pw.apply_plan(model, plan, x).train()
    small(x)
    assert small.part.mean.abs().max() > 0
