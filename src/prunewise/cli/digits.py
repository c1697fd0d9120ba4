"""The demo's task: a small residual network on scikit-learn's handwritten digits (1,797 real 8x8 images)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), float32 in [0, 1], and their classes (N,), int64 in 0..9."""

    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor


def load_digits(seed: int = 0, test_share: float = 0.25) -> Digits:
    """The digits, split at random into training and test set. Needs scikit-learn."""
    from sklearn.datasets import load_digits as load

    images, targets = load(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).div_(16).view(-1, 1, 8, 8)
    y = torch.tensor(targets, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([round(len(y) * test_share), len(y) - round(len(y) * test_share)])
    return Digits(x[train], y[train], x[test], y[test])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, by a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network of three stages for images of 8x8."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        in_channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(in_channels, width, stride=2 if stage and not block else 1))
                in_channels = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(in_channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, 10)."""
        x = self.layers(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
