"""Norms over channels do not pin them: what is closed is left out of their averages, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunewise as pw
from prunewise.core.norms import find_norms
from prunewise.core.trace import record

D = 12


class HandWrittenRms(nn.Module):
    """As in many language models."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)


class RmsInFloat32(HandWrittenRms):
    """Computed in another dtype than it is given."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-2)
        return self.weight * h.to(x.dtype)


class HandWrittenLayerNorm(nn.Module):
    """Mean and variance one after another."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.g * (x - mean) / torch.sqrt(variance + 1e-2) + self.b


class WithItsSize(nn.Module):
    """The functional form, with the size in an attribute."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shape = (size,)
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight)


class WithoutParameters(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


class Unbiased(HandWrittenRms):
    """Divides by one less than the size: the average over fewer channels is another one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


class L2(HandWrittenRms):
    """A sum in place of a mean."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.normalize(x, dim=-1)


class Softmaxed(HandWrittenRms):
    """Mixes the channels, but not as a norm does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)).tanh() * x.mean(-1, keepdim=True)


class Tokens(nn.Module):
    """A residual stream with norms before the branches and at the end."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.norms = nn.ModuleList([norm(D) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(D, 2 * D) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(2 * D, D) for _ in range(2)])
        self.head = nn.Linear(D, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, up, down in zip(self.norms, self.up, self.down):  # noqa: B905
            x = x + down(up(norm(x)).relu())
        return self.head(self.norms[2](x))


class OneNorm(Tokens):
    """The same module for every norm, called by keyword."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(self.norms[0](input=x)).relu())
        return self.head(self.norms[0](input=x))


class ChannelsFirst(nn.Module):
    """As in convolutional networks of the transformer kind."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + 1e-2).sqrt()
        return self.g[:, None, None] * x + self.b[:, None, None]


class Permuted(nn.LayerNorm):
    """A layer norm over the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WithActivation(ChannelsFirst):
    """A norm that goes on: dropout, then an activation, in modules of their own."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.act, self.drop, self.first = nn.GELU(), nn.Dropout(0.0), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(self.first(x))))


class Images(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.norms = nn.ModuleList([norm(D), norm(D)])
        self.inner = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.mix = nn.Conv2d(D, D, 1)
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mix(self.inner(self.norms[0](x)).relu())
        return self.head(self.norms[1](x).mean((2, 3)))


def made(kind: type[nn.Module], norm: Callable[[int], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = kind(norm).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    inputs = torch.randn(2, 3, 5, 5).double() if issubclass(kind, Images) else torch.randint(20, (2, 5))
    return model, inputs


NORMS = {
    "layer norm": (Tokens, nn.LayerNorm),
    "rms norm": (Tokens, nn.RMSNorm),
    "hand-written rms": (Tokens, HandWrittenRms),
    "hand-written layer norm": (Tokens, HandWrittenLayerNorm),
    "size in an attribute": (Tokens, WithItsSize),
    "without parameters": (Tokens, WithoutParameters),
    "one module, by keyword": (OneNorm, nn.LayerNorm),
    "channels first": (Images, ChannelsFirst),
    "permuted": (Images, Permuted),
    "with its activation": (Images, WithActivation),
    "one group": (Images, lambda size: nn.GroupNorm(1, size)),
}


def half(session: pw.GateSession) -> dict[str, tuple[int, ...]]:
    torch.manual_seed(1)
    return {g.name: tuple(sorted(torch.randperm(g.size)[: g.size // 2].tolist())) for g in session.groups}


@pytest.mark.parametrize("case", NORMS)
def test_gated_is_small_through_a_norm(case: str) -> None:
    model, inputs = made(*NORMS[case])
    whole = model(inputs)
    gates = pw.attach_gates(model, inputs, budget=pw.Budget(macs=0.5), total_steps=10)
    assert any(g.size == D for g in gates.groups), "the residual stream has gates"
    gates.control.keep = half(gates)
    gates._show(gates.control.keep)
    gated = model(inputs)
    gated.square().sum().backward()
    assert all(value.grad.isfinite().all() and value.grad.any() for value in gates.parameters())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    small = gates.finish(averaged.module)
    assert type(small) is type(model)
    torch.testing.assert_close(small(inputs), gated, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(inputs), whole)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *small.modules()])


def test_a_norm_in_lower_precision() -> None:
    model, inputs = made(Tokens, RmsInFloat32)
    plan = pw.plan_channels(model, inputs, budget=pw.Budget(macs=0.4))
    small = pw.apply_plan(model.float(), plan, inputs)
    assert small.head.weight.shape[1] < D


@pytest.mark.parametrize("norm", [Unbiased, L2, Softmaxed])
def test_what_is_no_such_norm_pins_the_stream_and_says_so(norm: type[nn.Module]) -> None:
    model, inputs = made(Tokens, norm)
    stream = next(g for g in pw.channel_groups(model, inputs) if g.name == "embed.weight[1]")
    assert not stream.prunable
    assert "in norms.0" in stream.reason


def test_pooling_over_one_position_is_no_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, D, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, 4)).double()
    image = torch.randn(1, 3, 2, 2).double()
    assert find_norms(model, record(model, image)) == []
    gates = pw.attach_gates(model, image, budget=pw.Budget(macs=0.5), total_steps=10)
    gates.control.keep = half(gates)
    gates._show(gates.control.keep)
    gated = model(image)
    torch.testing.assert_close(gates.finish()(image), gated, rtol=1e-10, atol=1e-10)


def test_a_norm_inside_a_larger_forward_pins() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, D), nn.Linear(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5))

    groups = pw.channel_groups(Inline(), torch.zeros(2, 6))
    assert "aten.mean.dim" in next(g for g in groups if g.name == "a").reason


def test_norms_are_found_on_the_meta_device_too() -> None:
    model, inputs = made(Tokens, HandWrittenRms)
    model = model.to("meta")
    inputs = inputs.to("meta")
    assert [n.path for n in find_norms(model, record(model, inputs))] == ["norms.0", "norms.1", "norms.2"]


def test_looking_for_norms_leaves_the_model_alone() -> None:
    model, inputs = made(Tokens, HandWrittenLayerNorm)
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pw.channel_groups(model, inputs)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("first", ["stream", "input"])
def test_a_norm_that_also_normalises_what_must_stay(first: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6, elementwise_affine=False)
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            if first == "stream":
                return self.b(self.norm(self.a(x))) + self.c(self.norm(x))
            return self.c(self.norm(x)) + self.b(self.norm(self.a(x)))

    groups = {g.name: g for g in pw.channel_groups(Twice(), torch.zeros(2, 6))}
    assert not groups["a"].prunable
    assert "in norm" in groups["a"].reason


def test_a_norm_on_inputs_of_several_ranks() -> None:
    class Ranks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, D), nn.LayerNorm(D), nn.Linear(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(self.norm(h) + self.norm(h.mean(1)).unsqueeze(1))

    model, x = Ranks().double(), torch.randn(2, 5, 6).double()
    gates = pw.attach_gates(model, x, budget=pw.Budget(macs=0.8), total_steps=5)
    gates.control.keep = half(gates)
    gates._show(gates.control.keep)
    gated = model(x)
    torch.testing.assert_close(gates.finish()(x), gated, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:the small|the rebuilt")
def test_a_graph_module_has_the_norms_of_what_is_left() -> None:
    class Baked(Tokens):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norms[0](self.embed(tokens)).reshape(-1, 12)
            return self.head(self.norms[1](x + self.down[0](self.up[0](x).relu())))

    model, inputs = made(Baked, nn.LayerNorm)
    plan = pw.plan_channels(model, inputs, budget=pw.Budget(macs=0.4))
    small = pw.apply_plan(model, plan, inputs)  # which compares it with the masked model
    assert isinstance(small, torch.fx.GraphModule)
    assert len(small.get_parameter("norms.1.weight")) < D


def test_a_single_group_stays_one_in_a_graph_module() -> None:
    class Baked(Images):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norms[0](self.stem(x))
            x = x + self.mix(self.inner(x).relu())
            return self.head(self.norms[1](x).view(-1, 12, 25).mean(2))

    model, inputs = made(Baked, lambda size: nn.GroupNorm(1, size))
    plan = pw.plan_channels(model, inputs, budget=pw.Budget(macs=0.5))
    with pytest.warns(UserWarning, match="graph module"):
        small = pw.apply_plan(model, plan, inputs)  # which compares it with the masked model
    assert small.head.weight.shape[1] < D
