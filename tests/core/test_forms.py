"""One small model a form that real networks have: its channels can go, and gated equals small; or it is said why not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunewise as pw
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from tests.oracle.gated import removable

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the small .* is a graph module"),
    pytest.mark.filterwarnings("ignore:.*is a graph module, not of your class"),
]


def image(channels: int = 3, size: int = 6) -> Tensor:
    return torch.randn(2, channels, size, size)


def tokens(width: int = 5) -> Tensor:
    return torch.randn(2, 7, width)


def pinned(model: nn.Module, inputs: Any) -> dict[str, str]:
    """Why groups stay, by name."""
    return {g.name: g.reason for g in pw.channel_groups(model, inputs) if not g.prunable}


# -- convolutional networks ---------------------------------------------------------------------------------------


class Shuffled(nn.Module):
    """Grouped convolutions with a shuffle between them."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=2)
        self.depthwise, self.c = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        if self.by_hand:
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        else:
            x = F.channel_shuffle(x, 2)
        return self.c(self.depthwise(x).relu())


@pytest.mark.parametrize("by_hand", [True, False])
def test_channel_shuffle(by_hand: bool) -> None:
    assert removable(Shuffled(by_hand), image()) == {"a": 6, "b": 6}


class Flattened(nn.Module):
    """The reader of a flattened map, the map transposed before: entries of one channel are far apart, or side by side."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order, self.a, self.b = order, nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().permute(self.order).flatten(1))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 2, 1, 3), (0, 3, 2, 1)])
def test_transposed_flatten(order: tuple[int, ...]) -> None:
    assert removable(Flattened(order), image()) == {"a": 8}


class Cbam(nn.Module):
    """Attention over channels (one MLP for the mean and the maximum), then over places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mlp = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.places, self.b, self.head = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * (self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))).sigmoid()
        x = x * self.places(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        return self.head(self.b(x).relu())


def test_cbam_keeps_the_channels_that_it_averages_and_says_so() -> None:
    model = Cbam()
    assert removable(model, image()) == {"mlp.0": 4, "b": 6}
    assert "aten.mean.dim at " in pinned(model, image().double())["a"], "the mean and the maximum over channels"


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 1))
        self.backbone.requires_grad_(False)
        self.head = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_frozen_backbone() -> None:
    model = Frozen()
    assert removable(model, image()) == {"backbone.0": 8, "backbone.3": 10}
    small = pw.apply_plan(
        model, pw.plan_channels(model, image().double(), budget=pw.Budget(macs=0.5)), image().double()
    )
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_pixel_shuffle() -> None:
    up = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 6, 1), nn.PixelUnshuffle(2), nn.Conv2d(24, 3, 1)
    )
    assert removable(up, image()) == {"0": 4, "2": 6}


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_multiplier(multiplier: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8 * multiplier, 3, groups=8), nn.BatchNorm2d(8 * multiplier), nn.ReLU(),
        nn.Conv2d(8 * multiplier, 3, 1),
    )  # fmt: skip
    assert removable(model, image()) == {"0": 8}


class OptionA(nn.Module):
    """Shortcuts that are padded with zeros along the channels, on both sides or on one."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.pad = (0, 0, 0, 0, before, after)
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.down, self.c = (
            nn.Conv2d(6, 6 + before + after, 3, stride=2, padding=1),
            nn.Conv2d(6 + before + after, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = (x + self.b(x)).relu()
        return self.c((self.down(x) + F.pad(x[:, :, ::2, ::2], self.pad)).relu())


@pytest.mark.parametrize(("before", "after"), [(3, 3), (0, 4), (2, 0)])
def test_padded_shortcuts(before: int, after: int) -> None:
    found = removable(OptionA(before, after), image(), graph=True)
    assert sum(found.values()) == 6 + before + after, found


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.shift
        if self.training:
            self.count += x.detach().mean((0, 2, 3))
        return self.b(x.relu() * self.count.sigmoid()[:, None, None])


def test_buffers_along_channels() -> None:
    model = Buffered()
    assert removable(model, image()) == {"a": 8}
    small = pw.apply_plan(
        model, pw.plan_channels(model, image().double(), budget=pw.Budget(macs=0.5)), image().double()
    )
    assert (small.shift.shape, small.count.shape) == ((1, 4, 1, 1), (4,))


def test_spectral_norm_pins_and_says_so() -> None:
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 7), nn.Linear(7, 3)
    )
    # In train mode a look at its weight is a step of its power iteration.
    assert removable(model.eval(), torch.randn(4, 5), training=(False,)) == {"4": 7}
    reasons = pinned(model, torch.randn(4, 5).double())
    assert "2.parametrizations.weight.0" in reasons["0"], "the largest singular value is one of the whole weight"


class SlicedAndJoined(nn.Module):
    """Part of the channels goes through a layer; the rest goes around it."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split, self.k = split, 4
        self.a, self.part, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x1, x2 = torch.split(x, [self.k, x.shape[1] - self.k], 1) if self.split else (x[:, : self.k], x[:, self.k :])
        return self.b(torch.cat([self.part(x1), x2], 1))


@pytest.mark.parametrize("split", [True, False])
def test_slices_and_concatenation(split: bool) -> None:
    assert sorted(removable(SlicedAndJoined(split), image()).values()) == [4, 4, 8]


class ChunkList(nn.Module):
    """A list of chunks that grows by what each block makes of its last one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.blocks = nn.Conv2d(3, 12, 1), nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)])
        self.b = nn.Conv2d(24, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.a(x).chunk(2, 1))
        y.extend(block(y[-1]).relu() for block in self.blocks)
        return self.head(self.b(torch.cat(y, 1)).relu())


def test_chunk_lists() -> None:
    assert removable(ChunkList(), image()) == {"a": 6, "blocks.0": 6, "blocks.1": 6, "b": 8}


# -- attention and recurrence -------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.attn, self.head = (
            nn.Linear(5, 16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.head(x + self.attn(x, x, x, need_weights=False)[0])


def test_multihead_attention() -> None:
    assert removable(Attends(), tokens()) == {"up": 16, "attn.in_proj_weight[0]": 4}


class ComputedHeadSize(nn.Module):
    """The size of a head is computed from the width, in `__init__` or in `forward`."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late, self.hidden, self.heads = late, 16, 4
        self.head_dim = self.hidden // self.heads
        self.up, self.out, self.head = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        n, t, width = x.shape
        size = width // self.heads if self.late else self.head_dim
        q, k, v = (f(x).view(n, t, self.heads, size).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2) / math.sqrt(size)).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(n, t, self.heads * size)))


@pytest.mark.parametrize("late", [False, True])
def test_head_size_computed_from_the_width(late: bool) -> None:
    assert removable(ComputedHeadSize(late), tokens(), graph=late) == {"up": 16, "q": 4}


class Caching(nn.Module):
    """Attention whose bias is cached in eval mode, and cleared when training begins (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 24), nn.Linear(8, 3)
        self.bias, self.cache = nn.Parameter(torch.randn(4, 9)), {}
        self.register_buffer("places", torch.arange(7)[:, None].sub(torch.arange(7)).abs())

    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, len(self.bias), -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[:, self.places]
        if not self.training:
            bias = self.cache.setdefault("bias", bias)
        scores = q @ k.transpose(-2, -1) + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_what_was_cached_in_eval_mode_hides_nothing() -> None:
    fresh = removable(Caching(), tokens())
    model = Caching().double().eval()
    model(tokens().double())
    held = model.cache["bias"]
    groups = {g.name: g.size for g in pw.channel_groups(model, tokens().double()) if g.prunable}
    assert groups == fresh
    assert model.cache["bias"] is held
    assert not model.training
    plan = pw.plan_channels(model, tokens().double(), budget=pw.Budget(macs=0.6))
    small = pw.apply_plan(model, plan, tokens().double())
    assert small.cache == {}
    small.eval()(tokens().double())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(5, 8)
        self.cell = kind(8, 6, num_layers=layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(12 if bidirectional else 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.up(x))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, False), (1, True)])
def test_recurrent_layers(kind: type[nn.RNNBase], layers: int, bidirectional: bool) -> None:
    found = removable(Recurrent(kind, layers=layers, bidirectional=bidirectional), tokens(), seeds=2, graph=True)
    assert found.pop("up") == 8
    assert set(found.values()) == {6}, found


class RmsNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.fc1, self.fc2 = nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.last, self.head = nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = x + self.fc2(F.silu(self.fc1(self.norm(x))))
        return self.head(self.last(x))


def test_rms_norm() -> None:
    assert removable(RmsNormed(), tokens()) == {"up": 8, "fc1": 12}


# -- raw parameters, ties, several inputs and outputs -------------------------------------------------------------


class WithEinsum(nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.up, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        size = {"d": 8, "f": 12}
        self.w1, self.w2 = (nn.Parameter(torch.randn([size[k] for k in s[4:6]])) for s in (first, second))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.head(torch.einsum(self.second, torch.einsum(self.first, x, self.w1).relu(), self.w2))


@pytest.mark.parametrize("first", ["btd,df->btf", "btd,fd->btf"])
@pytest.mark.parametrize("second", ["btf,fd->btd", "btf,df->btd"])
def test_einsum_with_a_parameter(first: str, second: str) -> None:
    assert sorted(removable(WithEinsum(first, second), tokens(), seeds=2, least=2).values()) == [8, 8, 12]


class Experts(nn.Module):
    """All experts run, in one product each way; a softmax weighs them."""

    def __init__(self, up: str, down: str, mix: str, *, bias: bool) -> None:
        super().__init__()
        self.up, self.down, self.mix = up, down, mix
        self.embed, self.gate, self.head = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        size = {"e": 3, "d": 8, "f": 12}
        w1, w2 = ([size[k] for k in s.split(",")[1].split("->")[0]] for s in (up, down))
        self.w1, self.w2 = nn.Parameter(torch.randn(w1)), nn.Parameter(torch.randn(w2))
        self.b1 = nn.Parameter(torch.randn(3, 12)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = torch.einsum(self.up, x, self.w1)
        h = h if self.b1 is None else h + self.b1
        y = torch.einsum(self.down, F.gelu(h), self.w2)
        return self.head(x + torch.einsum(self.mix, self.gate(x).softmax(-1), y))


@pytest.mark.parametrize(
    ("up", "down", "mix", "bias"),
    [
        ("bsd,edf->bsef", "bsef,efd->bsed", "bse,bsed->bsd", True),
        ("bsd,edf->bsef", "bsef,efd->bsed", "bse,bsed->bsd", False),
        ("bsd,efd->bsef", "bsef,edf->bsed", "bse,bsed->bsd", True),
        ("bsd,edf->ebsf", "ebsf,efd->ebsd", "bse,ebsd->bsd", False),
        ("bsd,dfe->bsfe", "bsfe,fde->bsde", "bse,bsde->bsd", False),
    ],
)
def test_hidden_units_of_dense_experts(up: str, down: str, mix: str, bias: bool) -> None:
    found = removable(Experts(up, down, mix, bias=bias), tokens(), seeds=2, least=2)
    assert sorted(found.values()) == [8, 12], "the width, and the hidden units of all experts together"


class Towers(nn.Module):
    """Two layers whose outputs are multiplied and summed: no weight reads these channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.u, self.v = nn.Linear(5, 6), nn.Linear(5, 7), nn.Linear(6, 8), nn.Linear(7, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("btd,bsd->bts", self.u(self.a(x).relu()), self.v(self.b(y).relu()))


def test_layers_that_meet_in_einsum_keep_what_is_summed_and_say_so() -> None:
    model, inputs = Towers(), (tokens().double(), tokens().double())
    assert removable(model, inputs) == {"a": 6, "b": 7}
    assert "summed over by aten.bmm" in pinned(model, inputs)["u"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.fc2(self.fc1(x).relu()))


def test_tied_embedding_and_head() -> None:
    model, ids = Tied(), torch.randint(0, 11, (2, 5))
    assert sorted(removable(model, ids).values()) == [8, 12]
    small = pw.apply_plan(model, pw.plan_channels(model, ids, budget=pw.Budget(macs=0.5)), ids)
    assert small.head.weight is small.embed.weight


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(8))
        self.w2, self.w3 = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w1, self.b1).relu(), self.w2).tanh() @ self.w3


def test_functional_layers_with_raw_parameters() -> None:
    assert sorted(removable(Functional(), torch.randn(4, 5)).values()) == [6, 8]


class BeforeUse(nn.Module):
    """Weights that are scaled, masked or cast before they read: equalised learning rates, MADE, mixed precision."""

    FORMS: ClassVar[dict[str, Any]] = {
        "scaled": lambda w, mask: w * 0.3,
        "masked": lambda w, mask: mask * w,
        "cast": lambda w, mask: w.float().double(),
        "negated": lambda w, mask: -w / 2,
        "twice": lambda w, mask: ((w * mask) * 0.5).to(w.dtype),
        "bounded": lambda w, mask: torch.tanh(w),
    }

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = self.FORMS[form]
        self.a, self.w, self.h = nn.Linear(5, 8), nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 2)
        self.register_buffer("mask", torch.ones(6, 8).tril())

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.linear(self.a(x).relu(), self.form(self.w, self.mask)).relu())


@pytest.mark.parametrize("form", BeforeUse.FORMS)
def test_weights_that_are_changed_before_use(form: str) -> None:
    assert removable(BeforeUse(form), tokens()) == {"a": 8, "w[0]": 6}


class AlsoElsewhere(nn.Module):
    """The scaled weight reads, and is averaged besides: its entries may not go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(5, 8), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).relu(), self.w * 2) + (self.w * 3).mean()


def test_a_scaled_weight_that_is_also_used_elsewhere_stays() -> None:
    assert "a" in pinned(AlsoElsewhere(), tokens())


class PlacedByAParameter(nn.Module):
    """A parameter times what reads: the product carries the channels of both."""

    def __init__(self, outer: bool) -> None:
        super().__init__()
        self.outer, self.a, self.h = outer, nn.Linear(5, 8), nn.Linear(6, 2)
        self.w, self.mask = nn.Parameter(torch.randn(6, 1)), nn.Parameter(torch.randn(1, 8))
        self.b, self.p = nn.Linear(5, 8), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.outer:
            return self.h(F.linear(self.a(x).relu(), self.w * self.mask).relu())
        return self.h((self.a(x) * self.p) @ self.b(x).transpose(1, 2)[:, :, :6])


@pytest.mark.parametrize("outer", [True, False])
def test_products_of_a_parameter_that_read(outer: bool) -> None:
    removable(PlacedByAParameter(outer), torch.randn(2, 6, 5))


class PerSample(nn.Module):
    """Weights made for each sample, all in one grouped convolution (StyleGAN2, dynamic convolutions)."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.weight, self.head = nn.Linear(4, 3), nn.Parameter(torch.randn(6, 3, 1, 1)), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.weight * self.style(z)[:, None, :, None, None]
        y = F.conv2d(x.reshape(1, b * c, h, w), weight.reshape(b * 6, c, 1, 1), groups=b)
        return self.head(y.view(b, 6, h, w).relu())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_group_of_channels_for_each_sample(batch: int) -> None:
    inputs = torch.randn(batch, 3, 4, 4), torch.randn(batch, 4)
    assert removable(PerSample(), inputs, graph=True) == {"weight[0]": 6}
    model = PerSample()
    small = pw.apply_plan(model, pw.plan_channels(model, inputs, budget=pw.Budget(macs=0.6)), inputs)
    x, z = torch.randn(5, 3, 4, 4), torch.randn(5, 4)
    alone = torch.cat([small(x[i : i + 1], z[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(small(x, z), alone)  # the batch size is still free


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mid = nn.Linear(5, 8), nn.Linear(8, 6)
        self.a, self.b = nn.Linear(8, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x).relu()
        return {"a": self.a(x), "b": self.b(self.mid(x).relu())}


def test_two_outputs() -> None:
    assert removable(TwoOutputs(), torch.randn(4, 5)) == {"trunk": 8, "mid": 6}


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.picture, self.b = nn.Embedding(11, 8), nn.Conv2d(3, 6, 1), nn.Linear(14, 3)

    def forward(self, *, ids: Tensor, image: Tensor, scale: float = 1.0) -> Tensor:
        words, picture = self.words(ids).mean(1) * scale, self.picture(image).mean((2, 3))
        return self.b(torch.cat([words, picture], 1).relu())


def test_dict_inputs() -> None:
    inputs = {"ids": torch.randint(0, 11, (2, 5)), "image": image(), "scale": 0.5}
    assert removable(ByName(), inputs) == {"words.weight[1]": 8, "picture": 6}


# -- blocks that go as a whole ------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_residual_blocks_of_convolutions_go_as_a_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ConvBlock(), ConvBlock(), nn.Conv2d(8, 3, 1))
    assert removable(model, image(), drop=True) == {"0": 8, "1.conv1": 10, "2.conv1": 10}


def test_residual_branches_of_a_transformer_go_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(5, 8), TransformerBlock(), TransformerBlock(), nn.Linear(8, 3))
    found = removable(model, tokens(), drop=True)
    assert sorted(found.values()) == [2, 2, 8, 12, 12]


class NumberInATensor(nn.Module):
    """A width that reaches the computation as a tensor, where dropout keeps outputs from being compared."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.head = how, nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(F.dropout(x, 0.5, self.training))
        if self.training:
            width = {"tensor": torch.tensor, "numpy": lambda n, dtype: torch.from_numpy(np.array([n]))}
            drawn = torch.tensor(np.random.rand(), dtype=x.dtype)  # no width, and another in every pass
            x = x / width[self.how](float(x.size(-1)), dtype=x.dtype).sqrt() + 0 * drawn
        return self.head(x)


@pytest.mark.parametrize("how", ["tensor", "numpy"])
def test_a_width_in_a_tensor_of_one_number_is_seen(how: str) -> None:
    model, x = NumberInATensor(how).double(), torch.randn(3, 5).double()
    surgeon = Surgeon.of(model, x)
    keep = {"a": (1, 3)}
    small = surgeon.cut(model, keep)
    torch.manual_seed(0)
    with masked(model.train(), surgeon.grouping, keep):
        want = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(small.train()(x), want)


def test_a_number_that_is_drawn_anew_is_no_width() -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) * (1 + 0 * torch.tensor(np.random.rand(), dtype=x.dtype)))

    model, x = Drawn(), torch.randn(3, 5)
    assert type(Surgeon.of(model, x).cut(model, {"a": (1, 3)})) is Drawn


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.scripted(self.a(x))))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_module_stays_as_it_is(tmp_path: Path) -> None:
    model, x = Scripted(), image()
    plan = pw.plan_channels(model, x, budget=pw.Budget(macs=0.8))
    small = pw.apply_plan(model, plan, x)
    assert set(plan.keep) == {"b"}
    assert isinstance(small.scripted, torch.jit.ScriptModule)
    assert small.b.out_channels == len(plan.keep["b"]) < 6
    pw.save_pruned(tmp_path, small, plan)
    assert torch.equal(pw.load_pruned(tmp_path, Scripted).eval()(x), small.eval()(x))
