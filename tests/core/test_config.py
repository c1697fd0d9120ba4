"""A model's own config follows its widths, where it can say them."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import asdict, dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.core.config import fit_config


@dataclass
class Inner:
    wide: int = 12

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Config:
    width: int = 16
    heads: int = 4
    head_size: int = 4
    layers: int = 2
    stages: list[int] = field(default_factory=lambda: [6, 10])
    inner: Inner = field(default_factory=Inner)
    out: int = 3

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.head_size = config.heads, config.head_size
        self.q, self.k, self.v = (nn.Linear(config.width, config.heads * config.head_size) for _ in range(3))
        self.o = nn.Linear(config.heads * config.head_size, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, self.head_size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2) / self.head_size**0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(5, config.width)
        self.attend = nn.ModuleList([Attention(config) for _ in range(config.layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(config.width) for _ in range(config.layers)])
        sizes = [config.width, *config.stages, config.inner.wide]
        self.chain = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
        self.head = nn.Linear(config.inner.wide, config.out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for attend, norm in zip(self.attend, self.norms, strict=True):
            x = x + attend(norm(x))
        for layer in self.chain:
            x = layer(x).relu()
        return self.head(x)


INPUTS = torch.randn(2, 7, 5, dtype=torch.float64)


def cut(model: nn.Module, sizes: dict[str, int]) -> nn.Module:
    """The first units of the groups whose names start so; the rest stays whole."""
    plan = pw.plan_channels(model, INPUTS, budget=pw.Budget(macs=1.0))
    groups = {g.name: g.size for g in pw.channel_groups(model, INPUTS) if g.prunable}
    keep = {
        name: tuple(range(next((n for start, n in sizes.items() if name.startswith(start)), size)))
        for name, size in groups.items()
    }
    return pw.apply_plan(model, replace(plan, keep=keep, sizes=groups), INPUTS)


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({"embed": 9}, {"width": 9}),
        ({"attend": 3}, {"heads": 3}),
        ({"chain.0": 4, "chain.1": 5}, {"stages": [4, 5]}),
        ({"chain.2": 8}, {"inner": {"wide": 8}}),
        (
            {"embed": 8, "attend": 2, "chain.0": 4, "chain.2": 8},
            {"width": 8, "heads": 2, "stages": [4, 10], "inner": {"wide": 8}},
        ),
    ],
)
def test_the_stock_class_can_be_built_from_the_new_config(sizes: dict[str, int], want: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Model(Config()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = cut(model, sizes)
    assert isinstance(small, Model)
    assert small.config.to_dict() == {**Config().to_dict(), **want}
    assert model.config == Config(), "the given model's config is its own"
    again = Model(copy.deepcopy(small.config)).double()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(INPUTS), small(INPUTS))


def test_layers_of_different_widths_are_said_to_need_a_plan() -> None:
    model = Model(Config()).double()
    with pytest.warns(UserWarning, match="keeps the old widths: .* save_pruned"):
        small = cut(model, {"attend.0": 3, "attend.1": 2})
    assert small.config == Config()


def test_a_config_that_forward_reads_is_changed_only_if_the_outputs_stay() -> None:
    class Reads(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.config.stages[0]

    model = Reads(Config()).double()
    with pytest.warns(UserWarning, match="keeps the old widths"):
        small = cut(model, {"chain.0": 4})
    assert small.config == Config()


def test_a_class_that_wants_more_than_a_config() -> None:
    class Wants(Model):
        def __init__(self, config: Config, more: int) -> None:
            super().__init__(config)

    model = Wants(Config(), 1).double()
    with pytest.warns(UserWarning, match="cannot be built from its config alone"):
        cut(model, {"embed": 9})


def test_nothing_to_change() -> None:
    model = Model(Config()).double()
    assert fit_config(model, INPUTS) is None
    assert model.config == Config()
