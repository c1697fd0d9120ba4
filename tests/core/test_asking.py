"""Models whose code asks for the values of tensors: they are followed with the values of the example inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.core.surgery import Surgeon
from tests.oracle.gated import removable

FOLLOWED = "ignore:.* asks for the values of tensors"
pytestmark = pytest.mark.usefixtures("one_thread")


class Packed(nn.Module):
    """Only the rows that a mask picks are computed, and put back in their places."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.b, self.head = way, nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.zeros(*x.shape[:-1], self.b.out_features, dtype=x.dtype)
        if self.way == "mask":
            y[mask] = self.b(x[mask].relu())
        elif self.way == "places":
            rows, columns = torch.nonzero(mask, as_tuple=True)
            y[rows, columns] = self.b(x[rows, columns].relu())
        else:
            rows = mask.flatten().nonzero().squeeze(1)
            packed = self.b(x.flatten(0, 1).index_select(0, rows).relu())
            y = y.flatten(0, 1).index_copy(0, rows, packed).view_as(y)
        return self.head(y.tanh())


@pytest.mark.filterwarnings(FOLLOWED)
@pytest.mark.parametrize("way", ["mask", "places", "flat"])
def test_rows_that_a_mask_picks(way: str) -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert removable(Packed(way), (torch.randn(2, 3, 5), mask)) == {"a": 8, "b": 6}


class Trimmed(nn.Module):
    """Cut to the longest sequence of the batch, or to half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.a(x)[:, : int(lengths.max())]
        if lengths.float().mean() < 2:
            x = x[:, : x.shape[1] // 2]
        return self.head(x.relu().sum(1) / lengths.max().item())


@pytest.mark.filterwarnings(FOLLOWED)
def test_numbers_and_branches_that_follow_from_the_inputs() -> None:
    assert removable(Trimmed(), (torch.randn(2, 7, 5), torch.tensor([3, 5]))) == {"a": 8}


class Routed(nn.Module):
    """Each token goes to one expert, which is called on the tokens it gets."""

    def __init__(self, experts: int = 2) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(5, 8), nn.Linear(5, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(experts)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(self.router(x), self.embed(x))

    def routed(self, logits: Tensor, x: Tensor) -> Tensor:
        chosen, out = logits.argmax(-1), x.clone()
        for number, expert in enumerate(self.experts):
            rows, columns = torch.where(chosen == number)
            if len(rows):
                out[rows, columns] = out[rows, columns] + expert(x[rows, columns])
        return self.head(out)


@pytest.mark.filterwarnings(FOLLOWED)
def test_experts_that_are_called_on_their_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(4, 9, 5)
    assert removable(Routed(), tokens) == {"embed": 8, "experts.0.0": 10, "experts.1.0": 10}


def test_what_was_not_reached_is_named() -> None:
    model = Routed(3)
    with torch.no_grad():
        model.router.bias[2] = -1e3
    with pytest.raises(
        pw.TraceError, match=r"test_asking.py:\d+, .* does not reach experts\.2\.0\.weight and 3 others"
    ):
        pw.channel_groups(model, torch.randn(4, 9, 5))


class RoutedInside(Routed):
    """The router sees the channels that may go."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.routed(self.router(x), x)


@pytest.mark.filterwarnings(FOLLOWED)
def test_a_route_that_changes_is_refused() -> None:
    """Without the one channel that the router goes by, all tokens go to the first expert."""
    torch.manual_seed(0)
    model, tokens = RoutedInside(), torch.randn(4, 9, 5)
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.zero_()
        model.router.weight[0, 3] = 1.0
    sizes = {g.name: g.size for g in pw.channel_groups(model, tokens) if g.prunable}
    assert sizes["embed"] == 8
    plans = {}
    for gone in (2, 3):
        plan = pw.plan_channels(model, tokens, budget=pw.Budget(macs=1.0))
        plans[gone] = replace(plan, sizes={"embed": 8}, keep={"embed": tuple({*range(8)} - {gone})})
    assert pw.apply_plan(model, plans[2], tokens).embed.out_features == 7
    with pytest.raises(
        pw.VerificationError, match=r"asks for values at .*test_asking\.py:\d+: .* may decide otherwise"
    ):
        pw.apply_plan(model, plans[3], tokens)


class Scaled(nn.Module):
    """A number of all channels scales them: no channel can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x / x.abs().max().item()).relu())


@pytest.mark.filterwarnings(FOLLOWED)
def test_channels_that_a_number_is_made_of_stay() -> None:
    assert removable(Scaled(), torch.randn(4, 5)) == {"b": 6}


def test_values_are_left_alone() -> None:
    model, x = Trimmed(), torch.randn(2, 7, 5)
    state = torch.random.get_rng_state()
    weight = model.a.weight.detach().clone()
    with pytest.warns(UserWarning, match="followed with the values of the example inputs"):
        pw.channel_groups(model, (x, torch.tensor([3, 5])))
    assert torch.equal(model.a.weight, weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_there_are_no_values_on_the_meta_device() -> None:
    inputs = (torch.randn(2, 7, 5, device="meta"), torch.tensor([3, 5], device="meta"))
    with pytest.raises(pw.TraceError, match="makes a Python number of a tensor's value, and on the meta device"):
        pw.channel_groups(Trimmed().to("meta"), inputs)


@pytest.mark.filterwarnings(FOLLOWED)
def test_saved_and_loaded_with_real_inputs(tmp_path: Path) -> None:
    """A plan holds shapes, and made-up zeros are no lengths."""
    model, inputs = Trimmed(), (torch.randn(2, 7, 5), torch.tensor([3, 5]))
    plan = pw.plan_channels(model, inputs, budget=pw.Budget(macs=0.6))
    small = pw.apply_plan(model, plan, inputs)
    pw.save_pruned(tmp_path / "small", small, plan)
    loaded = pw.load_pruned(tmp_path / "small", Trimmed, example_inputs=inputs)
    assert torch.equal(loaded(*inputs), small(*inputs))


class Firm(Trimmed):
    """Refuses what has no length."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if int(lengths.min()) < 1:
            raise ValueError("an empty sequence")
        return super().forward(x, lengths)


@pytest.mark.filterwarnings(FOLLOWED)
def test_a_model_that_does_not_take_made_up_inputs(tmp_path: Path) -> None:
    model, inputs = Firm(), (torch.randn(2, 7, 5), torch.tensor([3, 5]))
    plan = pw.plan_channels(model, inputs, budget=pw.Budget(macs=0.6))
    pw.save_pruned(tmp_path / "small", pw.apply_plan(model, plan, inputs), plan)
    with pytest.raises(pw.CheckpointError, match="an empty sequence.* made-up values: give example_inputs="):
        pw.load_pruned(tmp_path / "small", Firm)
    pw.load_pruned(tmp_path / "small", Firm, example_inputs=inputs)


class Told(nn.Module):
    """The choice of an expert is read past the dispatcher."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.embed, self.router = way, nn.Linear(5, 8), nn.Linear(8, 2)
        self.experts, self.head = nn.ModuleList(nn.Linear(8, 6) for _ in range(2)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        chosen = self.router(x).argmax(-1)
        numbers = chosen.tolist() if self.way == "tolist" else chosen.numpy()
        places = range(int((x[:, 0] > -99).sum()))
        return self.head(torch.stack([self.experts[numbers[i]](x[i]) for i in places]).relu())


@pytest.mark.filterwarnings(FOLLOWED)
@pytest.mark.parametrize("way", ["tolist", "numpy"])
def test_what_is_read_as_a_whole_decides_as_well(way: str) -> None:
    """What the router reads must be masked for it, also where the tokens of the example go the same way."""
    torch.manual_seed(0)
    model = Told(way).double().eval()
    surgeon = Surgeon.of(model, torch.randn(30, 5).double())
    keep = {
        g.name: tuple(range(1, g.size)) for g in surgeon.grouping.groups if g.prunable and g.name.startswith("embed")
    }
    assert keep
    read = {m.name for g in surgeon.grouping.groups if g.name in keep for m in g.members if m.role == "in"}
    assert "router.weight" in read


class Compared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(self.b(x if not torch.equal(x, torch.zeros_like(x)) else x - 1).relu())


@pytest.mark.filterwarnings(FOLLOWED)
def test_channels_that_are_compared_stay() -> None:
    assert removable(Compared(), torch.randn(4, 5)) == {"b": 6}
