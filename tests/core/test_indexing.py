"""What is written or read by index, windows of it, and its Fourier transform: which channels pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.test_rules import Between, reason, units
from tests.oracle.gated import removable

ROWS = torch.tensor([0, 2, 2])


def like(x: Tensor, rows: Tensor = ROWS) -> Tensor:
    """The rows as an index of the shape of their source."""
    return rows[None, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])


PASSES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "scatter": (lambda x: x.scatter(2, like(x, ROWS[:2]), x[:, :, 1:3]), 12),
    "scatter a number": (lambda x: x.scatter(2, like(x), 0.5), 12),
    "scatter_add": (lambda x: x.scatter_add(2, like(x), x[:, :, 1:]), 12),
    "scatter_reduce": (lambda x: torch.zeros_like(x).scatter_reduce(2, like(x), x[:, :, 1:], "amax"), 12),
    "scatter in place": (lambda x: torch.zeros_like(x).scatter_add_(2, like(x), x[:, :, 1:]), 12),
    "index_add": (lambda x: x.index_add(2, ROWS, x[:, :, 1:], alpha=2), 12),
    "index_reduce": (lambda x: x.index_reduce(2, ROWS, x[:, :, 1:], "amin"), 12),
    "index_copy": (lambda x: x.index_copy(2, ROWS[:2], x[:, :, 1:3]), 12),
    "index_fill": (lambda x: x.index_fill(2, ROWS, 3.0), 12),
    "index_put": (lambda x: x.index_put((torch.tensor([0, 1]),), x.flip(0)), 12),
    "index_put of places": (lambda x: written(x, x[:, :, :1, :2].squeeze(2)), 12),
    "index_put of a number": (lambda x: written(x, torch.tensor(0.5, dtype=x.dtype)), 12),
    "windows": (lambda x: x.unfold(2, 2, 1).amax(-1), 12),
    "windows of windows": (lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).mean(-1), 12),
    "fold": (lambda x: F.fold(x.flatten(2)[..., :9], (4, 4), 2), 3),
    "fold of windows": (lambda x: F.fold(F.unfold(x, 2), (4, 4), 2), 12),
    "spectrum": (lambda x: torch.fft.rfft2(x).abs(), 12),
    "filter of the spectrum": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(4, 4)), 12),
    "complex spectrum": (lambda x: torch.view_as_real(torch.fft.fft(x, dim=2)).sum(-1), 12),
}


def written(x: Tensor, values: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, torch.tensor([1, 2]), torch.tensor([0, 3])] = values
    return x


@pytest.mark.parametrize("family", PASSES)
def test_channels_pass(family: str) -> None:
    fn, want = PASSES[family]
    found = removable(Between(fn), torch.randn(2, 2, 4, 4))
    assert found.get("a", 0) == want


PINS: dict[str, Callable[[Tensor], Tensor]] = {
    "scatter": lambda x: x.scatter(1, torch.zeros(x.shape[0], 1, 4, 4, dtype=torch.long), 0.5),
    "scatter of fewer channels": lambda x: x.scatter(2, torch.zeros(x.shape[0], 5, 1, 4, dtype=torch.long), x),
    "index_add": lambda x: x.index_add(1, ROWS, x[:, :3]),
    "index_put": lambda x: x.index_put((torch.tensor([[0], [1]]), torch.tensor([[3, 4]])), x.new_tensor(1.0)),
    "mask": lambda x: x.index_put((x > 0,), x.new_tensor(1.0)),
    "windows": lambda x: x.unfold(1, 2, 2).amax(-1),
    "spectrum": lambda x: torch.fft.fft(x, dim=1).abs(),
}


@pytest.mark.parametrize("family", PINS)
def test_channels_that_are_indexed_stay(family: str) -> None:
    model = Between(PINS[family])
    assert units(model, 2, 2, 4, 4) == 0
    assert f"{__file__}:" in reason(model, 2, 2, 4, 4)


class Graph(nn.Module):
    """Messages along the edges of a graph, added up in a tensor like the nodes' own: both widths are one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message, self.update = nn.Linear(5, 8), nn.Linear(16, 8), nn.Linear(16, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x, (source, target) = self.embed(x), edges
        messages = self.message(torch.cat([x[source], x[target]], -1)).relu()
        total = torch.zeros_like(x).index_add_(0, target, messages)
        number = torch.zeros(len(x), 1, dtype=x.dtype).index_add_(0, target, x.new_ones(len(messages), 1))
        return self.head(self.update(torch.cat([x, total / number.clamp(min=1)], -1)).relu())


def test_a_graph_network() -> None:
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
    assert removable(Graph(), (torch.randn(6, 5), edges)) == {"embed": 8, "update": 6}


class Bags(nn.Module):
    """A bag of words beside a sequence of them."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(9, 8), nn.EmbeddingBag(9, 8, mode=mode)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor, words: Tensor, starts: Tensor) -> Tensor:
        return self.head(self.words(ids) + self.bag(words, starts)[:, None])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(mode: str) -> None:
    ids, words, starts = torch.randint(0, 9, (2, 7)), torch.randint(0, 9, (10,)), torch.tensor([0, 4])
    assert sorted(removable(Bags(mode), (ids, words, starts)).values()) == [8]
