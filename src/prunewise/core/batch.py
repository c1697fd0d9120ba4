"""Batches as loaders give them: which part the model takes, the loss by default, gradients for a moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.errors import DataError
from prunewise.core.trace import Inputs, as_call
from prunewise.core.untouched import untouched

Loss = Callable[[nn.Module, Any], Tensor] | nn.Module

TARGET_KEYS = ("labels", "label", "targets", "target")


def inputs_of(batch: Any) -> Inputs:
    """The model's inputs in a batch: a dict without its targets, a tuple or list without its last item."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[0] if len(batch) == 2 else tuple(batch[:-1])
    return batch


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` (any nest of mappings, tuples and lists) with each of its tensors changed; mappings become dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind: Any = type(value)
        return kind(*(mapped(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, change) for v in value)
    return value


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` (any nest of mappings, tuples and lists) with all its tensors on `device`, and none that cannot have a history."""

    def move(tensor: Tensor) -> Tensor:
        # A copy back to the CPU must have arrived before it is read.
        there = tensor.to(device, non_blocking=torch.device(device).type != "cpu")
        return there.clone() if there.is_inference() and not torch.is_inference_mode_enabled() else there

    return mapped(value, move)


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
        DataError: the model returns no loss for a dict, or no logits for the others, or the batch is neither.
    """
    device = device_of(model)
    if isinstance(batch, Mapping):
        out = model(**moved(batch, device))
        value = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if value is None:
            raise DataError("the model returns no 'loss' for a batch that is a dict: give loss=, of (model, batch)")
        return value  # type: ignore[no-any-return]
    targets, outputs = moved(targets_of(batch), device), run(model, batch)
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"the model returns a {type(outputs).__name__} and no tensor of logits: give loss=, of (model, batch)"
        )
    # As a training in mixed precision takes it: in half precision losses hardly differ.
    return nn.functional.cross_entropy(outputs.float() if outputs.element_size() < 4 else outputs, targets)


def targets_of(batch: Any) -> Tensor:
    """The targets of a batch (inputs, targets).

    Raises:
        DataError: it is none, or they are no tensor.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[-1], Tensor):
        raise DataError("a loss needs targets: give batches of (inputs, targets), tensors, or loss=, of (model, batch)")
    return batch[-1]


def one_number(loss: Any) -> Tensor:
    """The loss as a scalar."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shown = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(f"the loss should be one number and is {shown}: reduce it (mean) before it is returned")
    return loss.reshape(())


def loss_of(loss: Loss | None) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of a batch as a function of (model, batch) → scalar.

    Args:
        loss: such a function; or a criterion, an nn.Module of (outputs, targets); None: `cross_entropy`.
    """
    if not isinstance(loss, nn.Module):
        given = loss or cross_entropy
        return lambda model, batch: one_number(given(model, batch))
    criterion = copy.deepcopy(loss)

    def value(model: nn.Module, batch: Any) -> Tensor:
        device = device_of(model)
        return one_number(criterion.to(device)(run(model, batch), moved(targets_of(batch), device)))

    return value


def gradients(value: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """∂value/∂parameter of each, None where it does not depend on one.

    Raises:
        DataError: it depends on nothing.
    """
    if not value.requires_grad:
        raise DataError("the loss depends on no weight: return it with its history, not detached")
    return torch.autograd.grad(value, parameters, allow_unused=True)


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """While active, `model` is in eval mode and gradients reach `parameters`, frozen ones too; nothing of it is left behind."""
    needed = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), untouched(model):
            yield
    finally:
        for p, need in zip(parameters, needed, strict=True):
            p.requires_grad_(need)
