"""Carry an optimizer's state over to a smaller model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.core.errors import PlanError
from prunewise.core.groups import find_groups
from prunewise.core.plan import ChannelPlan
from prunewise.core.slices import Slices, state_slices, take
from prunewise.core.structure import analyse
from prunewise.core.trace import Inputs


def migrate_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    plan: ChannelPlan,
    example_inputs: Inputs,
) -> None:
    """Point `optimizer` (made for `model`) at the parameters of `small`, its state sliced as they were.

    Momenta, second moments and whatever else has a parameter's shape lose the removed channels; step counts,
    parameter groups and their settings stay. The optimizer is changed in place; parameters of other models in
    it are left alone.

    Raises:
        PlanError: `plan` is not the one that leads from `model` to `small`.
    """
    grouping = find_groups(analyse(model, example_inputs))
    plan.check(model, grouping.groups)
    move_optimizer(optimizer, model, small, state_slices(grouping, plan.keep))


def move_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, slices: Slices) -> None:
    """`migrate_optimizer` with the slices at hand."""
    new = dict(small.named_parameters())
    moves: dict[Tensor, tuple[Tensor, Mapping[int, npt.NDArray[np.int64]]]] = {}
    for name, p in model.named_parameters():
        target, dims = new.get(name), slices.get(name, {})
        shape = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(p.shape))
        if target is None or tuple(target.shape) != shape:
            raise PlanError(f"parameter {name!r} of the small model does not come from this model by this plan")
        moves[p] = (target, dims)
    for group in optimizer.param_groups:
        group["params"] = [moves[p][0] if p in moves else p for p in group["params"]]
    for before, (after, cut) in moves.items():
        state = optimizer.state.pop(before, None)
        if state is not None:
            optimizer.state[after] = {
                k: take(v, cut) if isinstance(v, Tensor) and v.shape == before.shape else v for k, v in state.items()
            }
