"""Prove that a small model computes what the gated one computes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from prunewise.core.errors import VerificationError
from prunewise.core.groups import Grouping
from prunewise.core.sites import masked
from prunewise.core.trace import Inputs, as_call, evaluating, tensors_of


def check_equal(
    model: nn.Module,
    small: nn.Module,
    grouping: Grouping,
    keep: Mapping[str, tuple[int, ...]],
    example_inputs: Inputs,
) -> float:
    """Compare the small model with the masked original on the example inputs, in eval mode.

    Returns:
        The largest difference relative to the largest output.

    Raises:
        VerificationError: it is larger than rounding explains.
    """
    if any(p.is_meta for p in model.parameters()):
        return 0.0
    args, kwargs = as_call(example_inputs)
    with torch.no_grad(), evaluating(model), evaluating(small):
        with masked(model, grouping.groups, keep):
            want = tensors_of(model(*args, **kwargs))
        got = tensors_of(small(*args, **kwargs))
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if a.shape != b.shape:
            raise VerificationError(
                f"an output has shape {tuple(b.shape)} where the gated model gives {tuple(a.shape)}"
            )
        if a.is_floating_point() or a.is_complex():
            scale = float(a.abs().max()) if a.numel() else 0.0
            difference = float((a - b).abs().max()) / max(scale, 1e-12) if a.numel() else 0.0
            tolerance = (
                max(1e-9, 1e5 * torch.finfo(a.dtype).eps)
                if a.dtype == torch.float64
                else (1e-3 if a.dtype == torch.float32 else 0.1)
            )
            if not difference <= tolerance and not math.isnan(scale):
                raise VerificationError(
                    f"the small model differs from the gated one by {difference:.2e} of the largest output. The model "
                    "was left as it was. This is a defect of prunewise: please report the model's code"
                )
            worst = max(worst, difference)
    return worst
