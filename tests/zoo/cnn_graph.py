"""Forms of the whole model: shared and frozen modules, several inputs and outputs, training-only heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cnn_forms import Conv, Head, cbr, conv3x3
from .registry import image, register


@register("frozen_backbone", image(), "cnn", "frozen")
class FrozenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(cbr(3, 8), cbr(8, 12, stride=2), cbr(12, 16))
        for param in self.backbone.parameters():
            param.requires_grad = False
        self.neck = cbr(16, 12)
        self.head = Head(12)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()  # keeps the running statistics
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(x)))


@register("shared_module", image(), "cnn", "shared")
class SharedModule(nn.Module):
    """One convolution called twice on the same stream, another on two feature maps of the same width."""

    def __init__(self):
        super().__init__()
        self.stem = cbr(3, 12)
        self.body = nn.Sequential(conv3x3(12, 12, bias=False), nn.BatchNorm2d(12))
        self.down = cbr(12, 12, stride=2)
        self.tower = nn.Sequential(conv3x3(12, 16), nn.ReLU(), conv3x3(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        p1 = F.relu(self.body(self.stem(x)))
        p1 = F.relu(self.body(p1))
        p2 = self.down(p1)
        return torch.cat([self.tower(p).flatten(2) for p in (p1, p2)], dim=-1)


@register(
    "siamese_absdiff",
    lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)),
    "cnn",
    "multi_input",
    "shared",
)
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(cbr(3, 8), cbr(8, 16, stride=2))
        self.fc = nn.Linear(16 * 3, 2)

    def forward_once(self, x: Tensor) -> Tensor:
        return self.encoder(x).mean(dim=(-2, -1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.forward_once(a), self.forward_once(b)
        return self.fc(torch.cat([a, b, torch.abs(a - b)], dim=1))


@register(
    "multi_input",
    lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 1, 8, 8)),
    "cnn",
    "multi_input",
    "concat",
    "residual",
)
class MultiInput(nn.Module):
    """Color and depth at two resolutions: added once, concatenated once."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = cbr(3, 12, stride=2), cbr(1, 12)
        self.rgb2, self.depth2 = cbr(12, 16), cbr(12, 8)
        self.fuse = cbr(24, 12, 1)
        self.head = Head(12)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        rgb, depth = self.rgb(rgb), self.depth(depth)
        return self.head(self.fuse(torch.cat((self.rgb2(rgb + depth), self.depth2(depth)), dim=1)))


@register(
    "dict_input",
    lambda: {"pixel_values": torch.randn(2, 3, 16, 16), "metadata": torch.randn(2, 5)},
    "cnn", "dict_input", "film",
)  # fmt: skip
class DictInput(nn.Module):
    """Image features scaled and shifted by a vector (FiLM); an optional argument that is not given."""

    def __init__(self, c: int = 12):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, c, 2, bias=False), nn.BatchNorm2d(c, affine=False)
        self.film = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2 * c))
        self.conv2 = cbr(c, 16)
        self.head = Head(16)

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None, metadata: Tensor | None = None) -> Tensor:
        x = self.bn1(self.conv1(pixel_values))
        if metadata is not None:
            gamma, beta = self.film(metadata).chunk(2, dim=-1)
            x = (1 + gamma[:, :, None, None]) * x + beta.unsqueeze(-1).unsqueeze(-1)
        if mask is not None:
            x = x * mask
        return self.head(self.conv2(F.relu(x)))


@register("multi_output", image(), "cnn", "multi_output")
class MultiOutput(nn.Module):
    """A tuple of two heads and of an intermediate feature map that is an output itself."""

    def __init__(self):
        super().__init__()
        self.stem = cbr(3, 8)
        self.trunk = cbr(8, 16, stride=2)
        self.cls, self.box = Head(16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = self.stem(x)
        x = self.trunk(low)
        return self.cls(x), self.box(x).sigmoid(), low


@register("dict_output", image(), "cnn", "dict_output", "dense_output")
class DictOutput(nn.Module):
    """torchvision's segmentation: a dict, the auxiliary classifier from an earlier layer."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"layer1": cbr(3, 12, stride=2), "layer2": cbr(12, 16, stride=2)})
        self.classifier = nn.Sequential(cbr(16, 12), nn.Dropout(0.0), nn.Conv2d(12, 3, 1))
        self.aux_classifier = nn.Sequential(cbr(12, 8), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        features = {}
        for name, layer in self.backbone.items():
            x = layer(x)
            features[name] = x
        out = self.classifier(features["layer2"])
        aux = self.aux_classifier(features["layer1"])
        return {
            "out": F.interpolate(out, size=input_shape, mode="bilinear", align_corners=False),
            "aux": F.interpolate(aux, size=input_shape, mode="bilinear", align_corners=False),
        }


@register("aux_head", image(), "cnn", "train_only")
class AuxHead(nn.Module):
    """GoogLeNet's way: (logits, aux) in training, logits alone in evaluation."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.last = cbr(3, 12), cbr(12, 16, stride=2), cbr(16, 16)
        self.aux = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
        )
        self.head = Head(16)

    def forward(self, x: Tensor):
        x = self.mid(self.stem(x))
        aux = self.aux(x) if self.training else None
        x = self.head(self.last(x))
        if self.training:
            return x, aux
        return x


@register("dropout_cnn", image(), "cnn", "dropout", "flatten")
class DropoutCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.5), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(432, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = torch.flatten(self.dropout1(x), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        x = F.dropout(x, p=0.5, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class CoordConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(in_channels + 2, out_channels, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.size()
        xx = torch.linspace(-1, 1, w, dtype=x.dtype, device=x.device).view(1, 1, 1, w).expand(b, 1, h, w)
        yy = torch.linspace(-1, 1, h, dtype=x.dtype, device=x.device).view(1, 1, h, 1).expand(b, 1, h, w)
        return self.conv(torch.cat([x, xx.type_as(x), yy.type_as(x)], dim=1))


@register("coordconv", image(), "cnn", "concat", "constant")
def coordconv() -> nn.Module:
    return nn.Sequential(
        CoordConv(3, 8, kernel_size=3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        CoordConv(8, 12, kernel_size=3, stride=2, padding=1), nn.ReLU(), cbr(12, 8), Head(8),
    )  # fmt: skip


@register("detection_head", image(size=32), "cnn", "list_output", "concat", "shared", "baked")
class Detector(nn.Module):
    """A two-level feature pyramid and YOLO's head, whose output widths are baked into its views."""

    def __init__(self, nc: int = 3, na: int = 2):
        super().__init__()
        self.nc, self.na, self.no = nc, na, nc + 5
        self.p2 = nn.Sequential(Conv(3, 8, 3, 2), Conv(8, 12, 3, 2))
        self.p3 = Conv(12, 16, 3, 2)
        self.lateral = nn.Conv2d(16, 12, 1)
        self.fuse = Conv(24, 12, 3)
        self.down = Conv(12, 12, 3, 2)
        self.out3 = Conv(28, 16, 3)
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * na, 1) for c in (12, 16))

    def forward(self, x: Tensor) -> list[Tensor]:
        c2 = self.p2(x)
        c3 = self.p3(c2)
        up = F.interpolate(self.lateral(c3), scale_factor=2, mode="nearest")
        n2 = self.fuse(torch.cat([up, c2], 1))
        n3 = self.out3(torch.cat([self.down(n2), c3], 1))
        z = [n2, n3]
        for i, m in enumerate(self.m):
            z[i] = m(z[i])
            bs, _, ny, nx = z[i].shape
            z[i] = z[i].view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
        return z


@register("bias_no_norm", image(), "cnn", "bias_no_norm", "flatten", "baked")
class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 2 * 2, 24), nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(torch.sigmoid(self.conv2(x)), 2)
        x = x.view(-1, 16 * 2 * 2)
        return self.fc3(torch.tanh(self.fc2(F.relu(self.fc1(x)))))


@register("gap_mean", image(), "cnn", "global_mean")
class GapMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(cbr(3, 8), nn.MaxPool2d(2), conv3x3(8, 16), nn.Hardswish())
        self.norm = nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.features(x).mean((2, 3))))
