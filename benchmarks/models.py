"""The architectures of the benchmarks, written out so that nothing but torch is needed.

`resnet20`, `resnet56`: CIFAR-10, option A shortcuts; parameter names and values as in akamaster/pytorch_resnet_cifar10.
`vgg16`, `vgg16_quarter`: with batch norm, for CIFAR-10, at all and at a quarter of the widths.
`resnet18`, `resnet50`, `mobilenet_v2`, `vit_b16`: ImageNet sizes and parameter counts as in torchvision (random weights:
the time of a forward pass does not depend on the values).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CifarBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut skips pixels and pads channels with zeros (option A)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pad = (width - width_in) // 2 if stride != 1 or width_in != width else 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: 6n+2 layers."""

    def __init__(self, n: int, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(CifarBlock(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(*(CifarBlock(32 if i else 16, 32, 1 if i else 2) for i in range(n)))
        self.layer3 = nn.Sequential(*(CifarBlock(64 if i else 32, 64, 1 if i else 2) for i in range(n)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def load_cifar(model: CifarResNet, path: str | Path) -> CifarResNet:
    """Fill in the published weights from a safetensors file."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(str(path)), strict=False)
    return model


class CifarVgg16(nn.Module):
    """Simonyan and Zisserman 2015, configuration D, with batch norm, for images of 32 × 32: one linear layer at the end.

    `width` is a share of the published widths (64 … 512).
    """

    def __init__(self, width: float = 1.0, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, depth in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True):
            out = round(stage * width)
            for _ in range(depth):
                layers += [nn.Conv2d(channels, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).flatten(1))


class ResNetBlock(nn.Module):
    """Basic (expansion 1) or bottleneck (expansion 4) block with a projection shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        out = width * expansion
        if expansion == 1:
            shapes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        else:
            shapes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        layers: list[nn.Module] = []
        for a, b, k, s in shapes:
            layers += [nn.Conv2d(a, b, k, s, k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Identity()
        if stride != 1 or width_in != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al. 2016, ImageNet form."""

    def __init__(self, depths: list[int], expansion: int, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        width_in = 64
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(ResNetBlock(width_in, 64 << stage, 2 if stage and not i else 1, expansion))
                width_in = (64 << stage) * expansion
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def _conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
    ]


class InvertedResidual(nn.Module):
    """Expand, depthwise, project."""

    def __init__(self, width_in: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = width_in * expand
        layers = _conv(width_in, hidden, 1) if expand > 1 else []
        layers += _conv(hidden, hidden, 3, stride, hidden) + _conv(hidden, width, 1)[:-1]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers = _conv(3, 32, 3, 2)
        width_in = 32
        for t, c, n, s in [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]:
            for i in range(n):
                layers.append(InvertedResidual(width_in, c, s if i == 0 else 1, t))
                width_in = c
        self.features = nn.Sequential(*layers, *_conv(width_in, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021, on torch's own encoder layer (pre-norm, GELU)."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, classes: int = 1000) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 197, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width, eps=1e-6), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.encoder(x)[:, 0])


# For images of 32 × 32 with so many channels.
SMALL: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": lambda channels: CifarResNet(3, channels=channels),
    "resnet56": lambda channels: CifarResNet(9, channels=channels),
    "vgg16": lambda channels: CifarVgg16(channels=channels),
    "vgg16_quarter": lambda channels: CifarVgg16(0.25, channels=channels),
}

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet20": (lambda: CifarResNet(3), (3, 32, 32)),
    "resnet56": (lambda: CifarResNet(9), (3, 32, 32)),
    "resnet18": (lambda: ResNet([2, 2, 2, 2], 1), (3, 224, 224)),
    "resnet50": (lambda: ResNet([3, 4, 6, 3], 4), (3, 224, 224)),
    "mobilenet_v2": (MobileNetV2, (3, 224, 224)),
    "vit_b16": (ViT, (3, 224, 224)),
}


def build(name: str, weights: str | None = None) -> nn.Module:
    """A model by name, in eval mode; `weights` is a safetensors file (CIFAR ResNets only)."""
    model = MODELS[name][0]()
    if weights is not None:
        if not isinstance(model, CifarResNet):
            raise ValueError(f"no weights are read for {name}: only resnet20 and resnet56")
        load_cifar(model, weights)
    return model.eval()


def example(name: str, batch: int = 1) -> Tensor:
    """Random input of the size that the model takes."""
    return torch.randn(batch, *MODELS[name][1])
