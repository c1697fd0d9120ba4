"""What a layer multiplies its weights with: its input as rows, one an output position, for any convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.layers.weights import CONV, TRANSPOSED, Layer


def channels_of(module: nn.Module, values: Tensor, positions: int | None = None) -> Tensor:
    """Input or output of a layer as one row a position and sample, shape (rows, C), in its own dtype.

    Args:
        module: a convolution or linear layer.
        values: (N, C, ...) of a convolution (or unbatched, without N), (N, ..., C) of a linear layer.
        positions: at most so many positions of each sample, evenly spaced; None for all. They depend on the shape
            only, so that batches do not matter.
    """
    if isinstance(module, CONV + TRANSPOSED):
        dims = len(module.kernel_size)
        values = values.unsqueeze(0) if values.dim() == dims + 1 else values
        values = values.flatten(2).transpose(1, 2)  # (N, positions, C)
    elif values.dim() > 2:
        values = values.flatten(1, -2)
    else:
        return values.reshape(-1, values.shape[-1])
    count = values.shape[1]
    if positions is not None and count > positions:
        # The middle of each of `positions` equal stretches.
        at = (torch.arange(positions, device=values.device) * 2 + 1) * count // (2 * positions)
        values = values[:, at]
    return values.reshape(-1, values.shape[-1])


def patches_of(layer: Layer, inputs: Tensor, output_shape: Sequence[int]) -> Tensor:
    """What each output is a weighted sum of, shape (groups, rows, columns): output = patches @ matrixᵀ (+ bias), group by group.

    Rows are samples times output positions; columns are those of `Layer.as_matrix`. A transposed convolution's output may
    have one of several shapes; the others do not look at `output_shape`.
    """
    module: Any = layer.module
    if isinstance(module, TRANSPOSED):
        inputs = _stuffed(module, inputs, output_shape)
        stride, flip = (1,) * len(module.kernel_size), True
    elif isinstance(module, CONV):
        dims = len(module.kernel_size)
        inputs = inputs.unsqueeze(0) if inputs.dim() == dims + 1 else inputs
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        stride, flip = module.stride, False
    else:
        return inputs.reshape(1, -1, inputs.shape[-1])
    dims = len(module.kernel_size)
    for d, (size, step, gap) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True)):
        inputs = inputs.unfold(2 + d, (size - 1) * gap + 1, step)[..., ::gap]
    if flip:
        inputs = inputs.flip(tuple(range(2 + dims, 2 + 2 * dims)))
    n, channels = inputs.shape[:2]
    # (N, C, positions, kernel) -> (groups, N · positions, C of a group · kernel)
    flat = inputs.reshape(n, layer.groups, channels // layer.groups, -1, layer.positions)
    return flat.permute(1, 0, 3, 2, 4).reshape(layer.groups, -1, layer.columns)


def squares_of(layer: Layer, inputs: Tensor, output_shape: Sequence[int]) -> tuple[Tensor, int]:
    """Σ of squares of each column of `patches_of` over its rows, shape (groups, columns), float64; and how many rows there are.

    Samples are summed before they are cut into patches: a square stands where its value stood.
    """
    module: Any = layer.module
    if not isinstance(module, CONV + TRANSPOSED):
        rows = inputs.reshape(-1, inputs.shape[-1])
        return _sum_of_squares(rows), len(rows)
    dims = len(module.kernel_size)
    inputs = inputs.unsqueeze(0) if inputs.dim() == dims + 1 else inputs
    patches = patches_of(layer, _sum_of_squares(inputs), output_shape)
    return patches.sum(1), patches.shape[1] * len(inputs)


def _sum_of_squares(values: Tensor) -> Tensor:
    """Sum along the first dimension, which stays, of size 1; float64. By pieces that a cache holds: several times as fast."""
    total = values.new_zeros((1, *values.shape[1:]), dtype=torch.float64)
    for piece in values.split(max(1, 2**19 // max(1, total.numel()))):
        total += piece.to(torch.float64).square().sum(0)
    return total


def _stuffed(module: Any, inputs: Tensor, output_shape: Sequence[int]) -> Tensor:
    """The input of a transposed convolution, spread out and padded: it is a plain convolution of that, with the kernel flipped."""
    dims = len(module.kernel_size)
    inputs = inputs.unsqueeze(0) if inputs.dim() == dims + 1 else inputs
    sizes = [(s - 1) * step + 1 for s, step in zip(inputs.shape[2:], module.stride, strict=True)]
    spread = inputs.new_zeros((*inputs.shape[:2], *sizes))
    every: list[slice] = [slice(None, None, int(step)) for step in module.stride]
    spread[(slice(None), slice(None), *every)] = inputs
    padding: list[int] = []
    for size, gap, cut, length, out in zip(
        module.kernel_size, module.dilation, module.padding, sizes, output_shape[-dims:], strict=True
    ):
        edge = gap * (size - 1) - cut
        padding = [edge, out - length - edge + gap * (size - 1), *padding]  # torch pads the last dimension first
    return nn.functional.pad(spread, padding)
