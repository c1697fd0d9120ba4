"""Which models of timm and torchvision the zoo holds: the smallest of each module, and a random second one.

Counts the parameters of every architecture on the meta device and looks for the smallest image that each chosen one takes;
that takes a quarter of an hour, so the answer lies in `zoo_listing.json`. Modules that are there are left as they are.

    python benchmarks/zoo_listing.py
"""

from __future__ import annotations

import json
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

Listing = dict[str, list[dict[str, Any]]]
LISTING = Path(__file__).with_name("zoo_listing.json")
SEED = 0
SIZES = (64, 96, 128, 192, 224, 256)
LARGEST = 150_000_000  # parameters of a second model: float64 copies of it must fit beside each other
# Names that say that a model is not the smallest of its module: not counted where there are many others.
LARGE = re.compile(
    r"base|large|huge|giant|medium|so\d+m|x+l|_b[1-9]|_[lmbhg](?![a-z0-9])|(?<!0)50|101|152|200|269|\d\dd"
)


def define_torchvision_operators() -> None:
    """Let a torchvision without its compiled extension be imported: its models only need these to have a name."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        globals()["_library"] = library  # its operators go when it does
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def timm_model(name: str, size: int | None = None) -> nn.Module:
    """A timm model with ten classes, for images of `size` where it has to be told."""
    import timm

    plain: dict[str, Any] = {"pretrained": False, "num_classes": 10}
    if size is not None:
        try:
            return timm.create_model(name, **plain, img_size=size)
        except TypeError:  # takes any size
            pass
    return timm.create_model(name, **plain)


def torchvision_model(name: str, size: int | None = None) -> nn.Module:
    """A torchvision model without weights, for images of `size` where it has to be told."""
    from torchvision.models import get_model, get_model_builder

    plain: dict[str, Any] = {"weights": None}
    if "segmentation" in get_model_builder(name).__module__ or "detection" in get_model_builder(name).__module__:
        plain["weights_backbone"] = None
    if size is not None and name.startswith("vit_"):
        plain["image_size"] = size
    if size is not None and name.startswith("maxvit"):
        plain["input_size"] = (size, size)
    return get_model(name, **plain)


def smallest_image(make: Callable[[int], nn.Module], default: int) -> int:
    """The first of `SIZES` at which the model runs in both modes, or else the default."""
    for size in SIZES:
        if size >= default:
            break
        for device in ("meta", "cpu"):
            try:
                with torch.device(device), torch.no_grad():
                    model = make(size)
                    for mode in (False, True):
                        model.train(mode)(torch.zeros(2, 3, size, size))
                return size
            except Exception as error:
                if not _looks_at_values(error):
                    break
    return default


def _looks_at_values(error: Exception) -> bool:
    """Whether a constructor or a forward pass has asked a meta tensor for its values."""
    return "meta" in str(error).lower()


def counted(names: Sequence[str], make: Callable[[str], nn.Module]) -> dict[str, int]:
    """Parameters of each model."""
    found = {}
    for name in names:
        for device in ("meta", "cpu"):
            try:
                with torch.device(device):
                    found[name] = sum(p.numel() for p in make(name).parameters())
                break
            except Exception as error:
                if not _looks_at_values(error):
                    raise
                print(f"{name}: {str(error)[:120]}", file=sys.stderr, flush=True)
    return found


def two(names: Sequence[str], make: Callable[[str], nn.Module], rng: random.Random) -> dict[str, int]:
    """The smallest model and a random other one, with their parameters."""
    modest = [name for name in names if not LARGE.search(name)] if len(names) > 10 else []
    params = counted(modest or names, make)
    smallest = min(params, key=lambda name: (params[name], name))
    chosen = {smallest: params[smallest]}
    rest = sorted(set(names) - {smallest})
    rng.shuffle(rest)
    for name in rest:
        count = params.get(name) or counted([name], make)[name]
        if count <= LARGEST:
            return {**chosen, name: count}
    return chosen


def timm_listing(listing: Listing) -> Iterator[None]:
    import timm

    for module in timm.models.list_modules():
        if module in listing:
            continue
        rng = random.Random(f"{SEED} {module}")
        rows = []
        for name, params in two(timm.list_models(module=module), timm_model, rng).items():
            default = (timm.models.get_pretrained_cfg(name).input_size or (3, 224, 224))[-1]
            size = smallest_image(lambda s, name=name: timm_model(name, s), default)  # type: ignore[misc]
            rows.append({"name": name, "params": params, "size": size})
        listing[module] = rows
        yield


def torchvision_listing(listing: Listing) -> Iterator[None]:
    from torchvision.models import get_model_builder, list_models

    families: dict[str, list[str]] = {}
    for name in list_models():
        module = get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if not module.startswith("quantization"):
            families.setdefault(module, []).append(name)
    for module, names in families.items():
        if module in listing:
            continue
        rng = random.Random(f"{SEED} {module}")
        rows = []
        for name, params in two(names, torchvision_model, rng).items():
            size = 0
            if "." not in module or module.startswith("segmentation"):
                size = smallest_image(lambda s, name=name: torchvision_model(name, s), 224)  # type: ignore[misc]
            rows.append({"name": name, "params": params, "size": size})
        listing[module] = rows
        yield


def main() -> None:
    warnings.simplefilter("ignore")
    define_torchvision_operators()
    both: dict[str, Listing] = json.loads(LISTING.read_text()) if LISTING.exists() else {"torchvision": {}, "timm": {}}
    for _ in chain(torchvision_listing(both["torchvision"]), timm_listing(both["timm"])):
        lines = [
            f' "{suite}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in listing.items()) + "\n }"
            for suite, listing in both.items()
        ]
        LISTING.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
