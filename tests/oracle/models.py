"""Small models with something odd about each: what real code does, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune  # noqa: F401  (torch.nn.utils.prune is not imported by torch)


@dataclass(frozen=True)
class Odd:
    """A model, its inputs, and whether something of it should be removable (None: whatever the tool finds)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    prunable: bool | None = True


ODD: dict[str, Odd] = {}


def odd(*shapes: tuple[int, ...], prunable: bool | None = True, inputs: Callable[[], Any] | None = None) -> Any:
    def register(cls: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        make = inputs or (lambda: tuple(torch.randn(*s) for s in shapes))
        ODD[cls.__name__] = Odd(cls, make, prunable)
        return cls

    return register


def functional(*shapes: tuple[int, ...], prunable: bool | None = True) -> Any:
    """Register fn(x) between a convolution (6 → 12 channels... → 5 classes) and a head."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Conv2d(3, 12, 3, padding=1)
                self.bn = nn.BatchNorm2d(12)
                self.b = nn.Conv2d(3, 12, 3, padding=1)
                with torch.no_grad():
                    channels = fn(torch.zeros(2, 12, 4, 4), torch.zeros(2, 12, 4, 4)).shape[1]
                self.c = nn.Conv2d(channels, 5, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.c(fn(self.bn(self.a(x)), self.b(x))).mean((2, 3))

        Model.__name__ = Model.__qualname__ = fn.__name__
        ODD[fn.__name__] = Odd(Model, lambda: (torch.randn(2, 3, 4, 4),), prunable)
        return fn

    return register


# -- what may stand between a producer and a reader ---------------------------------------------------------------


@functional()
def relu_inplace_chain(x: Tensor, y: Tensor) -> Tensor:
    x = F.relu_(x)
    x += y
    x.mul_(2).clamp_(max=3)
    return x.sigmoid_()


@functional()
def negative_dims(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], dim=-3).transpose(-3, -1).transpose(-1, -3)


@functional()
def squeeze_unsqueeze(x: Tensor, y: Tensor) -> Tensor:
    x = x.unsqueeze(-1).unsqueeze(1).squeeze(1).squeeze(-1)
    return (x.unsqueeze(2) * y[:, :, None]).squeeze(2)


@functional(prunable=None)
def step_slice(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x[:, ::2], y[:, 1::2]], 1)


@functional(prunable=None)
def middle_slice(x: Tensor, y: Tensor) -> Tensor:
    return x[:, 3:9] + y[:, 2:8]


@functional(prunable=None)
def slice_write(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 4:] = y[:, 4:]
    out[:, :4] += x[:, :4]
    return out


@functional(prunable=None)
def index_write(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out[:, [1, 3]] = y[:, [0, 2]]
    return out


@functional(prunable=None)
def select_write(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out[:, 5] = y[:, 2]
    return out


@functional(prunable=None)
def unequal_chunks(x: Tensor, y: Tensor) -> Tensor:
    a, b, c = torch.cat([x, y[:, :2]], 1).chunk(3, 1)  # 5, 5, 4
    return torch.cat([a * b, c], 1)


@functional(prunable=None)
def equal_chunks(x: Tensor, y: Tensor) -> Tensor:
    a, b, c = x.chunk(3, 1)
    return torch.cat([a * b, c, y], 1)


@functional()
def cat_along_batch(x: Tensor, y: Tensor) -> Tensor:
    both = torch.cat([x, y], 0)
    return both[: len(x)] * both[len(x) :]


@functional()
def stack_and_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y.tanh(), x * y]).sum(0)


@functional()
def where(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > 0, x, y).masked_fill(y > 1, 0.5)


@functional(prunable=None)
def softmax_over_channels(x: Tensor, y: Tensor) -> Tensor:
    return x.softmax(1) * y


@functional(prunable=None)
def normalise_over_channels(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=1) + y


@functional(prunable=None)
def mean_over_channels(x: Tensor, y: Tensor) -> Tensor:
    return x * y.mean(1, keepdim=True) + y.amax(1, keepdim=True)


@functional(prunable=None)
def sum_over_channels(x: Tensor, y: Tensor) -> Tensor:
    return x * y.sum(1, keepdim=True)


@functional(prunable=None)
def correlation(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("nchw,ncij->nhwij", x, y).flatten(3).permute(0, 3, 1, 2)


@functional(prunable=None)
def flip_channels(x: Tensor, y: Tensor) -> Tensor:
    return x + y.flip(1)


@functional(prunable=None)
def roll_channels(x: Tensor, y: Tensor) -> Tensor:
    return x + y.roll(1, 1)


@functional(prunable=None)
def shift_channels(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :4, 1:] = x[:, :4, :-1]
    out[:, 4:8, :-1] = x[:, 4:8, 1:]
    out[:, 8:] = x[:, 8:]
    return out * y


@functional(prunable=None)
def cumulative(x: Tensor, y: Tensor) -> Tensor:
    return x.cumsum(1) + y


@functional(prunable=None)
def pool_over_channels(x: Tensor, y: Tensor) -> Tensor:
    return F.avg_pool3d(x.unsqueeze(1), (3, 1, 1), (3, 1, 1)).squeeze(1) + y[:, ::3]


@functional(prunable=None)
def response_norm(x: Tensor, y: Tensor) -> Tensor:
    return F.local_response_norm(x, 3) + y


@functional(prunable=None)
def maxout(x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 2, 2, h, w).amax(2) + y.view(n, 2, c // 2, h, w).amax(1)


@functional(prunable=None)
def merge_two_labelled(x: Tensor, y: Tensor) -> Tensor:
    outer = x.mean((2, 3))[:, :, None] * y.mean((2, 3))[:, None, :]  # (N, 12, 12)
    return outer.reshape(len(x), 144, 1, 1)


@functional(prunable=None)
def outer_transposed(x: Tensor, y: Tensor) -> Tensor:
    outer = x.mean((2, 3))[:, :, None] * y.mean((2, 3))[:, None, :]
    return (outer + outer.transpose(1, 2)).sum(2)[:, :, None, None]


@functional(prunable=None)
def heads_then_cat(x: Tensor, y: Tensor) -> Tensor:
    """One part loses rows, the other columns, then they stand side by side."""
    n, c, h, w = x.shape
    a, b = x.view(n, 4, 3, h, w), y.view(n, 4, 3, h, w)
    rows = F.layer_norm(a.permute(0, 1, 3, 4, 2), (3,)).flatten(2).mean(-1)
    columns = b.mean(1)
    both = torch.cat([a, b], 1).flatten(1, 2)
    return both * rows.mean() + columns.mean((1, 2, 3))[:, None, None, None]


@functional(prunable=None)
def rows_and_columns(x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = x.shape
    rows = x.view(n, 4, 3, h, w)
    return (rows * y.mean((2, 3)).view(n, 4, 3).softmax(1)[..., None, None]).flatten(1, 2)


@functional(prunable=None)
def shuffle_by_hand(x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w) + y


@functional(prunable=None)
def divided_by_width(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) / x.shape[1] ** 0.5


@functional(prunable=None)
def width_in_tensor(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) / torch.tensor(float(y.shape[1]), dtype=x.dtype)


@functional(prunable=None)
def width_in_mask(x: Tensor, y: Tensor) -> Tensor:
    ramp = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]
    return x * ramp + y


@functional(prunable=None)
def sort_channels(x: Tensor, y: Tensor) -> Tensor:
    return x.sort(1).values + y


@functional(prunable=None)
def top_channels(x: Tensor, y: Tensor) -> Tensor:
    return x.topk(4, 1).values + y[:, :4]


@functional(prunable=None)
def gather_channels(x: Tensor, y: Tensor) -> Tensor:
    index = y.mean((2, 3), keepdim=True).argsort(1).expand_as(x)
    return x.gather(1, index)


@functional(prunable=None)
def fft_space(x: Tensor, y: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:]) + y


@functional(prunable=None)
def complex_pairs(x: Tensor, y: Tensor) -> Tensor:
    z = torch.view_as_complex(x.permute(0, 2, 3, 1).reshape(2, 4, 4, 6, 2).contiguous())
    return torch.view_as_real(z * z).flatten(3).permute(0, 3, 1, 2) + y


@functional(prunable=None)
def unfold_space(x: Tensor, y: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1), (4, 4), 3, padding=1) + y


@functional(prunable=None)
def group_norm_in_code(x: Tensor, y: Tensor) -> Tensor:
    return F.group_norm(x, 4) + F.group_norm(y, 3)


@functional()
def instance_norm_in_code(x: Tensor, y: Tensor) -> Tensor:
    return F.instance_norm(x) + y


@functional()
def repeat_and_tile(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.repeat(1, 2, 1, 1), y.repeat_interleave(2, dim=1)], 1)


@functional(prunable=None)
def repeat_meets_interleave(x: Tensor, y: Tensor) -> Tensor:
    return x.repeat(1, 2, 1, 1) + y.repeat_interleave(2, dim=1)


@functional(prunable=None)
def unbind_channels(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([a * b for a, b in zip(x.unbind(1), y.unbind(1), strict=True)], 1)


@functional(prunable=None)
def boolean_index(x: Tensor, y: Tensor) -> Tensor:
    return x[:, torch.arange(x.shape[1]) % 2 == 0] + y[:, :6]


@functional(prunable=None)
def strided_view(x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.contiguous().as_strided((n, c // 2, h, w), (c * h * w, 2 * h * w, w, 1)) + y[:, :6]


@functional()
def through_matmul(x: Tensor, y: Tensor) -> Tensor:
    a = y.flatten(2).mean(1, keepdim=True).transpose(1, 2) @ y.flatten(2).mean(1, keepdim=True)
    return (x.flatten(2) @ a).view_as(x)


@functional(prunable=None)
def channel_attention(x: Tensor, y: Tensor) -> Tensor:
    q, k = x.flatten(2), y.flatten(2)
    return ((q @ k.transpose(1, 2)).softmax(-1) @ k).view_as(x)


@functional(prunable=None)
def glu_channels(x: Tensor, y: Tensor) -> Tensor:
    return F.glu(torch.cat([x, y], 1), 1)


@functional(prunable=None)
def bilinear_pool(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("nihw,njhw->nij", x, y).flatten(1)[:, :, None, None]


@functional(prunable=None)
def max_over_pairs(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x[:, 0::2], x[:, 1::2]) + y[:, :6]


@functional()
def pad_channels(x: Tensor, y: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 0)) + y


@functional(prunable=None)
def pad_channels_both_sides(x: Tensor, y: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 3, 3), value=0.7) + F.pad(y, (0, 0, 0, 0, 0, 6))


@functional()
def pad_space(x: Tensor, y: Tensor) -> Tensor:
    return F.pad(F.pad(x, (1, 1, 1, 1), mode="circular"), (1, 1, 1, 1), mode="reflect")[:, :, 2:-2, 2:-2] + y


@functional()
def movedim_and_back(x: Tensor, y: Tensor) -> Tensor:
    return (x.movedim(1, -1) * y.permute(0, 2, 3, 1)).movedim(-1, 1)


@functional(prunable=None)
def swap_channels_and_space(x: Tensor, y: Tensor) -> Tensor:
    x = x.reshape(2, 4, 3, 4, 4).permute(0, 3, 2, 1, 4).reshape(2, 12, 4, 4)
    return x + y


@functional(prunable=None)
def view_across(x: Tensor, y: Tensor) -> Tensor:
    return x.reshape(2, 16, 3, 4).reshape(2, 12, 4, 4) + y


@functional(prunable=None)
def diagonal(x: Tensor, y: Tensor) -> Tensor:
    return torch.diagonal(x[:, :, None] * y[:, None], dim1=1, dim2=2).movedim(-1, 1)


@functional(prunable=None)
def triangular(x: Tensor, y: Tensor) -> Tensor:
    return (x.movedim(1, -1).tril() + y.movedim(1, -1)).movedim(-1, 1)


@functional(prunable=None)
def transposed_in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.transpose_(1, 2)
    z.mul_(2.0)
    z.transpose_(1, 2)
    return z + y


@functional(prunable=None)
def squared_in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x.mean((2, 3))[:, :, None].expand(-1, -1, 12).clone()
    z.transpose_(1, 2)
    return (z * y.mean((2, 3))[:, None, :]).sum(1)[:, :, None, None]


@functional(prunable=None)
def written_through_view(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.view(2, 4, 3, 4, 4)[:, 1:3].mul_(y.view(2, 4, 3, 4, 4)[:, :2])
    return z


@functional(prunable=None)
def scan(x: Tensor, y: Tensor) -> Tensor:
    out, h = [], x[:, :, 0]
    for t in range(4):
        h = torch.tanh(h + y[:, :, t])
        out.append(h)
    return torch.stack(out, 2)


@functional(prunable=None)
def grid(x: Tensor, y: Tensor) -> Tensor:
    return F.grid_sample(x, y[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False) + y


@functional(prunable=None)
def std_over_channels(x: Tensor, y: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1) + y


@functional(prunable=None)
def squeeze_may_bite(x: Tensor, y: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(x, 1).squeeze()
    return (y.transpose(0, 1).transpose(0, 1) * pooled[:, :, None, None]) if pooled.dim() == 2 else y


@functional(prunable=None)
def branch_on_width(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[1] == 12 else x - y


@functional(prunable=None)
def branch_on_narrow(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[1] > 6 else x + y.roll(1, 2)


@functional(prunable=None)
def unknown_inplace_on_view(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[:, 2:6].index_fill_(1, torch.tensor([1]), 0.25)
    return z + y


@functional(prunable=None)
def scatter_add(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(1, torch.arange(12) // 2, y) + x


@functional(prunable=None)
def split_by_size(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.split([4, 8], 1)
    return torch.cat([b.sigmoid(), a], 1) + y


@functional(prunable=None)
def dense_growth(x: Tensor, y: Tensor) -> Tensor:
    z = torch.cat([x, y], 1)
    z = torch.cat([z, z * 2], 1)
    return torch.cat([z, x], 1).relu()


# -- whole models -------------------------------------------------------------------------------------------------


@odd((2, 6))
class SharedWeight(nn.Module):
    """One parameter read by two operations on different data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.w = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).relu(), self.w) * F.linear(self.b(x).tanh(), self.w)


@odd((2, 8))
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(8, 12)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.enc(x).relu(), self.enc.weight.t(), self.bias)


@odd((2, 8), prunable=None)
class TiedAcrossModules(nn.Module):
    """The same parameter as the weight of two layers in a chain: inputs and outputs become one group."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(self.inp(x)).relu()).relu())


@odd((2, 8))
class TiedReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(8, 10)
        self.c, self.d = nn.Linear(10, 4), nn.Linear(10, 4)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).relu()) - self.d(self.b(x).relu())


@odd((2, 8))
class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.b(self.a(x).relu())).relu())


@odd((2, 8), prunable=None)
class DividesByItsReader(nn.Module):
    """A weight that is read is also divided by: a zero there would give an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 10)
        self.w = nn.Parameter(torch.rand(10) + 0.5)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(h / self.w) + (h @ self.w)[:, None]


@odd((2, 8), prunable=None)
class ClampsItsReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 10)
        self.b = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.b.weight.clamp(min=0.1), self.b.bias)


@odd((2, 8), prunable=None)
class ReaderWritten(nn.Module):
    """The weight is projected in place in the forward pass (weight clipping)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 10)
        self.b = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.data.clamp_(min=0.1)
        return self.b(self.a(x))


@odd((2, 8), prunable=None)
class StandardisedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.b.weight
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return F.linear(self.a(x).relu(), w)


@odd((1, 3, 5, 5))
class BatchOfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.b = nn.Conv2d(8, 8, 3, groups=8)
        self.c = nn.Linear(8 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x)).relu()).flatten(1))


@odd((2, 1, 6, 6))
class WidthOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 6, 1)
        self.c, self.d = nn.Conv2d(6, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)).relu()).relu())


@odd((2, 4, 6, 6))
class GroupedForms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.c = nn.Conv2d(24, 12, 3, padding=1, groups=6)
        self.d = nn.Conv2d(12, 24, 1, groups=12)
        self.e = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x).relu()
        return self.e(x)


@odd((2, 4, 5, 5))
class GroupedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 12, 1)
        self.b = nn.ConvTranspose2d(12, 24, 3, stride=2, groups=3)
        self.c = nn.ConvTranspose2d(24, 24, 2, groups=24)
        self.d = nn.ConvTranspose2d(24, 12, 2, groups=12)
        self.e = nn.ConvTranspose2d(12, 24, 2, groups=12)
        self.f = nn.ConvTranspose2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d, self.e):
            x = layer(x).relu()
        return self.f(x)


@odd((2, 3, 4, 6))
class LinearOn4d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.norm = nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).relu())


@odd(inputs=lambda: ({"a": (torch.randn(2, 6), [torch.randn(2, 6)]), "n": 3, "flag": None, "name": "x"}, 2.0))
class NestedInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, data: dict[str, Any], factor: float) -> dict[str, Any]:
        (p, (q,)) = data["a"]
        out = self.b((self.a(p) + factor * self.a(q)).relu()) * data["n"]
        return {"out": (out, None, 7), "shape": out.shape, "list": [out.sum(), "text"]}


@odd((2, 6))
class ReturnsOddThings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return None, self.b(self.a(x).relu()), 3, ("a", [None])


@odd((2, 6), prunable=None)
class ReturnsMinusInfinity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x).relu())
        return out.masked_fill(torch.tensor([True, False, False]), float("-inf"))


@odd((2, 6))
class NoisyInEval(nn.Module):
    """Draws random numbers in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mu, self.sigma = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(10, 4)
        self.b = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        mu = self.mu(h)
        z = mu + torch.randn(x.shape[0], 1, dtype=x.dtype) * self.sigma(h)
        return self.b(z)


@odd((2, 6), prunable=None)
class Counts(nn.Module):
    """Changes a buffer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.a(x).relu()
        self.seen.lerp_(h.mean(0), 0.1)
        return self.b(h - self.seen)


@odd((2, 3, 6, 6))
class BlurPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        kernel = (kernel[:, None] * kernel)[None, None] / 16
        self.register_buffer("kernel", kernel.repeat(8, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(F.conv2d(x, self.kernel, stride=2, padding=1, groups=x.shape[1]))


@odd((2, 3, 6, 6))
class BlurPoolExpanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return self.b(F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1]))


@odd((2, 3, 6, 6), prunable=None)
class FixedMixing(nn.Module):
    """A buffer mixes the channels: nothing to mask there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("mix", torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv2d(self.a(x).relu(), self.mix))


@odd((4, 3, 5, 5))
class FunctionalBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("mean", torch.randn(8), persistent=False)
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.a(x), self.mean, self.var, self.gain, None, self.training, 0.1)
        return self.b(self.scale * x.relu())


@odd((4, 6))
class TrainsAnotherWay(nn.Module):
    """In training the channels are mixed; the eval pass does not show it, and no parameter tells."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.training:
            h = h / (1 + h.norm(dim=1, keepdim=True))
        return self.b(h)


TrainsAnotherWay = TrainsAnotherWay
ODD["TrainsAnotherWay"] = Odd(TrainsAnotherWay, ODD["TrainsAnotherWay"].inputs, None)


@odd((4, 6), prunable=None)
class TrainsOnSlices(nn.Module):
    """An auxiliary head that only training uses reads some channels by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return (self.b(h), self.aux(h[:, 3:7])) if self.training else self.b(h)


@odd((2, 7, 6), prunable=None)  # einsum merges two labelled dimensions of a weight
class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 12) for _ in range(3))
        self.o = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, -1)) for f in (self.q, self.k, self.v))
        a = torch.einsum("nqhd,nkhd->nhqk", q, k).mul(0.5).softmax(-1)
        return torch.einsum("nqhd,hdo->nqo", torch.einsum("nhqk,nkhd->nqhd", a, v), self.o)


@odd((2, 7, 8))
class AttentionModule(nn.Module):
    """The way most call nn.MultiheadAttention: batch first, and the averaged weights thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(8, 4, batch_first=True)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x, x, x)[0])


@odd((2, 7, 8))
class AttentionWithoutWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(8, 4, batch_first=True)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x, x, x, need_weights=False)[0])


@odd((2, 7, 8), prunable=None)
class AttentionWeightsUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(8, 4, batch_first=True)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.a(x, x, x)
        return self.b(out), weights


@odd((2, 7, 8), prunable=None)
class AttentionPerHeadMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(8, 4, batch_first=True)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.linspace(-1, 1, 4, dtype=x.dtype).repeat(len(x))[:, None, None].expand(-1, 7, 7)
        return self.b(self.a(x, x, x, need_weights=False, attn_mask=mask)[0])


@odd((2, 7, 8), prunable=None)
class AttentionExtraKeys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(8, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x, x, x, need_weights=False)[0])


@odd((2, 7, 8))
class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.a = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@odd((2, 7, 6), prunable=None)
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Linear(6, 8)
        self.a, self.b = nn.LSTM(8, 10, batch_first=True), nn.GRU(10, 6, batch_first=True)
        self.c = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(self.pre(x).relu())[0])[0])


@odd((2, 7, 6))
class RecurrentCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.GRUCell(6, 8), nn.LSTMCell(8, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, s = x.new_zeros(len(x), self.a.hidden_size), None
        for t in range(x.shape[1]):
            h = self.a(x[:, t], h)
            s = self.b(h, s)
        return self.c(s[0])


@odd((2, 3, 6, 6))
class BroadcastParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.addcmul(self.shift, self.a(x), self.scale).abs())


@odd((2, 6), prunable=None)
class ScalarParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.t = nn.Parameter(torch.tensor(1.5))
        self.act = nn.PReLU(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x) * self.t.exp()))


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@odd((2, 6))
class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(_Twice.apply(self.a(x)))


@odd((2, 6))
class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda t: self.b(self.a(t).relu()), x, use_reentrant=False)


@odd((2, 6), prunable=None)
class CachesInDict(nn.Module):
    """Makes a table on first use and keeps it in a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.tables: dict[int, Tensor] = {}
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.tables:
            self.tables[len(x)] = torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None]
        h = self.a(x).relu()
        self.log.append(h)
        return self.b(h * self.tables[len(x)])


@odd((2, 6), prunable=None)
class PlainTensor(nn.Module):
    """A tensor on the module that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.scale = torch.linspace(0.5, 1.5, 10, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale.to(x.dtype))


_OUTSIDE = nn.Linear(10, 10).double()


@odd((2, 6), prunable=None)
class UsesAnOutsider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(_OUTSIDE(self.a(x).double()).to(x.dtype))


@odd((2, 6))
class InParameterList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10, 8))])
        self.d = nn.ParameterDict({"last": nn.Parameter(torch.randn(8, 3))})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.w:
            x = (x @ w).relu()
        return x @ self.d["last"]


@odd((2, 5, 6), prunable=None)  # einsum merges two labelled dimensions of a weight
class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("nti,eij->netj", x, self.up).relu()
        y = torch.einsum("netj,ejo->neto", h, self.down)
        return torch.einsum("nte,neto->nto", self.gate(x).softmax(-1), y)


@odd((2, 5, 6))
class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 9), nn.Linear(9, 5)
        self.c, self.d = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(F.gelu(self.a(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.d(F.gelu(self.c(x)))


@odd((2, 6), prunable=None)
class ConstantChannels(nn.Module):
    """An input of one channel, repeated by expand, read by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, :1].expand(-1, 8))


@odd((2, 4, 6, 6))
class PackedWeights(nn.Module):
    """Two layers' weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Conv2d(4, 6, 1)
        self.w = nn.Parameter(torch.randn(20, 6, 1, 1))
        self.out = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w.chunk(2)
        x = self.pre(x).relu()
        return self.out(F.conv2d(x, a).relu() * F.conv2d(x, b))


@odd((2, 8), prunable=None)
class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 10)
        self.u, self.v = nn.Parameter(torch.randn(10, 4)), nn.Parameter(torch.randn(4, 8))
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.base.weight + self.u @ self.v, self.base.bias).relu())


@odd((2, 4, 6, 6), prunable=None)
class DynamicConvolution(nn.Module):
    """The weight is made by a network."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, 1)
        self.make = nn.Linear(4, 6 * 6)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.make(x.mean((0, 2, 3))).view(6, 6, 1, 1)
        return self.out(F.conv2d(self.a(x).relu(), w).relu())


@odd((2, 8))
class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.a, self.b, self.c = norm(nn.Linear(8, 10)), norm(nn.Linear(10, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


@odd((2, 8))
class LegacyWeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.weight_norm
        self.a, self.b, self.c = norm(nn.Linear(8, 10)), norm(nn.Linear(10, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


@odd((2, 8), prunable=None)
class SpectralNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.a, self.b, self.c = norm(nn.Linear(8, 10)), norm(nn.Linear(10, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class _Transposed(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.t()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.t()


@odd((2, 8))
class ParametrisedByAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(10, 3)
        nn.utils.parametrize.register_parametrization(self.b, "weight", _Transposed())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@odd((2, 8), prunable=None)
class MaskedByTorch(nn.Module):
    """torch.nn.utils.prune has been here before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 3)
        nn.utils.prune.random_unstructured(self.b, "weight", 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class _Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).relu()


@odd((2, 6), prunable=None)
class ScriptedInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = nn.Linear(6, 10), torch.jit.script(_Scripted()), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.s(self.a(x)))


@odd((2, 6))
class ReadsStoredWeight(nn.Module):
    """The forward takes the parameter out of the module's own dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = dict(self.b.named_parameters())["weight"] if hasattr(self, "never") else getattr(self.b, "weight")  # noqa: B009
        return F.linear(self.a(x).relu(), w, self.b.bias)


@odd((2, 6), prunable=None)
class ReadsNamedParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = next(p for p in self.b.parameters() if p.dim() == 2)
        return F.linear(self.a(x).relu(), w, self.b.bias)


@odd((2, 6), prunable=None)
class KeepsAReference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)
        self.refs = [self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).relu(), self.refs[0], self.b.bias)


@odd((2, 6), prunable=None)
class OneStorageTwoParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.c.weight = nn.Parameter(self.b.weight.data)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.out(self.b(h) + self.c(h.flip(1)))


@odd((2, 6))
class LayersInLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a.b".replace(".", "_"): nn.Linear(6, 10), "c": nn.Linear(10, 10)})
        self.same = nn.ModuleList([self.layers["c"], nn.Linear(10, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.same[1](self.same[0](self.layers["a_b"](x).relu()).relu())


@odd((2, 6))
class ManyReadersOneUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.dead = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(10, 7)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.dead(h).sum()
        return self.b(h)


@odd(inputs=lambda: (torch.randint(0, 11, (2, 5)),))
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return F.linear(x + self.down(F.gelu(self.up(x))), self.emb.weight)


@odd(inputs=lambda: (torch.randint(0, 11, (2, 5)),), prunable=None)
class EmbeddingMaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, max_norm=1.0)
        self.bag = nn.EmbeddingBag(11, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.emb(ids).mean(1) + self.bag(ids))


@odd((2, 5), (2, 6), prunable=None)
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(6, 8), nn.Bilinear(7, 8, 9)
        self.d = nn.Linear(9, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.d(self.c(self.a(x), self.b(y)))


@odd((2, 4, 12))
class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv1d(4, 8, 3, padding="same", padding_mode="circular"), nn.GroupNorm(4, 8)
        self.t = nn.ConvTranspose1d(8, 6, 2, stride=2, output_padding=1)
        self.b = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool1d(self.t(self.n(self.a(x))), 2))


@odd((2, 12))
class WidthsAlikeEverywhere(nn.Module):
    """Every width is the same number, and that is the kernel size and the number of classes too."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 3
        self.a, self.b = nn.Conv1d(1, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding=1)
        self.c = nn.Linear(3 * 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x[:, None]).relu()).relu()
        return self.c(h.reshape(len(x), self.n * 12)) * self.n


@odd((2, 6), prunable=None)
class WidthAsFactor(nn.Module):
    """The same attribute is a width and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 10
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(-1, self.width).relu()) / self.width


@odd((2, 8))
class DepthwiseInCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(1, 8, 3, padding=1)
        self.w = nn.Parameter(torch.randn(8, 1, 3))
        self.b = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x[:, None]).relu()
        return self.b(F.conv1d(h, self.w, padding=1, groups=h.shape[1]))
