"""The entries of the zoo: how to build each model, and its inputs. No entry knows anything about pruning."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import zoo_transformers
from torch import Tensor, nn
from zoo_listing import LISTING, define_torchvision_operators, timm_model, torchvision_model

sys.path.append(str(Path(__file__).parents[1]))  # for the hand-written models of the tests

SUITES = ("transformers", "timm", "torchvision", "ours")


@dataclass(frozen=True)
class Entry:
    """One model. `kind` is "smallest" (of its module or family) or "second"."""

    suite: str
    family: str
    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"


def entries() -> Iterator[Entry]:
    """All entries: first the smallest of each family, suite by suite, then the second ones."""
    define_torchvision_operators()
    listing = json.loads(LISTING.read_text())
    for place, kind in enumerate(("smallest", "second")):
        if kind == "smallest":
            for name, architecture in zoo_transformers.ARCHITECTURES.items():
                build = partial(zoo_transformers.build, name)
                yield Entry("transformers", name, name, kind, build, architecture.inputs)
        for suite, make in (("timm", _timm), ("torchvision", _torchvision)):
            for family, rows in listing[suite].items():
                for row in rows[place : place + 1]:
                    yield make(family, row["name"], kind, row["size"])
        if kind == "smallest":
            yield from _ours()


def _images(size: int) -> Tensor:
    # In train mode, batch norms over two samples amplify rounding without bound.
    return torch.randn(4 if size <= 128 else 2, 3, size, size)


def _timm(family: str, name: str, kind: str, size: int) -> Entry:
    return Entry("timm", family, name, kind, partial(timm_model, name, size), partial(_images, size))


# -- torchvision ---------------------------------------------------------------------------------------------------


class DenseDetector(nn.Module):
    """Backbone and heads of a torchvision detector, without the choice of boxes, which depends on the data.

    The heads that work on regions get each whole feature map, pooled to a region's size.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = getattr(model, "head", None)
        self.rpn_head = model.rpn.head if hasattr(model, "rpn") else None
        if hasattr(model, "roi_heads"):
            heads = model.roi_heads
            self.box = nn.Sequential(heads.box_head, heads.box_predictor)
            mask = [heads.mask_head, heads.mask_predictor] if heads.has_mask() else []
            keypoint = [heads.keypoint_head, heads.keypoint_predictor] if heads.has_keypoint() else []
            self.regions = nn.Sequential(*mask, *keypoint)

    def forward(self, x: Tensor) -> list[Any]:
        features = self.backbone(x)
        features = list(features.values()) if isinstance(features, dict) else [features]
        if self.head is not None:
            return [self.head(features)]
        assert self.rpn_head is not None
        found = [self.rpn_head(features)]
        for each in features:
            found.append(self.box(F.adaptive_avg_pool2d(each, 7)))
            if len(self.regions):
                found.append(self.regions(F.adaptive_avg_pool2d(each, 14)))
        return found


def _torchvision(family: str, name: str, kind: str, size: int) -> Entry:
    area = family.partition(".")[0]
    build: Callable[[], nn.Module] = partial(torchvision_model, name, size or None)
    inputs: Callable[[], Any] = partial(_images, size)
    if area == "detection":
        build = partial(_detector, name)
        # SSD reduces its maps eight times; its VGG form takes 300 pixels.
        inputs = partial(_images, {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 128))
    elif area == "video":
        frames, side = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}.get(name, (8, 64))
        inputs = partial(torch.randn, 2, 3, frames, side, side)
    elif name == "inception_v3":
        inputs = partial(_images, 299)  # its auxiliary head, in train mode, takes no less
    elif area == "optical_flow":
        inputs = _image_pairs
    return Entry("torchvision", family, name, kind, build, inputs)


def _detector(name: str) -> nn.Module:
    return DenseDetector(torchvision_model(name))


def _image_pairs() -> tuple[Tensor, Tensor, int]:
    """Two images and the number of updates of the flow."""
    return torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128), 2


# -- hand-written --------------------------------------------------------------------------------------------------


class Yolo(nn.Module):
    """A detector with chunk lists (C2f), pooling pyramid, two scales up and down, and heads of two branches."""

    def __init__(self, width: int = 16, classes: int = 4, bins: int = 8) -> None:
        super().__init__()
        from tests.zoo.cnn_forms import C2f, Conv

        w = width
        self.stem = nn.Sequential(Conv(3, w, 3, 2), Conv(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, 1, True))
        self.middle = nn.Sequential(Conv(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, 2, True))
        self.deep = nn.Sequential(Conv(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, 1, True))
        self.squeeze, self.spread = Conv(8 * w, 4 * w, 1), Conv(16 * w, 8 * w, 1)
        self.up, self.down, self.low = C2f(12 * w, 4 * w), Conv(4 * w, 4 * w, 3, 2), C2f(12 * w, 8 * w)
        self.boxes = nn.ModuleList(nn.Sequential(Conv(c, w, 3), nn.Conv2d(w, 4 * bins, 1)) for c in (4 * w, 8 * w))
        self.classes = nn.ModuleList(nn.Sequential(Conv(c, w, 3), nn.Conv2d(w, classes, 1)) for c in (4 * w, 8 * w))
        self.bins = bins

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        middle = self.middle(self.stem(x))
        pools = [self.squeeze(self.deep(middle))]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        deep = self.spread(torch.cat(pools, 1))
        high = self.up(torch.cat([F.interpolate(deep, scale_factor=2), middle], 1))
        low = self.low(torch.cat([self.down(high), deep], 1))
        scales = [torch.cat([b(f), c(f)], 1) for b, c, f in zip(self.boxes, self.classes, (high, low), strict=True)]
        flat = torch.cat([s.flatten(2) for s in scales], 2)
        boxes = flat[:, : 4 * self.bins].unflatten(1, (4, self.bins)).softmax(2)
        weights = torch.arange(self.bins, dtype=boxes.dtype, device=boxes.device)
        distance = (boxes * weights[None, None, :, None]).sum(2)
        return torch.cat([distance, flat[:, 4 * self.bins :].sigmoid()], 1), scales


class Speech(nn.Module):
    """Convolutions over spectra, a bidirectional LSTM of two layers, a GRU, a classifier for every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(16, 32, 5, 2, 2), nn.BatchNorm1d(32), nn.ReLU())
        self.lstm = nn.LSTM(32, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(48, 20, batch_first=True)
        self.out = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.conv(x).transpose(1, 2))
        return self.out(self.gru(y)[0])


def _ours() -> Iterator[Entry]:
    from tests.zoo import ZOO

    yield Entry("ours", "detection", "yolo", "smallest", Yolo, lambda: torch.randn(4, 3, 64, 64))
    yield Entry("ours", "speech", "conv_lstm_gru", "smallest", Speech, lambda: torch.randn(4, 16, 40))
    for name, model in sorted(ZOO.items()):
        yield Entry("ours", "hand-written", name, "smallest", model.factory, model.example_inputs)


@torch.no_grad()
def vary_(model: nn.Module) -> None:
    """Give whatever a fresh initialisation leaves constant (norms, biases, layer scales, statistics) varied values.

    A wrong index would be hidden by constants.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        value = float(tensor.flatten()[0])
        if not bool((tensor == value).all()):
            continue
        if abs(value) >= 0.1:
            tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5))
        elif isinstance(tensor, nn.Parameter) or value == 0:
            tensor.normal_(0.0, 0.1)
