"""Keep masks of an exact count, and weights exchanged for a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prunewise.layers.weights import Layer


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


@contextmanager
def with_weights(exchanged: Iterable[tuple[Layer, Tensor]]) -> Iterator[None]:
    """While active, these layers have these weights; afterwards their own, bit for bit. Not for use while gradients are taken."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer, weight in exchanged:
                before.append((layer.parameter, layer.parameter.detach().clone()))
                layer.parameter.copy_(weight)
        yield
    finally:
        with torch.no_grad():
            for parameter, own in reversed(before):
                parameter.copy_(own)
