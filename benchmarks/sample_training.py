"""One training loop for the benchmarks of samples: small enough for a CPU, the same for every method, watched by observers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from models import CifarResNet
from sample_tasks import CLASSES, Task
from torch import Tensor, nn

Observer = Callable[[Tensor, Tensor, Tensor], None]  # sample ids (B,), logits (B, K), labels (B,)


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9 and weight decay 5e-4, half a cosine from `lr` to zero; `bf16`: under autocast, channels last."""

    model: str
    epochs: int
    lr: float
    batch_size: int = 64
    bf16: bool = False


DEFAULTS = {"digits": Recipe("mlp", 30, 0.1), "fashion": Recipe("cnn", 8, 0.05), "cifar10": Recipe("cnn", 30, 0.02)}


def _block(a: int, b: int, stride: int = 1, groups: int = 1, size: int = 3) -> list[nn.Module]:
    convolution = nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(b), nn.ReLU(inplace=True)]


class Vgg16(nn.Sequential):
    """Simonyan and Zisserman's 13 convolutions with batch norm and one linear layer, as usual for CIFAR; widths times `width`."""

    def __init__(self, width: float = 1.0) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for size, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += _block(channels, round(width * size))
                channels = round(width * size)
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels, CLASSES))


class MobileNet(nn.Sequential):
    """Howard et al. 2017 at CIFAR's size: the first convolution and the first halving keep the resolution."""

    def __init__(self, width: float = 1.0) -> None:
        def scaled(size: int) -> int:
            return max(8, round(width * size))

        layers = _block(3, scaled(32))
        channels = scaled(32)
        shape = [(64, 1), (128, 1), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        for size, stride in shape:
            layers += _block(channels, channels, stride, channels) + _block(channels, scaled(size), size=1)
            channels = scaled(size)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def build_model(name: str, like: Tensor) -> nn.Module:
    """mlp, cnn, resnet20, vgg16, mobilenet; the last two with "@0.25" behind the name for a quarter of the width."""
    kind, _, width = name.partition("@")
    if kind == "mlp":
        inner = [nn.Linear(like[0].numel(), 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *inner, nn.Linear(128, CLASSES))
    if kind == "cnn":
        channels, side = like.shape[1], -(-like.shape[2] // 4)
        wide = 16 if channels == 1 else 32
        body = [*_block(channels, wide, 2), *_block(wide, 2 * wide, 2), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(2 * wide * side * side, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    if kind == "resnet20":
        return CifarResNet(3)
    kinds: dict[str, Callable[[float], nn.Module]] = {"vgg16": Vgg16, "mobilenet": MobileNet}
    if kind not in kinds:
        raise SystemExit(f"{name!r} is no model: mlp, cnn, resnet20, vgg16 or mobilenet")
    return kinds[kind](float(width or 1))


def train(
    task: Task, labels: np.ndarray, recipe: Recipe, seed: int, *, kept: np.ndarray | None = None,
    observers: Sequence[Observer] = (), after_epoch: Callable[[nn.Module], None] | None = None,
) -> nn.Module:  # fmt: skip
    """A model trained on the samples `kept` (default: all); batches and augmentation depend on the seed alone.

    It is trained where the images are. The number of epochs is the recipe's, so that with fewer samples there are fewer steps.
    """
    torch.manual_seed(seed)
    device = task.images.device
    model = build_model(recipe.model, task.images).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=5e-4)
    layout = torch.channels_last if recipe.bf16 and task.images.ndim == 4 else torch.contiguous_format
    model = model.to(memory_format=layout)
    given = torch.as_tensor(labels, device=device)
    numbers = torch.arange(len(task)) if kept is None else torch.as_tensor(kept)
    steps = recipe.epochs * math.ceil(len(numbers) / recipe.batch_size)
    step = 0
    draw = torch.Generator().manual_seed(seed + 7)
    for _ in range(recipe.epochs):
        for ids in numbers[torch.randperm(len(numbers), generator=draw)].to(device).split(recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            step += 1
            if len(ids) < 2:  # batch norm has nothing to go by
                continue
            images = augmented(task.images[ids], draw) if task.augment else task.images[ids]
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                logits = model(images.contiguous(memory_format=layout)).float()
            for observer in observers:
                observer(ids, logits.detach(), given[ids])
            optimizer.zero_grad()
            F.cross_entropy(logits, given[ids]).backward()
            optimizer.step()
        if after_epoch is not None:
            after_epoch(model)
    return model.eval()


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Random crops (4 pixels of padding) and flips."""
    size, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    corner = torch.randint(0, 9, (size, 2), generator=draw)
    rows, columns = corner[:, :1] + torch.arange(height), corner[:, 1:] + torch.arange(width)
    flip = torch.rand(size, 1, generator=draw) < 0.5
    columns = torch.where(flip, columns.flip(1), columns).to(images.device)
    number = torch.arange(size, device=images.device)
    cut = padded[number[:, None, None], rows.to(images.device)[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> np.ndarray:
    """(N, K) softmax in eval mode."""
    training = model.training
    model.eval()
    found = torch.cat([model(part).softmax(1) for part in images.split(500)])
    model.train(training)
    return found.double().cpu().numpy()


def test_accuracy(model: nn.Module, task: Task) -> float:
    """Share of the test images that are predicted right."""
    return float((probabilities(model, task.test_images).argmax(1) == task.test_labels).mean())
