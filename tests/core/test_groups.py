"""Groups: names, roles, and which of them are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunewise as pw
from prunewise.core.groups import select


def model() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU()),
        nn.Conv2d(6, 4, 1),
    )


@pytest.fixture
def groups() -> list[pw.ChannelGroup]:
    return pw.channel_groups(model(), torch.zeros(1, 3, 8, 8))


def test_names_are_the_producers_and_unique(groups: list[pw.ChannelGroup]) -> None:
    assert [(g.name, g.size) for g in groups if g.prunable] == [("0.0", 8), ("1.0", 6)]
    assert len({g.name for g in groups}) == len(groups)


def test_pinned_groups_say_why(groups: list[pw.ChannelGroup]) -> None:
    reasons = {g.name: g.reason for g in groups if not g.prunable}
    assert reasons["2"] == "an output of the model"
    assert "meets a fixed dimension in aten.convolution.default in 0.0" in reasons["0.0.weight[1]"]
    assert all(not g.reason for g in groups if g.prunable)
    assert "pinned: an output" in str(next(g for g in groups if g.name == "2"))


def test_members_and_roles(groups: list[pw.ChannelGroup]) -> None:
    first = next(g for g in groups if g.name == "0.0")
    roles = {(m.name, m.dim): m.role for m in first.members}
    assert roles == {
        ("0.0.weight", 0): "out",
        ("0.0.bias", 0): "out",
        ("0.1.weight", 0): "out",
        ("0.1.bias", 0): "out",
        ("0.1.running_mean", 0): "out",
        ("0.1.running_var", 0): "out",
        ("1.0.weight", 1): "in",
    }
    assert all(m.indices.shape == (8, 1) and m.indices[:, 0].tolist() == list(range(8)) for m in first.members)


def test_flattened_readers_own_several_entries() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    group = pw.channel_groups(net, torch.zeros(1, 1, 2, 2))[0]
    reader = next(m for m in group.members if m.role == "in")
    assert reader.indices.tolist() == [[4 * u + i for i in range(4)] for u in range(4)]


def test_two_parts_of_a_concatenation_are_two_groups_of_one_reader() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    groups = [g for g in pw.channel_groups(Model(), torch.zeros(1, 3)) if g.prunable]
    readers = {g.name: next(m.indices[:, 0].tolist() for m in g.members if m.role == "in") for g in groups}
    assert readers == {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7, 8]}


@pytest.mark.parametrize(
    ("include", "exclude", "want"),
    [
        (None, None, ["0.0", "1.0"]),
        ("0.0", None, ["0.0"]),
        ("0.*", None, ["0.0"]),
        (["0.1", "1.0"], None, ["0.0", "1.0"]),
        ("0.1.weight", None, ["0.0"]),
        (None, "1.*", ["0.0"]),
        (lambda g: g.size > 6, None, ["0.0"]),
        (None, lambda g: g.size > 6, ["1.0"]),
        ("*", "*", []),
        ("2", None, []),
    ],
)
def test_select(groups: list[pw.ChannelGroup], include: object, exclude: object, want: list[str]) -> None:
    assert [g.name for g in select(groups, include, exclude)] == want


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_an_error(groups: list[pw.ChannelGroup], which: str) -> None:
    with pytest.raises(pw.PlanError, match=r"no channel group matches 'layer9\.\*'; there are groups like: .*\*"):
        select(groups, **{which: ["0.0", "layer9.*"]})


def test_nothing_to_prune_says_why() -> None:
    with pytest.raises(pw.NoPrunableGroupError, match="an output of the model"):
        pw.plan_channels(nn.Linear(3, 4), torch.zeros(1, 3), budget=pw.Budget(macs=0.5))
    with pytest.raises(pw.NoPrunableGroupError):
        pw.attach_gates(model(), torch.zeros(1, 3, 8, 8), budget=pw.Budget(macs=0.5), total_steps=3, exclude="*")


def test_a_model_without_parameters_has_no_groups() -> None:
    assert pw.channel_groups(nn.ReLU(), torch.zeros(1, 3)) == []


def test_channels_of_a_buffer_that_code_makes_anew_stay() -> None:
    class Positions(nn.Module):
        """As timm's ConViT does: relative positions are made for the number of tokens at hand."""

        def __init__(self, persistent: bool) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 2)
            self.register_buffer("positions", torch.rand(5, 3), persistent=persistent)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.a(x) + self.b(self.positions)).relu())

    found = {g.name: g for g in pw.channel_groups(Positions(False), torch.zeros(1, 5, 4))}
    assert "not saved with the model" in found["positions[1]"].reason
    assert found["a"].prunable
    assert pw.channel_groups(Positions(True), torch.zeros(1, 5, 4))[0].name
    kept = {g.name: g for g in pw.channel_groups(Positions(True), torch.zeros(1, 5, 4))}
    assert kept["positions[1]"].prunable
