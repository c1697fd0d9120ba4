"""Each family of operations: the smallest model, and what may be removed of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunewise as pw
from prunewise.core.flow import RULES, rule
from prunewise.core.surgery import Surgeon


class Between(nn.Module):
    """conv 2 → 12, the operation, conv → 3."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.a = nn.Conv2d(2, 12, 1)
        self.b = nn.Conv2d(fn(torch.zeros(2, 12, 4, 4)).shape[1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fn(self.a(x)))


def units(model: nn.Module, *shape: int) -> int:
    """Units of the group that the first layer produces; 0 where it is pinned."""
    groups = pw.channel_groups(model, torch.zeros(*shape))
    return sum(g.size for g in groups if g.prunable and any(m.name == "a.weight" and m.dim == 0 for m in g.members))


def reason(model: nn.Module, *shape: int) -> str:
    groups = pw.channel_groups(model, torch.zeros(*shape))
    found = [g.reason for g in groups if any(m.name == "a.weight" and m.dim == 0 for m in g.members)]
    return found[0]


FAMILIES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pointwise": (lambda x: (x.exp() + 1).sqrt().clamp(0, 3) * x.sigmoid(), 12),
    "in place": (lambda x: F.relu_(x).mul_(2), 12),
    "dropout": (lambda x: F.dropout2d(x, 0.5, False), 12),
    "where": (lambda x: torch.where(x > 0, x, -x), 12),
    "max pool": (lambda x: F.max_pool2d(x, 2), 12),
    "avg pool": (lambda x: F.adaptive_avg_pool2d(x, 1), 12),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 12),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 12),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), 12),
    "instance norm": (F.instance_norm, 12),
    "group norm": (lambda x: F.group_norm(x, 4), 4),
    "layer norm over space": (lambda x: F.layer_norm(x, (4, 4)), 12),
    "mean over space": (lambda x: x.mean((2, 3), keepdim=True), 12),
    "softmax over space": (lambda x: x.flatten(2).softmax(-1).view_as(x), 12),
    "glu": (lambda x: F.glu(x, 1), 6),
    "chunk": (lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], 6),
    "cat": (lambda x: torch.cat([x, x], 1), 12),
    "stack": (lambda x: torch.stack([x, -x]).amax(0), 12),
    "permute": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 12),
    "flatten": (lambda x: x.flatten(2)[..., None], 12),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 3),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 12),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 3), 4),
    "im2col": (lambda x: F.unfold(x, 2)[..., None], 12),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 12),
    "repeat interleave": (lambda x: x.repeat_interleave(2, 1), 12),
    "flip": (lambda x: x + x.flip(1), 6),
    "matmul": (lambda x: x @ torch.ones(4, 4), 12),
    "slice": (lambda x: x[:, :, 1:3], 12),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), 12),
    "expand": (lambda x: x + x.mean((2, 3), keepdim=True).expand_as(x), 12),
    "softmax over channels": (lambda x: x.softmax(1), 0),
    "mean over channels": (lambda x: x - x.mean(1, keepdim=True), 0),
    "sum over channels": (lambda x: x.sum(1, keepdim=True), 0),
    "channel norm": (lambda x: F.normalize(x, dim=1), 0),
    "cumsum": (lambda x: x.cumsum(1), 0),
    "sort": (lambda x: x.sort(1).values, 0),
    "roll": (lambda x: x.roll(1, 1), 0),
    "index": (lambda x: x[:, [1, 0, 2]], 0),
    "position": (lambda x: x * torch.arange(12.0)[:, None, None], 0),
    "local response": (lambda x: F.local_response_norm(x, 3), 0),
    "unbind": (lambda x: torch.stack(x.unbind(1), 1), 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    fn, want = FAMILIES[family]
    assert units(Between(fn), 2, 2, 4, 4) == want


@pytest.mark.parametrize("family", [f for f, (_, want) in FAMILIES.items() if want == 0])
def test_what_pins_is_named_with_the_line(family: str) -> None:
    assert f"{__file__}:" in reason(Between(FAMILIES[family][0]), 2, 2, 4, 4)


def _libraries() -> torch.library.Library:
    library = torch.library.Library("prunewise_test", "FRAGMENT")
    library.define("odd(Tensor x) -> Tensor")
    library.impl("odd", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("odd", lambda x: torch.empty_like(x), "Meta")
    return library


LIBRARY = _libraries()


def test_an_unknown_operation_pins_and_is_named_with_the_line() -> None:
    model = Between(lambda x: torch.ops.prunewise_test.odd(x))
    assert units(model, 2, 2, 4, 4) == 0
    text = reason(model, 2, 2, 4, 4)
    assert "no rule for prunewise_test.odd.default" in text
    assert f"{__file__}:" in text
    with pytest.raises(pw.NoPrunableGroupError, match="prunewise_test.odd"):
        pw.plan_channels(model, torch.zeros(2, 2, 4, 4), budget=pw.Budget(macs=0.5))


def test_a_rule_that_fails_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(flow: object, op: object) -> None:
        raise KeyError("nothing")

    monkeypatch.setitem(RULES, "prunewise_failing", broken)
    monkeypatch.setitem(RULES, "erf", broken)
    model = Between(torch.erf)
    assert units(model, 2, 2, 4, 4) == 0
    assert "a rule failed (KeyError" in reason(model, 2, 2, 4, 4)


def test_custom_autograd_function_is_seen_through() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 2

    assert units(Between(Twice.apply), 2, 2, 4, 4) == 12


def test_two_rules_for_one_operation_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="two rules for convolution"):
        rule("convolution")(lambda flow, op: [])


@pytest.mark.parametrize(
    ("groups", "inner", "want"), [(1, 12, 12), (12, 12, 12), (12, 24, 12), (3, 12, 4), (6, 12, 6), (2, 8, 6)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions(groups: int, inner: int, want: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g, self.b = nn.Conv2d(2, 12, 1), kind(12, inner, 1, groups=groups), nn.Conv2d(inner, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.g(self.a(x)))

    assert units(Model(), 1, 2, 4, 4) == want


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_convolutions_of_every_rank(kind: type[nn.Module]) -> None:
    rank = int(kind.__name__[-2])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = kind(2, 6, 2, dilation=1), kind(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    groups = pw.channel_groups(Model(), torch.zeros(2, 2, *(5,) * rank))
    name = "a.weight[1]" if "Transpose" in kind.__name__ else "a"  # where the outputs are of the weight
    assert [(g.name, g.size) for g in groups if g.prunable] == [(name, 6)]


def test_weights_nobody_reads_pin() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 12, 1)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).amax(1)

    groups = pw.channel_groups(Model(), torch.zeros(1, 2, 4, 4))
    assert not any(g.prunable for g in groups)
    assert any("not used" in g.reason for g in groups)


def test_heads_are_the_units_of_attention() -> None:
    class Model(nn.Module):
        def __init__(self, kv_heads: int) -> None:
            super().__init__()
            self.q, self.o, self.kv_heads = nn.Linear(6, 16), nn.Linear(16, 6), kv_heads
            self.k, self.v = nn.Linear(6, 4 * kv_heads), nn.Linear(6, 4 * kv_heads)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != 4)
            return self.o(out.transpose(1, 2).flatten(2))

    for kv_heads in (4, 2, 1):
        groups = [g for g in pw.channel_groups(Model(kv_heads), torch.zeros(2, 5, 6)) if g.prunable]
        assert [g.size for g in groups] == ([kv_heads] if kv_heads > 1 else [g.size for g in groups])


def test_heads_of_the_module_called_the_usual_way() -> None:
    """The averaged weights are computed and thrown away: they must not pin the heads."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.out = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attn(x, x, x)[0])

    groups = pw.channel_groups(Model(), torch.zeros(2, 5, 8))
    assert ("attn.in_proj_weight[0]", 4) in [(g.name, g.size) for g in groups if g.prunable]


def test_an_empty_rest_takes_part_in_nothing() -> None:
    class PartialRotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.cat([y[..., :16] * 2, y[..., 16:]], -1))

    model, x = PartialRotary(), torch.randn(2, 5)
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.5)), x)
    assert small.a.weight.shape == (8, 5)


@pytest.mark.parametrize("activation", [nn.Hardswish, nn.LogSigmoid, nn.GELU, nn.Mish, nn.Softplus, nn.Hardsigmoid])
def test_activations_pass(activation: type[nn.Module]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), activation(), nn.Conv2d(8, 4, 3)), torch.randn(1, 3, 8, 8)
    assert [g.size for g in pw.channel_groups(model, x) if g.prunable] == [8]


def test_gather_along_tokens_lets_channels_pass() -> None:
    class Gathers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y.gather(1, torch.zeros_like(y[:, :2], dtype=torch.int64)))

    model, x = Gathers(), torch.randn(2, 6, 5)
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.6)), x)
    assert small.a.weight.shape[0] < 16


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="a newer operation")
def test_experts_in_one_grouped_product() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(2, 16, 24)), nn.Parameter(torch.randn(2, 24, 16))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([3, 8], dtype=torch.int32)
            hidden = torch._grouped_mm(x, self.up, offs=ends).relu()
            return torch._grouped_mm(hidden, self.down, offs=ends)

    model, x = Experts(), torch.randn(8, 16)
    assert pw.measure(model, x).macs == 2 * 8 * 16 * 24
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.5)), x)
    assert small.up.shape == (2, 16, 12)
    assert small.down.shape == (2, 12, 16)
    assert [g.multiple for g in pw.channel_groups(model, x) if g.prunable] == [4], "rows start at multiples of 16 bytes"
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.75), round_to=3), x)
    assert small.up.shape == (2, 16, 12), "a multiple of both"


def test_a_vector_along_the_head_size_leaves_whole_heads() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
            self.scale, self.out = nn.Parameter(torch.rand(4)), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = (q * self.scale @ k.transpose(-1, -2)).softmax(-1) @ v
            return self.out(y.transpose(1, 2).flatten(2))

    model, x = Scaled(), torch.randn(2, 5, 12)
    assert [(g.name, g.size) for g in pw.channel_groups(model, x) if g.prunable] == [("q", 3)]
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.8)), x)
    assert type(small) is Scaled


def test_heads_of_weights_that_einsum_takes_in_another_order() -> None:
    """As XLNet's: weights of shape (width, heads, head size), biases per head, a table of positions."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o, self.r = (nn.Parameter(torch.randn(16, 4, 8) / 4) for _ in range(5))
            self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
            self.up, self.head = nn.Linear(5, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x).transpose(0, 1)
            places = torch.arange(16, dtype=x.dtype).sin().expand(*x.shape[:2], 16)
            q, k, v = (torch.einsum("ibh,hnd->ibnd", x, w) for w in (self.q, self.k, self.v))
            r = torch.einsum("ibh,hnd->ibnd", places, self.r)
            scores = torch.einsum("ibnd,jbnd->bnij", q + self.a, k) + torch.einsum("ibnd,jbnd->bnij", q + self.b, r)
            y = torch.einsum("bnij,jbnd->ibnd", scores.softmax(-1), v)
            return self.head(x + torch.einsum("ibnd,hnd->ibh", y, self.o))

    torch.manual_seed(0)
    model, x = Attends().double(), torch.randn(2, 6, 5).double()
    assert [(g.name, g.size) for g in pw.channel_groups(model, x) if g.prunable] == [("up", 16), ("q[1]", 4)]
    small = Surgeon.of(model, x).sliced(model, {"up": (0, 2, 3, 8, 11), "q[1]": (1, 3)})
    assert small.o.shape == (5, 2, 8)
    assert small.r.shape == (16, 2, 8)


def test_a_copy_of_a_weight_that_is_changed_is_not_the_weight() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = nn.Linear(5, 8), nn.Parameter(torch.randn(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w.clone()
            w.view(-1).add_(1.0)
            return self.a(x).relu() @ w

    group = next(g for g in pw.channel_groups(Changes(), torch.zeros(2, 5)) if g.name == "a")
    assert "also goes into aten.add_" in group.reason
