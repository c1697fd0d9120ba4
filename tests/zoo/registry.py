"""The registry of the test zoo: named models with example inputs, built the same way every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo; a tuple of inputs is called as model(*x), a dict as model(**x)."""

    name: str
    factory: Callable[[], nn.Module]
    example_inputs: Callable[[], Any]
    tags: frozenset[str] = frozenset()


ZOO: dict[str, ZooEntry] = {}


def register(
    name: str, example_inputs: Callable[[], Any], *tags: str
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register the decorated class or function (callable without arguments) under `name`."""

    def wrap(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in ZOO:
            raise ValueError(f"the zoo already has a model named {name!r}")
        ZOO[name] = ZooEntry(name, factory, example_inputs, frozenset(tags))
        return factory

    return wrap


def image(channels: int = 3, size: int = 16, batch: int = 3) -> Callable[[], Tensor]:
    """Return a factory of random images, shape (batch, channels, size, size)."""
    return lambda: torch.randn(batch, channels, size, size)


_NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_CONVS = (nn.Linear, nn.modules.conv._ConvNd)


def _draw_bias_(p: Tensor) -> None:
    p.normal_(0.0, 0.5)
    p.add_(torch.where(p < 0, -0.05, 0.05))  # nowhere near zero


@torch.no_grad()
def randomize_(model: nn.Module) -> nn.Module:
    """Replace the values of a fresh initialisation behind which an error could hide (in place).

    Norms get random affine parameters and running statistics, biases become nonzero, any other parameter
    that is constant (layer scale, zero-initialised tokens, PReLU slopes) becomes varied, and small weights
    grow, so that few channels are dead behind a ReLU.
    """
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            if not p.is_floating_point() or p.numel() == 0:
                continue
            if isinstance(module, _NORMS):
                if key == "weight":
                    p.uniform_(0.5, 1.5)
                else:
                    p.normal_(0.0, 0.5)
            elif isinstance(module, _CONVS) and key == "bias":
                _draw_bias_(p)
            elif bool((p == p.flatten()[0]).all()):
                _vary_(p)
            elif isinstance(module, _CONVS) and key == "weight" and p.dim() > 1:
                _scale_up_(p)
        for key, b in module.named_buffers(recurse=False):
            if key == "running_mean":
                b.normal_(0.0, 0.5)
            elif key == "running_var":
                b.uniform_(0.5, 2.0)
    return model


def _scale_up_(p: Tensor) -> None:
    """Raise a weight to He's scale: PyTorch's own is smaller, and biases would then decide every ReLU."""
    p.mul_(max(1.0, (2.0 / p[0].numel()) ** 0.5 / float(p.std())))


def _vary_(p: Tensor) -> None:
    value = float(p.flatten()[0])
    if abs(value) >= 0.1:  # a scale, a slope, a temperature: keep its size
        p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
    elif p.dim() >= 2 and value == 0.0:
        p.normal_(0.0, max(p[0].numel(), 4) ** -0.5)
    elif value == 0.0:
        _draw_bias_(p)
    else:  # a layer scale such as 1e-6
        p.uniform_(0.5, 1.5)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast every floating tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cast(v, dtype) for v in value)
    return value


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Any]:
    """Build a model (in train mode) and its inputs; the global random state is left as it was.

    Values are drawn in float32 and cast, so that two dtypes give the same model.
    """
    entry = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomize_(entry.factory())
        torch.manual_seed(seed + 1)
        inputs = entry.example_inputs()
    return model.to(dtype), cast(inputs, dtype)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model the way its inputs ask for."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def flat_tensors(value: Any) -> list[Tensor]:
    """List the tensors of a nested output in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in flat_tensors(v)]
    return []
