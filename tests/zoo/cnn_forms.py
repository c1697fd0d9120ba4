"""Forms inside convolutional models: norms, attention, splits, buffers, shuffled pixels, weight norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .registry import image, register


class Head(nn.Module):
    def __init__(self, channels: int, num_classes: int = 5):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x).flatten(1))


def conv3x3(i: int, o: int, stride: int = 1, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, stride, 1, **kwargs)


def cbr(i: int, o: int, k: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class ResGN(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.conv1, self.norm1 = conv3x3(c, c), nn.GroupNorm(groups, c)
        self.conv2, self.norm2 = conv3x3(c, c, bias=False), nn.GroupNorm(num_groups=4, num_channels=c)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


@register("groupnorm_cnn", image(), "cnn", "groupnorm", "residual")
def groupnorm_cnn() -> nn.Module:
    return nn.Sequential(conv3x3(3, 16, 2), ResGN(16, 4), nn.GroupNorm(8, 16), nn.ReLU(), conv3x3(16, 12), Head(12))


@register("instancenorm_cnn", image(), "cnn", "instancenorm", "transposed", "dense_output", "residual")
class InstanceNormGenerator(nn.Module):
    """A CycleGAN generator in small: reflection padding, InstanceNorm of three kinds."""

    def __init__(self, ngf: int = 8):
        super().__init__()
        self.down = nn.Sequential(
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, ngf, 7),
            nn.InstanceNorm2d(ngf),
            nn.ReLU(True),
            nn.Conv2d(ngf, ngf * 2, 3, 2, 1),
            nn.InstanceNorm2d(ngf * 2, affine=True),
            nn.ReLU(True),
        )
        self.res = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(ngf * 2, ngf * 2, 3),
            nn.InstanceNorm2d(ngf * 2, affine=True, track_running_stats=True),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(ngf * 2, ngf * 2, 3),
            nn.InstanceNorm2d(ngf * 2),
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(ngf * 2, ngf, 3, stride=2, padding=1, output_padding=1),
            nn.InstanceNorm2d(ngf),
            nn.ReLU(True),
            nn.Conv2d(ngf, 3, 7, padding=3),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(x + self.res(x))


@register("prelu_cnn", image(), "cnn", "prelu")
def prelu_cnn() -> nn.Module:
    return nn.Sequential(
        conv3x3(3, 8, bias=False), nn.BatchNorm2d(8), nn.PReLU(8), conv3x3(8, 16, 2), nn.PReLU(16),
        conv3x3(16, 12), nn.PReLU(), Head(12),
    )  # fmt: skip


class SELayer(nn.Module):
    def __init__(self, channel: int, reduction: int = 4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


@register("se_linear", image(), "cnn", "se", "residual")
class SEResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = cbr(3, 16)
        self.conv = nn.Sequential(conv3x3(16, 16, bias=False), nn.BatchNorm2d(16))
        self.se = SELayer(16)
        self.last = cbr(16, 24, stride=2)
        self.se2 = SELayer(24, reduction=8)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.se(self.conv(x)))
        return self.head(self.se2(self.last(x)))


class CBAM(nn.Module):
    def __init__(self, c: int, ratio: int = 4):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(c, c // ratio, 1, bias=False), nn.ReLU(), nn.Conv2d(c // ratio, c, 1, bias=False)
        )
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ca = torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        x = x * ca
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return x * torch.sigmoid(self.conv(torch.cat([avg_out, max_out], dim=1)))


@register("cbam", image(), "cnn", "attention", "channel_reduction")
def cbam() -> nn.Module:
    return nn.Sequential(cbr(3, 16), CBAM(16), conv3x3(16, 12, 2), nn.BatchNorm2d(12), CBAM(12), Head(12))


@register("depthwise_multiplier", image(), "cnn", "depthwise", "grouped", "multiplier")
def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(
        cbr(3, 8), nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Conv2d(12, 36, 3, padding=1, groups=12), nn.ReLU(),
        cbr(36, 8, 1), Head(8),
    )  # fmt: skip


@register("dilated_aspp", image(), "cnn", "dilated", "concat", "dense_output")
class ASPP(nn.Module):
    def __init__(self, rates=(1, 2, 4)):
        super().__init__()
        self.stem = cbr(3, 12)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 8, 3, padding=r, dilation=r, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            for r in rates
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 8, 1), nn.ReLU())
        self.project = cbr(8 * (len(rates) + 1), 16, 1)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.stem(x)
        res = [conv(x) for conv in self.branches]
        res.append(F.interpolate(self.pool(x), size=size, mode="bilinear", align_corners=False))
        return self.out(self.project(torch.cat(res, dim=1)))


@register("conv_glu", image(), "cnn", "glu", "split", "residual")
class ConvGLU(nn.Module):
    def __init__(self, dim: int = 8, hidden: int = 12):
        super().__init__()
        self.stem = conv3x3(3, dim)
        self.fc1 = nn.Conv2d(dim, hidden * 2, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.gate = nn.Conv2d(dim, 2 * 10, 3, padding=1)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h, v = self.fc1(x).chunk(2, dim=1)
        x = x + self.fc2(F.gelu(self.dwconv(h)) * v)
        return self.head(F.glu(self.gate(x), dim=1))


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True, e: float = 1.0):
        super().__init__()
        c_ = int(c2 * e)
        self.cv1, self.cv2 = Conv(c1, c_, 3), Conv(c_, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = False, e: float = 0.5):
        super().__init__()
        self.c = int(c2 * e)
        self.cv1 = Conv(c1, 2 * self.c, 1, 1)
        self.cv2 = Conv((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(YoloBottleneck(self.c, self.c, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C2fSplit(C2f):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x).split((self.c, self.c), 1)
        y = [y[0], y[1]]
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@register("c2f", image(), "cnn", "split", "concat", "residual")
def c2f() -> nn.Module:
    return nn.Sequential(Conv(3, 8, 3, 2), C2f(8, 16, n=2, shortcut=True), Conv(16, 16, 3, 2), C2f(16, 24), Head(24))


@register("c2f_split", image(), "cnn", "split", "concat", "residual", "baked")
def c2f_split() -> nn.Module:
    return nn.Sequential(Conv(3, 8, 3, 2), C2fSplit(8, 16, n=1, shortcut=True), C2fSplit(16, 12), Head(12))


class PartialConv(nn.Module):
    def __init__(self, dim: int, n_div: int = 4, forward: str = "split_cat"):
        super().__init__()
        self.dim_conv3 = dim // n_div
        self.dim_untouched = dim - self.dim_conv3
        self.partial_conv3 = nn.Conv2d(self.dim_conv3, self.dim_conv3, 3, 1, 1, bias=False)
        self.mode = forward

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "slicing":
            x1 = self.partial_conv3(x[:, : self.dim_conv3, :, :])
            return torch.cat((x1, x[:, self.dim_conv3 :]), 1)
        x1, x2 = torch.split(x, [self.dim_conv3, self.dim_untouched], dim=1)
        return torch.cat((self.partial_conv3(x1), x2), 1)


class FasterNetBlock(nn.Module):
    def __init__(self, dim: int, mode: str):
        super().__init__()
        self.spatial_mixing = PartialConv(dim, forward=mode)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, dim * 2, 1, bias=False),
            nn.BatchNorm2d(dim * 2),
            nn.ReLU(),
            nn.Conv2d(dim * 2, dim, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.spatial_mixing(x))


@register("partial_conv_slice", image(), "cnn", "slice", "concat", "residual", "baked")
def partial_conv_slice() -> nn.Module:
    return nn.Sequential(conv3x3(3, 16, 2), nn.BatchNorm2d(16), FasterNetBlock(16, "slicing"), Head(16))


@register("partial_conv_split", image(), "cnn", "split", "concat", "residual", "baked")
def partial_conv_split() -> nn.Module:
    return nn.Sequential(conv3x3(3, 16, 2), nn.BatchNorm2d(16), FasterNetBlock(16, "split_cat"), Head(16))


@register("pixel_shuffle", image(size=8), "cnn", "pixel_shuffle", "dense_output", "residual")
class ESPCN(nn.Module):
    def __init__(self, c: int = 8):
        super().__init__()
        self.conv1, self.conv2 = conv3x3(3, c), conv3x3(c, c)
        self.upsample = nn.Sequential(conv3x3(c, c * 4), nn.PixelShuffle(2), nn.LeakyReLU(0.2))
        self.last = nn.Sequential(conv3x3(c, 3 * 2**2), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv1(x))
        h = self.upsample(h + F.relu(self.conv2(h)))
        return self.last(h) + F.interpolate(x, scale_factor=4, mode="nearest")


@register("pixel_unshuffle", image(), "cnn", "pixel_unshuffle", "concat")
class FocusNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = cbr(3, 6)
        self.down = nn.PixelUnshuffle(2)
        self.conv2 = cbr(24, 8)
        self.conv3 = cbr(32, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.down(self.conv1(x)))
        # YOLOv5's Focus: the same by slices
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return self.head(self.conv3(x))


@register("channel_buffer", image(), "cnn", "buffer")
class ChannelBuffer(nn.Module):
    def __init__(self, c: int = 12):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.conv1, self.conv2 = conv3x3(3, c), conv3x3(c, c, 2)
        self.register_buffer("offset", torch.randn(1, c, 1, 1))
        self.register_buffer("scale", torch.rand(c) + 0.5)
        self.pos = nn.Parameter(torch.randn(1, c, 8, 8) * 0.5)
        self.head = Head(c)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x - self.mean) + self.offset)
        x = self.conv2(x) * self.scale[None, :, None, None] + self.pos
        return self.head(F.relu(x))


@register("weight_norm", image(), "cnn", "parametrized", "bias_no_norm")
def weight_norm_cnn() -> nn.Module:
    return nn.Sequential(
        weight_norm(conv3x3(3, 8)), nn.ELU(), weight_norm(conv3x3(8, 12, 2, bias=False)), nn.ReLU(),
        weight_norm(nn.ConvTranspose2d(12, 8, 2, 2), dim=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        weight_norm(nn.Linear(32, 5)),
    )  # fmt: skip
