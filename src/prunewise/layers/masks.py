"""Keep masks of an exact count, masks in force, and weights exchanged for a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from prunewise.layers.weights import Layer, is_masked


def top(scores: Tensor, keep: int) -> Tensor:
    """True for the `keep` highest scores, exactly so many; ties go to the lower index. Shape of `scores`.

    Example:
        >>> top(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2)
        tensor([False,  True,  True, False])
    """
    flat = scores.detach().reshape(-1)
    count = flat.numel()
    if keep <= 0 or keep >= count:
        return torch.full(scores.shape, keep > 0, device=scores.device)
    threshold = torch.kthvalue(flat, count - keep + 1).values
    keep_mask = flat > threshold
    ties = torch.nonzero(flat == threshold).reshape(-1)
    keep_mask[ties[: keep - int(keep_mask.sum())]] = True
    return keep_mask.reshape(scores.shape)


def put_mask_(module: nn.Module, tensor: str, keep_mask: Tensor) -> None:
    """Put a mask in force on a weight of a module, as torch.nn.utils.prune does, in place of one that may be there."""
    if is_masked(module, tensor):
        module._buffers[f"{tensor}_mask"] = keep_mask.to(module._buffers[f"{tensor}_mask"])
    else:
        prune.custom_from_mask(module, tensor, keep_mask)
    # As the hook would leave it before a forward pass, but without a graph: so that the model can be copied.
    mask, parameter = module._buffers[f"{tensor}_mask"], module._parameters[f"{tensor}_orig"]
    assert mask is not None and parameter is not None
    setattr(module, tensor, parameter.detach() * mask.to(parameter.dtype))


@contextmanager
def with_weights(exchanged: Iterable[tuple[Layer, Tensor]]) -> Iterator[None]:
    """While active, these layers have these weights; afterwards their own, bit for bit. Not for use while gradients are taken."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer, weight in exchanged:
                before.append((layer.parameter, layer.parameter.detach().clone()))
                layer.parameter.copy_(weight)
        torch.clear_autocast_cache()  # under autocast it would go on with the weights before
        yield
    finally:
        with torch.no_grad():
            for parameter, own in reversed(before):
                parameter.copy_(own)
        torch.clear_autocast_cache()
