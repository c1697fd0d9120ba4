"""Prove that a small model computes what the gated one computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunewise.core.errors import VerificationError
from prunewise.core.groups import Grouping
from prunewise.core.sites import masked
from prunewise.core.trace import Inputs, as_call, tensors_of
from prunewise.core.untouched import attributes_kept, buffers_kept, copied, forget_caches, in_mode, seeded

_PLAIN = 1e-4  # what differs by more has to be shown to be rounding, by float64 copies
_MAX_COPIED = 500_000_000  # parameters of a model that is copied in float64, 8 bytes each


@dataclass
class Outputs:
    """The tensors that a forward pass returns, and the machine epsilon of the coarsest dtype that it computed in."""

    tensors: list[Tensor]
    epsilon: float

    @property
    def rounding(self) -> float:
        """What rounding may come to, relative to the largest output: depth, and norms over few samples, amplify it."""
        return 1e-9 if self.epsilon < 1e-10 else 1e-3 if self.epsilon < 1e-5 else 0.1


def check_equal(
    model: nn.Module,
    small: nn.Module,
    grouping: Grouping,
    keep: Mapping[str, tuple[int, ...]],
    example_inputs: Inputs,
) -> float:
    """Compare the small model with the masked original on the example inputs.

    In eval mode; in train mode as well where the model does something else there (and draws no random numbers). Where
    outputs differ by more than 1e-4 of the largest, float64 copies of both models are compared instead: rounding is
    gone there, a mistake is not. Where such a copy is too large, does not run, or computes in a coarser dtype all the
    same, what rounding may come to in that dtype is allowed. Both models' buffers, attributes and modes, and the random
    state, are left as they were.

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
    what = f"the small model ({'train' if training else 'eval'} mode)"
    with masked(model, grouping, keep):
        want = outputs(model, example_inputs, training)
    try:
        got = outputs(small, example_inputs, training)
    except Exception as error:  # a kernel that does not take every width, say
        raise VerificationError(
            f"{what} does not run: {type(error).__name__}: {error}. Where a kernel asks for widths that are multiples of a "
            "number, give that as round_to="
        ) from error
    try:
        return compare(want, got, what, at_most=_PLAIN)
    except VerificationError:
        with masked(model, grouping, keep):
            exact = _in_float64(model, example_inputs, training)
        exact_small = _in_float64(small, example_inputs, training) if exact is not None else None
    if exact is None or exact_small is None:
        return compare(want, got, what)
    return compare(exact, exact_small, what)


def _in_float64(model: nn.Module, example_inputs: Inputs, training: bool) -> Outputs | None:
    """The outputs of a float64 copy of `model`; None where it would be too large, or does not run."""
    if sum(p.numel() for p in model.parameters()) > _MAX_COPIED:
        return None
    args, kwargs = as_call(example_inputs)
    try:
        return outputs(copied(model).double(), tree_map(_widened, kwargs or args), training)
    except Exception:  # the code may be written for one dtype only, the device without float64
        return None


def _widened(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.double() if leaf.is_floating_point() else leaf.to(torch.complex128) if leaf.is_complex() else leaf


def compare(want: Outputs, got: Outputs, what: str, *, at_most: float = 1.0) -> float:
    """The largest difference of the outputs of two models, relative to the largest output.

    Raises:
        VerificationError: it is larger than `at_most`, or than rounding explains.
    """
    if len(want.tensors) != len(got.tensors):
        raise VerificationError(f"{what} returns {len(got.tensors)} tensors, the masked one {len(want.tensors)}")
    worst, allowed = 0.0, min(at_most, max(want.rounding, got.rounding))
    for a, b in zip(want.tensors, got.tensors, strict=True):
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
        if difference > allowed:
            raise VerificationError(
                f"{what} differs from the masked one by {difference:.2e} of the largest output. The model was left as "
                "it was. This is a defect of prunewise: please report the model's code"
            )
        worst = max(worst, difference)
    return worst


class _Coarsest(TorchDispatchMode):
    """Notes the largest machine epsilon among the dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.epsilon = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.epsilon = max(self.epsilon, torch.finfo(leaf.dtype).eps)
        return out


def outputs(model: nn.Module, example_inputs: Inputs, training: bool) -> Outputs:
    """All tensors that a forward pass returns, with nothing left changed."""
    args, kwargs = as_call(example_inputs)
    with (
        torch.no_grad(),
        in_mode(model, training),
        attributes_kept(model),
        buffers_kept(model),
        seeded(model),
        _Coarsest() as coarsest,
    ):
        forget_caches(model)
        args, kwargs = tree_map(
            lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs)
        )  # some write to them
        return Outputs([t.clone() for t in tensors_of(model(*args, **kwargs))], coarsest.epsilon)
