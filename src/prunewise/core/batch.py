"""Batches as loaders give them: which part the model takes, the loss by default, gradients for a moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.errors import DataError
from prunewise.core.trace import Inputs, as_call
from prunewise.core.untouched import evaluating

TARGET_KEYS = ("labels", "label", "targets", "target")


def inputs_of(batch: Any) -> Inputs:
    """The model's inputs in a batch: a dict without its targets, a tuple or list without its last item."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[0] if len(batch) == 2 else tuple(batch[:-1])
    return batch


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` (any nest of mappings, tuples and lists) with all its tensors on `device`."""
    if isinstance(value, Tensor):
        # A copy back to the CPU must have arrived before it is read.
        return value.to(device, non_blocking=torch.device(device).type != "cpu")
    if isinstance(value, Mapping):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind: Any = type(value)
        return kind(*(moved(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    return value


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def run(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for the inputs in `batch`."""
    args, kwargs = as_call(moved(inputs_of(batch), device_of(model)))
    return model(*args, **kwargs)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The default loss: cross-entropy of `model(inputs)` for (inputs, targets); for a dict, the `loss` that the model returns.

    Raises:
        DataError: the model returns no loss for a dict, or the batch is neither.
    """
    device = device_of(model)
    if isinstance(batch, Mapping):
        out = model(**moved(batch, device))
        value = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if value is None:
            raise DataError("the model returns no 'loss' for a batch that is a dict: give loss=, of (model, batch)")
        return value  # type: ignore[no-any-return]
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise DataError("a loss needs targets: give batches of (inputs, targets), or loss=, of (model, batch)")
    return nn.functional.cross_entropy(run(model, batch), batch[-1].to(device))


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """While active, `model` is in eval mode and gradients reach `parameters`, frozen ones too."""
    needed = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield
    finally:
        for p, need in zip(parameters, needed, strict=True):
            p.requires_grad_(need)
