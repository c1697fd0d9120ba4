"""Modules with a width written into their code become graphs; the rest of the model stays in the user's classes."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.core.graph import RebuiltModule
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon

X = torch.randn(3, 5, 12, dtype=torch.float64)


class Attention(nn.Module):
    """`reshape(B, N, C)` with C read off the input, which is wrong once heads are gone."""

    def __init__(self, width: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.qkv, self.proj, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(drop)

    def forward(self, x: Tensor, scale: float = 1.0, *, bias: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * scale
        scores = scores if bias is None else scores + bias
        out = self.drop(scores.softmax(-1)) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, c)), {"scores": scores.mean(1)}


class Block(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width, 3, drop)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y, said = self.attn(self.norm(x), 0.5, bias=bias)
        x = x + y + said["scores"].mean()
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem, self.bias = nn.Linear(12, 12), nn.Parameter(torch.randn(5, 5))
        self.blocks = nn.ModuleList(Block(12, drop * i) for i in range(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, self.bias)
        return self.head(x.mean(1))


def graphs(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, RebuiltModule)]


def cut(model: nn.Module, x: Any, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The masked model's outputs as a module, and the small model; some heads, hidden units and channels are gone."""
    surgeon = Surgeon.of(model, x)
    draw = random.Random(seed)
    keep = {
        g.name: tuple(sorted(draw.sample(range(g.size), max(1, g.size - 1 - g.size // 3))))
        for g in surgeon.grouping.groups
        if g.prunable
    }
    with pytest.warns(UserWarning, match="graph module"):
        small = surgeon.cut(model, keep)

    class Masked(nn.Module):
        def forward(self, *args: Any) -> Any:
            model.train(self.training)
            with masked(model, surgeon.grouping, keep), torch.no_grad():
                return model(*args)

    return Masked(), small


def test_only_the_modules_that_need_it_are_graphs() -> None:
    torch.manual_seed(0)
    model = Net().double()
    want, small = cut(model, X)
    assert type(small) is Net
    assert graphs(small) == [f"blocks.{i}.attn" for i in range(3)]
    assert type(small.blocks[0].mlp[0]) is nn.Linear
    assert small.state_dict().keys() == model.state_dict().keys()
    for x in (X, X[:1], torch.randn(7, 5, 12, dtype=torch.float64)):
        for training in (False, True):
            torch.testing.assert_close(small.train(training)(x), want.train(training)(x), rtol=1e-10, atol=1e-10)


def test_dropout_of_modules_that_are_alike_but_for_it_stays_their_own() -> None:
    torch.manual_seed(0)
    _, small = cut(Net(drop=0.3).double(), X)
    found = []
    for i in range(3):
        graph = small.blocks[i].attn._graphs[True]
        found += [n.args[1] for n in graph.nodes if "dropout" in str(n.target)]
    assert found == [0.0, 0.3, 0.6]


def test_batch_sizes_stay_free_where_the_example_has_a_batch_of_one() -> None:
    torch.manual_seed(0)
    model = Net().double()
    want, small = cut(model, X[:1])
    torch.testing.assert_close(small.eval()(X), want.eval()(X), rtol=1e-10, atol=1e-10)


def test_the_result_trains_is_copied_exported_and_pruned_again() -> None:
    torch.manual_seed(0)
    model = Net().double()
    _, small = cut(model, X)
    other = copy.deepcopy(small).train()
    other(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())
    small.eval()
    exported = torch.export.export(small, (X,), strict=False).module()
    torch.testing.assert_close(exported(X), small(X))
    want, smaller = cut(small, X, seed=1)
    torch.testing.assert_close(smaller.eval()(X), want.eval()(X), rtol=1e-10, atol=1e-10)


def test_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Net(), X.float()
    plan = pw.plan_channels(model, x, budget=pw.Budget(macs=0.5))
    with pytest.warns(UserWarning, match=r"blocks.0.attn.*graph module"):
        small = pw.apply_plan(model, plan, x).eval()
    pw.save_pruned(tmp_path, small, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = pw.load_pruned(tmp_path, Net)
    assert type(loaded) is Net
    assert torch.equal(loaded(x), small(x))


def test_a_module_that_is_called_twice_or_keeps_what_others_read_is_no_graph() -> None:
    """Then the whole model is one."""

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.blocks[0](self.stem(x), self.bias), self.bias)
            return self.head(x.mean(1))

    class Keeps(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * self.blocks[0].attn.heads  # a graph has no such attribute

    torch.manual_seed(0)
    for model in (Twice().double(), Keeps().double()):
        want, small = cut(model, X)
        assert isinstance(small, RebuiltModule)
        torch.testing.assert_close(small.eval()(X), want.eval()(X), rtol=1e-10, atol=1e-10)


def test_modules_that_share_a_module() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks[1:]:
                block.attn.proj = self.blocks[0].attn.proj

    torch.manual_seed(0)
    want, small = cut(Shared().double(), X)
    assert graphs(small) == [f"blocks.{i}.attn" for i in range(3)]
    assert small.blocks[0].attn.proj.weight is small.blocks[2].attn.proj.weight
    torch.testing.assert_close(small.eval()(X), want.eval()(X), rtol=1e-10, atol=1e-10)


def test_a_recurrent_layer_inside_of_a_graph() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lstm, self.head = nn.Linear(12, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.stem(x).reshape(-1, 5, 8))[0].reshape(-1, 6))

    torch.manual_seed(0)
    want, small = cut(Recurrent().double(), X)
    assert small.lstm.weight_hh_l0.shape[1] < 6
    torch.testing.assert_close(small.eval()(X), want.eval()(X), rtol=1e-10, atol=1e-10)
