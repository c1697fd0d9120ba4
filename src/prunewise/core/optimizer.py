"""Carry an optimizer's state, and gradients, over to a smaller model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.core.blocks import with_branches
from prunewise.core.branches import Dropped
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
    parameter groups and their settings stay. Gradients that `model` has accumulated are handed on, sliced too. The
    optimizer is changed in place; parameters of other models in it are left alone.

    Raises:
        PlanError: `plan` is not the one that leads from `model` to `small`.
    """
    grouping = find_groups(analyse(model, example_inputs))
    if plan.drops_blocks:
        grouping = with_branches(grouping, model, example_inputs)
    plan.check(model, grouping.groups, grouping.branches)
    move_optimizer(optimizer, model, small, state_slices(grouping, plan.keep))


def move_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, slices: Slices) -> None:
    """`migrate_optimizer` with the slices at hand."""
    new = dict(small.named_parameters(remove_duplicate=False))
    stubs = tuple(f"{name}." for name, m in small.named_modules(remove_duplicate=False) if isinstance(m, Dropped))
    gone: set[Tensor] = set()
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    moves: dict[Tensor, tuple[Tensor, Mapping[int, npt.NDArray[np.int64]]]] = {}
    for name, p in model.named_parameters():
        dims = slices.get(name, {})
        target = next((new[n] for n in names[p] if n in new), None)
        if target is None and all(n.startswith(stubs) for n in names[p]):  # it went with a block
            gone.add(p)
            optimizer.state.pop(p, None)
            continue
        shape = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(p.shape))
        if target is None or tuple(target.shape) != shape:
            raise PlanError(f"parameter {name!r} of the small model does not come from this model by this plan")
        moves[p] = (target, dims)
    for group in optimizer.param_groups:
        group["params"] = [moves[p][0] if p in moves else p for p in group["params"] if p not in gone]
    for before, (after, cut) in moves.items():
        if before.grad is not None:
            after.grad = take(before.grad, cut)
        state = optimizer.state.pop(before, None)
        if state is not None:
            optimizer.state[after] = {
                k: take(v, cut) if isinstance(v, Tensor) and v.shape == before.shape else v for k, v in state.items()
            }
