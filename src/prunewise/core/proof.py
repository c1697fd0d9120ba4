"""Prove that a small model computes what the gated one computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunewise.core.errors import VerificationError
from prunewise.core.groups import Grouping
from prunewise.core.sites import masked
from prunewise.core.trace import Inputs, as_call, attributes_kept, in_mode, tensors_of


def check_equal(
    model: nn.Module,
    small: nn.Module,
    grouping: Grouping,
    keep: Mapping[str, tuple[int, ...]],
    example_inputs: Inputs,
) -> float:
    """Compare the small model with the masked original on the example inputs.

    In eval mode; in train mode as well where the model does something else there (and draws no random numbers).
    Both models' buffers, attributes and modes, and the random state, are left as they were.

    Returns:
        The largest difference relative to the largest output.

    Raises:
        VerificationError: it is larger than rounding explains.
    """
    if any(p.is_meta for p in model.parameters()):
        return 0.0
    passes = grouping.structure.passes
    modes = [False, True] if len(passes) > 1 and not passes[1].trace.draws_random_numbers() else [False]
    return max(_difference(model, small, grouping, keep, example_inputs, training) for training in modes)


def _difference(
    model: nn.Module,
    small: nn.Module,
    grouping: Grouping,
    keep: Mapping[str, tuple[int, ...]],
    example_inputs: Inputs,
    training: bool,
) -> float:
    with masked(model, grouping.groups, keep, grouping.branches):
        want = outputs(model, example_inputs, training)
    got = outputs(small, example_inputs, training)
    return compare(want, got, f"the small model ({'train' if training else 'eval'} mode)")


def compare(want: list[Tensor], got: list[Tensor], what: str) -> float:
    """The largest difference of two lists of outputs, relative to the largest output.

    Raises:
        VerificationError: it is larger than rounding explains.
    """
    if len(want) != len(got):
        raise VerificationError(f"{what} returns {len(got)} tensors, the masked one {len(want)}")
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if a.shape != b.shape:
            raise VerificationError(f"{what} gives an output of shape {tuple(b.shape)}, should be {tuple(a.shape)}")
        if not (a.is_floating_point() or a.is_complex()) or not a.numel():
            continue
        finite = a.isfinite()
        if not torch.equal(torch.where(finite, 0, a).nan_to_num(7), torch.where(b.isfinite(), 0, b).nan_to_num(7)):
            raise VerificationError(
                f"{what} has outputs that are not finite where the masked one's are, or the reverse"
            )
        a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
        difference = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12)
        if difference > _TOLERANCE.get(a.dtype, 0.1):
            raise VerificationError(
                f"{what} differs from the masked one by {difference:.2e} of the largest output. The model was left as "
                "it was. This is a defect of prunewise: please report the model's code"
            )
        worst = max(worst, difference)
    return worst


# Rounding, amplified by the depth of a network; what a wrong index does is far larger.
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-3, torch.complex64: 1e-3}


def outputs(model: nn.Module, example_inputs: Inputs, training: bool) -> list[Tensor]:
    """All tensors that a forward pass returns, with nothing left changed."""
    args, kwargs = as_call(example_inputs)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with (
            torch.no_grad(),
            in_mode(model, training),
            attributes_kept(model),
            torch.random.fork_rng(devices=sorted(devices)),
        ):
            torch.manual_seed(0)
            return [t.clone() for t in tensors_of(model(*args, **kwargs))]
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
