"""2:4 sparse weights in the form that sparse tensor cores compute with."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from prunewise.core.errors import MethodError

_NEEDS = (8, 0)  # compute capability


def to_semi_structured_(model: nn.Module) -> list[str]:
    """Put every 2:4 sparse weight of a linear layer into torch's semi-structured form, in place.

    The values stay the same and take 9/16 of the memory in half precision; matrix products with them run on sparse tensor cores.
    It is a form for inference: make masks permanent, and put the model in eval mode, on the device and in the dtype it is to run
    in, before. What torch cannot put into this form (by its dtype or shape) stays as it is, and a warning names it.

    Args:
        model: on a CUDA device of compute capability 8.0 or more.

    Returns:
        Names of the layers that were changed.

    Raises:
        MethodError: the hardware has no sparse tensor cores, a mask is still in force, or no layer is 2:4 sparse. Nothing is
            changed.
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    masked = next((name for name, module in linear.items() if "weight_mask" in module._buffers), None)
    if masked is not None:
        raise MethodError(f"a mask is in force on {masked!r}: call make_permanent_ first")
    sparse = {name: module for name, module in linear.items() if is_two_of_four(module.weight)}
    if not sparse:
        raise MethodError(
            "no linear layer is 2:4 sparse: sparsify with method='2:4' and a plan of allocate(model, 0.5, 'uniform')"
        )
    lacking = next((name for name, module in sparse.items() if not _has_sparse_cores(module.weight.device)), None)
    if lacking is not None:
        raise MethodError(
            f"{lacking!r} is on {sparse[lacking].weight.device}, which has no sparse tensor cores: move the model to a CUDA device "
            f"of compute capability {_NEEDS[0]}.{_NEEDS[1]} or more"
        )
    converted: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name, module in sparse.items():
        try:
            converted[name] = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        except (RuntimeError, ValueError) as error:
            refused[name] = str(error).strip().partition("\n")[0]
    for name, weight in converted.items():
        sparse[name].weight = nn.Parameter(weight, requires_grad=False)
    if refused:
        name, why = next(iter(refused.items()))
        warnings.warn(
            f"{len(refused)} of {len(sparse)} layers that are 2:4 sparse stay dense, {name!r} because: {why}",
            stacklevel=2,
        )
    return list(converted)


def is_two_of_four(weight: Tensor) -> bool:
    """True for a matrix with at most two non-zeros in every four neighbours of a row.

    Example:
        >>> is_two_of_four(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 3]])), is_two_of_four(torch.ones(2, 4))
        (True, False)
    """
    if (
        weight.layout != torch.strided
        or weight.dim() != 2
        or weight.shape[1] % 4
        or not weight.numel()
        or weight.is_meta
    ):
        return False
    return bool(((weight.detach() != 0).reshape(-1, 4).sum(1) <= 2).all())


def _has_sparse_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _NEEDS
