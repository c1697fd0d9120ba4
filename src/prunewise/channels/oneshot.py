"""One-shot channel plans: score, choose, done. The baselines, and a start for gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from prunewise.channels import importance as imp
from prunewise.channels.budget import Budget
from prunewise.channels.choose import Limits, Scores, choose_units
from prunewise.channels.dropping import droppable
from prunewise.channels.latency import LatencyModel
from prunewise.core.cost import CostModel
from prunewise.core.errors import BudgetError, NonFiniteError, NoPrunableGroupError, PlanError
from prunewise.core.groups import Choice, select
from prunewise.core.inputs import describe
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.surgery import Surgeon, require_ungated
from prunewise.core.trace import Inputs

Allocation = Literal["uniform", "level", "global"]


def plan_channels(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: Budget,
    importance: str | imp.Importance = "magnitude",
    allocation: Allocation | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    include: Choice = None,
    exclude: Choice = None,
    min_keep: int = 1,
    round_to: int = 1,
    seed: int = 0,
    drop_blocks: bool = False,
) -> ChannelPlan:
    """Choose channels to keep in one shot, without training.

    Args:
        model: the network; not changed.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        budget: what the small network may cost.
        importance: "magnitude" (L1 of filters), "bn_scale", "taylor" (needs `data`), "hybrid" (needs `data`:
            how many units a group keeps by their Taylor masses, which ones by their magnitude, as the gates do),
            "random" (uses `seed`), or a callable from (model, groups) to {group name: scores of shape (units,), higher = keep}.
        allocation: "uniform" keeps the same share of every group and ranks within groups; "level" does so too, and keeps
            the same number in all groups of one size, as a config with one number for all layers can say it (the cost may
            end a little further below the budget); "global" ranks all units by importance per cost. Default: "global" for
            "taylor" and "hybrid" (their scores are comparable between layers), else "uniform".
        data, loss: batches and loss for "taylor" and "hybrid"; see `importance.taylor`.
        include, exclude: names, shell patterns or a callable that select groups.
        min_keep: no group keeps fewer units.
        drop_blocks: residual blocks may go as a whole, where what they are worth per cost is least; only with
            "global" allocation and `min_keep` 1.
        round_to: kept widths are multiples of this (or the full width).

    Returns:
        A plan whose cost is at most the budget, with no unit (or block of `round_to`) left out that would still fit.

    Raises:
        BudgetError: the budget cannot be met; the message says what the floor is.
        NoPrunableGroupError: nothing can be removed.
        PlanError: an unknown importance, or missing data.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = plan_channels(model, torch.zeros(1, 4), budget=Budget(macs=0.5))
        >>> len(plan.keep["0"]), plan.cost_after["macs"]
        (4, 24)
    """
    require_ungated(model)
    if allocation is None:
        allocation = "global" if importance in ("taylor", "hybrid") else "uniform"
    if allocation not in get_args(Allocation):
        raise PlanError(f"allocation {allocation!r} should be one of {', '.join(get_args(Allocation))}")
    if drop_blocks and allocation != "global":
        raise PlanError(
            f"drop_blocks=True needs allocation='global' (as importance='taylor' has it): {allocation!r} keeps all"
        )
    costs = Surgeon.of(model, example_inputs, blocks=drop_blocks).costs
    limits = limits_for(
        model, costs, budget, include, exclude, min_keep, round_to, example_inputs, drop_blocks=drop_blocks
    )
    scores, masses = _scores(model, limits, importance, data, loss, seed)
    worth = _worth(scores, limits, allocation)
    keep = choose_units(worth, limits, masses=masses)
    if allocation == "level":
        keep = _levelled(keep, worth, limits)
    name = importance if isinstance(importance, str) else getattr(importance, "__name__", "custom")
    notes = {"importance": name, "allocation": allocation, **limits.notes(keep)}
    return make_plan(fingerprint(model), costs, keep, notes, example_inputs)


def limits_for(
    model: nn.Module,
    costs: CostModel,
    budget: Budget,
    include: Choice,
    exclude: Choice,
    min_keep: int,
    round_to: int,
    example_inputs: Inputs = None,
    *,
    drop_blocks: bool = False,
) -> Limits:
    """The limits of a choice, checked to be reachable. A latency budget needs the example inputs, to measure on."""
    if not isinstance(budget, Budget):
        raise BudgetError(f"budget={budget!r} should be a Budget, for example Budget(macs=0.5)")
    if min_keep < 1 or round_to < 1:
        raise PlanError(f"min_keep={min_keep} and round_to={round_to} should be at least 1")
    groups = select(costs.grouping.groups, include, exclude)
    if not groups:
        reasons = {g.reason for g in costs.grouping.groups if g.reason}
        raise NoPrunableGroupError(
            f"no channel of this {type(model).__name__} can be removed: "
            f"{'; '.join(sorted(reasons)[:4]) or 'all excluded'}"
        )
    latency = budget.latency_model
    if latency is not None:
        latency.check(costs)
    elif budget.latency_ms is not None:
        latency = LatencyModel.of(costs, model, example_inputs, budget.device)
    branches = droppable(costs.grouping.branches, groups, min_keep) if drop_blocks else ()
    if branches and latency is not None:
        raise PlanError(
            "drop_blocks=True does not go with a latency budget: what a dropped block saves is not measured"
        )
    limits = Limits(costs, tuple(groups), {}, min_keep, round_to, latency, branches)
    absolute = budget.check_reachable(costs, groups, limits.floors, latency)
    return replace(limits, absolute=absolute)


def make_plan(
    architecture: str,
    costs: CostModel,
    keep: Mapping[str, tuple[int, ...]],
    notes: Mapping[str, str],
    example_inputs: Inputs = None,
) -> ChannelPlan:
    """A plan with its costs; groups that keep everything are left out."""
    sizes = {g.name: g.size for g in costs.groups}
    cut = {name: kept for name, kept in keep.items() if len(kept) < sizes[name]}
    after = costs({name: len(kept) for name, kept in cut.items()})
    return ChannelPlan(
        cut,
        {n: sizes[n] for n in cut},
        architecture,
        costs({}).as_dict(),
        after.as_dict(),
        dict(notes),
        describe(example_inputs),
    )


def rank_share(scores: Scores) -> Scores:
    """Ranks as shares in (0, 1): the same for every group, whatever its scores."""
    order = np.lexsort((np.arange(len(scores))[::-1], scores))
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(len(scores))
    return (ranks + 0.5) / len(scores)


def _worth(scores: Mapping[str, Scores], limits: Limits, allocation: Allocation) -> dict[str, Scores]:
    """What each unit is worth, comparable between groups."""
    if allocation != "global":
        return {name: rank_share(values) for name, values in scores.items()}
    share = limits.marginal({})
    return {name: np.asarray(values) / share[name] for name, values in scores.items()}


def _levelled(
    keep: Mapping[str, tuple[int, ...]], worth: Mapping[str, Scores], limits: Limits
) -> dict[str, tuple[int, ...]]:
    """`keep` with the same number, the least, in all groups of one size; what is worth least goes."""
    least: dict[int, int] = {}
    for group in limits.groups:
        least[group.size] = min(least.get(group.size, group.size), len(keep[group.name]))
    sizes = {group.name: group.size for group in limits.groups}
    return {
        name: tuple(sorted(sorted(kept, key=lambda unit: -worth[name][unit])[: least[sizes[name]]]))
        for name, kept in keep.items()
    }


def _scores(
    model: nn.Module, limits: Limits, importance: str | imp.Importance, data: Iterable[Any] | None,
    loss: Callable[..., Tensor] | None, seed: int,
) -> tuple[Mapping[str, Scores], dict[str, float]]:  # fmt: skip
    """The importance of every unit, by group, and of every branch that may go, by name."""
    masses: dict[str, float] = {}
    taylor = partial(imp.taylor, data=() if data is None else data, loss=loss, branches=limits.branches, masses=masses)
    known: dict[str, imp.Importance] = {
        "magnitude": imp.magnitude,
        "bn_scale": imp.bn_scale,
        "random": partial(imp.random, seed=seed),
        "taylor": taylor,
        "hybrid": imp.by_magnitude(taylor),
    }
    groups = limits.groups
    if callable(importance):
        scores = importance(model, groups)
    elif importance in known:
        scores = known[importance](model, groups)
    else:
        raise PlanError(f"unknown importance {importance!r}: use one of {', '.join(known)}, or a callable")
    for group in groups:
        values = scores.get(group.name)
        if values is None or np.shape(values) != (group.size,):
            raise PlanError(f"importance of {group.name!r}: expected one score for each of its {group.size} units")
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"the importance of {group.name!r} is not finite: look at the weights (NaN?) or the loss"
            )
    for branch in limits.branches:  # an importance of units alone: the sum over the group that closes the block
        masses.setdefault(branch.name, min(float(np.sum(scores[name])) for name in branch.cuts))
    return scores, masses
