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


def on_device(value: Any, device: torch.device) -> Any:
    """`value` with all its tensors on `device`."""
    return torch.utils._pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, value)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def run(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for the inputs in `batch`."""
    args, kwargs = as_call(on_device(inputs_of(batch), device_of(model)))
    return model(*args, **kwargs)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The default loss: cross-entropy of `model(inputs)` for (inputs, targets); for a dict, the `loss` that the model returns.

    Raises:
        DataError: the model returns no loss for a dict, or the batch is neither.
    """
    device = device_of(model)
    if isinstance(batch, Mapping):
        out = model(**on_device(dict(batch), device))
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
