"""The whole job in one call, for those with no training loop of their own."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise._loops import (
    Steps,
    check_settings,
    cosine,
    digest_of,
    first_batch,
    make_optimizer,
    own_randomness,
    require_callable,
    seed_epoch,
    warn_of_other_weights,
)
from prunewise._training import HistoryRow, Metric, Run, Score, Task
from prunewise.channels.attach import attach_gates
from prunewise.channels.budget import Budget
from prunewise.channels.choose import Scores, choose_units
from prunewise.channels.importance import Importance as UnitImportance
from prunewise.channels.importance import magnitude
from prunewise.channels.oneshot import limits_for, make_plan, plan_channels
from prunewise.core.batch import Loss, inputs_of, moved
from prunewise.core.cost import measure
from prunewise.core.errors import PlanError
from prunewise.core.groups import Choice
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.sparsity import SparsityPlan
from prunewise.core.surgery import Surgeon, apply_plan, require_ungated
from prunewise.core.trace import Inputs
from prunewise.layers.allocate import Importance as LayerImportance
from prunewise.layers.allocate import allocation
from prunewise.layers.weights import find_layers

_TAYLOR_BATCHES = 10


@dataclass(frozen=True)
class CompressReport:
    """What `compress` did. `print` it for a table.

    Attributes:
        before, after: costs of the original and of the small model on the example inputs.
        metric: name of the metric: "accuracy" (higher is better), "loss" (lower is better), or that of your callable.
        original: of the model as given; None without `val_loader` (and so are the other two).
        gated: after training, before the channels were removed. For a one-shot method: after removal, before training.
        small: of the result. With gates it equals `gated`, to the sample.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    metric: str
    original: Score | None
    gated: Score | None
    small: Score | None

    def __str__(self) -> str:
        rows = [("", "before", "after", "share")]
        for kind, old in self.before.items():
            new = self.after[kind]
            rows.append((kind, f"{old:,}", f"{new:,}", f"{100 * new / old:.1f} %" if old else "-"))
        if self.original is not None and self.small is not None:
            rows.append((self.metric, f"{self.original.value:.4f}", f"{self.small.value:.4f}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in rows
        ]
        if self.gated is not None and self.small is not None and self.gated.correct is not None:
            lines.append(
                f"right before the cut: {self.gated.correct:,} of {self.gated.total:,}; result: {self.small.correct:,}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class CompressResult:
    """The small model (in eval mode), the plan that made it, one row an epoch, and what it cost before and after."""

    model: nn.Module
    plan: ChannelPlan
    history: list[HistoryRow]
    report: CompressReport


def compress(
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    budget: Budget,
    epochs: int,
    val_loader: Iterable[Any] | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    lr_schedule: Callable[[float], float] = cosine,
    method: str = "gates",
    example_inputs: Inputs = None,
    include: Choice = None,
    exclude: Choice = None,
    min_keep: int = 1,
    round_to: int = 1,
    drop_blocks: bool = False,
    shrink_every: int | None = None,
    amp: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> CompressResult:
    """Train `model` under gates until it fits `budget`, and return the small model. The given model is not changed.

    Batches are (inputs, targets); tuples that are longer hold several positional inputs, the targets last; dicts are keyword
    arguments of the model, which then returns its own `loss`. They are moved to the model's device.

    **Resuming.** With `checkpoint`, the state of the run is saved there after every epoch (and every `checkpoint_every`
    steps), at one stroke, as JSON and safetensors. A call with the same arguments goes on from there, however the one
    before ended. Guaranteed: the same plan and weights as an undisturbed run, where the same arithmetic is done in the same order
    (same machine, versions and number of threads; deterministic kernels) and the batches of an epoch depend on nothing but the
    random generators of torch, NumPy and Python, the generators of the loader and its samplers, and `set_epoch`: all of
    these are seeded from (seed, epoch) when an epoch starts, and put back when the call ends. Not so with
    `persistent_workers` and random augmentation in the workers. Going on within an epoch loads its first batches again.

    Args:
        model: a trained network, on the device where it is to train.
        train_loader: a DataLoader, or any iterable with a length that can be iterated once an epoch.
        budget: what the small network may cost on the example inputs (absolute counts: of a whole batch, where these are the
            first batch's).
        epochs: of training, the closing of the gates included.
        val_loader: for the metric; without it there is none.
        loss: a criterion (a module, called with outputs and targets), or a callable of (model, batch); default:
            cross-entropy, or what the model returns as `loss` for a dict.
        metric: a callable of (model, val_loader), the model in eval mode; default: accuracy where the loss is
            cross-entropy, else the mean loss.
        optimizer: makes an optimizer of the list of parameters; default: SGD, learning rate 0.01, Nesterov momentum 0.9,
            weight decay 5e-4.
        lr_schedule: factor of the learning rate at a share of the run in [0, 1); default: half a cosine.
        method: "gates", or a one-shot importance ("magnitude", "bn_scale", "taylor", "hybrid", "random"), after which the
            small model is trained.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords); default: the inputs of the first batch.
        include, exclude: names, shell patterns or a callable that select channel groups.
        min_keep: no group keeps fewer units.
        round_to: kept widths are multiples of this (or the full width).
        drop_blocks: residual blocks may go as a whole; with gates, "taylor" or "hybrid", and `min_keep` 1.
        shrink_every: remove closed channels for good every so many steps, so that training gets faster as it prunes; with
            gates only.
        amp: compute in bfloat16 where torch.autocast sees fit.
        seed: of everything random.
        checkpoint: a folder of this run alone.
        checkpoint_every: steps between two checkpoints within an epoch.
        progress: show a bar (with rich, on a terminal) or a line an epoch, on stderr.

    Raises:
        BudgetError, NoPrunableGroupError, TraceError, AlreadyGatedError: as `attach_gates`, before any training.
        PlanError: settings do not go together.
        DataError: the loader or a setting cannot be used.
        NonFiniteError: the loss is not finite; nothing of that step was applied.
        CheckpointError: the folder holds another run, or is damaged.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(0, 2, (16,))) for _ in range(5)]
        >>> compress(model, batches, budget=Budget(macs=0.5), epochs=2, progress=False).model[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    require_ungated(model)
    check_settings(train_loader, epochs, seed, checkpoint_every)
    require_callable("loss", loss, "of (model, batch), or a criterion")
    require_callable("metric", metric, "of (model, val_loader)")
    require_callable("lr_schedule", lr_schedule, "from the share of the run to a factor of the rate")
    if shrink_every is not None and method != "gates":
        raise PlanError(f"shrink_every= needs method='gates', not {method!r}, which removes all at the start")
    if checkpoint is not None and getattr(train_loader, "persistent_workers", False):
        warnings.warn(
            "persistent_workers: a resumed run may draw other augmentations than an undisturbed one", stacklevel=2
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    task = Task(device, loss, metric, val_loader, amp)
    with own_randomness(device, train_loader):
        seed_epoch(train_loader, seed, 0)
        if example_inputs is None:
            example_inputs = moved(inputs_of(first_batch(train_loader)), device)
        network = copy.deepcopy(model)
        choice: dict[str, Any] = {
            "include": include, "exclude": exclude, "min_keep": min_keep, "round_to": round_to, "drop_blocks": drop_blocks,
        }  # fmt: skip
        session, plan = None, None
        steps = Steps(train_loader, epochs)
        if method == "gates":
            session = attach_gates(
                network, example_inputs, budget=budget, total_steps=steps.total, shrink_every=shrink_every, **choice
            )
        else:
            data = list(islice(train_loader, _TAYLOR_BATCHES)) if method in ("taylor", "hybrid") else None
            plan = plan_channels(
                network,
                example_inputs,
                budget=budget,
                importance=method,
                data=data,
                loss=task.loss,
                seed=seed,
                **choice,
            )
            network = apply_plan(network, plan, example_inputs)
        run = Run(network, session, plan, task, train_loader, epochs, steps, seed, lr_schedule)
        run.optimizer = make_optimizer(optimizer, network)
        run.base_rates = [float(group["lr"]) for group in run.optimizer.param_groups]
        if checkpoint is not None:
            run.start = start = digest_of(model)
            run.keep_in(Path(checkpoint), checkpoint_every, {
                "model": fingerprint(model), "budget": repr(budget), "method": method, "amp": amp,
                "drop_blocks": drop_blocks, "shrink_every": shrink_every,
            })  # fmt: skip
            warn_of_other_weights(run.start, start, Path(checkpoint))
        if not run.resumed:
            run.original = task.score(model)
            run.gated = task.score(network) if plan is not None else None
        run.train(progress)
        if session is not None:
            session.harden()
            run.gated = task.score(network)
            network = session.finish()
            plan = session.plan
        assert plan is not None
        small = network.eval()
        report = CompressReport(
            measure(model, example_inputs).as_dict(),
            measure(small, example_inputs).as_dict(),
            task.metric_name,
            run.original,
            run.gated,
            task.score(small),
        )
    return CompressResult(small, plan, run.history, report)


# -- layers and channels ------------------------------------------------------------------------------------------

# Total densities at which shares of channels are read off; between them they are interpolated.
_DENSITIES = np.concatenate([[1.0], np.geomspace(0.95, 1e-4, 63)])


def allocate_channels(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: Budget,
    importance: str | LayerImportance = "capacity",
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    units: UnitImportance = magnitude,
    include: Choice = None,
    exclude: Choice = None,
    min_keep: int = 1,
    round_to: int = 1,
    progress: bool = True,
) -> ChannelPlan:
    """Choose how many channels each group keeps by the importance of its layers, and which ones by their magnitude.

    `allocate` gives a density to each layer at every total; a group keeps the square root of the mean density (by weights)
    of the layers that make its channels, because cutting inputs and outputs alike by s leaves s² of the weights. The
    total is lowered until the network's true cost meets the budget; then what still fits is put back.

    Args:
        model: the network; not changed.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        budget: what the small network may cost.
        importance, data, loss: of layers, as for `allocate`. All are measured that are used and whose weight is a plain
            parameter; groups that none of them makes keep the total density.
        units: ranks the channels within a group: a callable from (model, groups) to {group name: scores (units,), higher = keep}.
        include, exclude, min_keep, round_to: of groups, as for `plan_channels`.
        progress: show how far the pass over the data is, on stderr.

    Raises:
        BudgetError: the budget cannot be met; the message says what the floor is.
        NoPrunableGroupError: nothing can be removed.
        PlanError, DataError, NonFiniteError: as `allocate` and `plan_channels` do.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = allocate_channels(model, torch.zeros(1, 4), budget=Budget(macs=0.5), importance="erk")
        >>> plan.cost_after["macs"] <= 56
        True
    """
    require_ungated(model)
    surgeon = Surgeon.of(model, example_inputs)
    costs, trace = surgeon.costs, surgeon.grouping.structure.trace
    limits = limits_for(model, costs, budget, include, exclude, min_keep, round_to, example_inputs)
    used = {trace.tensors[i].name for i in trace.used_state()}
    # Nothing is known of layers that are never used or whose weight is computed (by a parametrization): no columns.
    layers = find_layers(model, lambda x: x.columns > 0 and any(owner.parameter_name in used for owner in x.owners))
    plan_at = allocation(model, layers, importance, data, loss=loss, shown=progress)
    plans = [plan_at(1 - float(density)) for density in _DENSITIES]
    names = {owner.parameter_name: layer.name for layer in layers for owner in layer.owners}
    scores = units(model, limits.groups)
    worth = {}
    for group in limits.groups:
        found = np.asarray(scores.get(group.name, ()), dtype=np.float64)
        if found.shape != (group.size,) or not np.isfinite(found).all():
            raise PlanError(f"units= should give {group.name!r} one finite score for each of its {group.size} units")
        made_by = {names[m.name] for m in group.members if m.role == "out" and m.dim < 2 and m.name in names}
        worth[group.name] = _worth_of(group.size, made_by, plans)[_ranks(found)]
    keep = choose_units(worth, limits)
    notes = {"importance": plans[0].notes["importance"], "allocation": "layers", **limits.notes(keep)}
    return make_plan(fingerprint(model), costs, keep, notes, example_inputs)


def _ranks(scores: Scores) -> npt.NDArray[np.int64]:
    """0 for the highest score; ties go to the lower index."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return ranks


def _worth_of(size: int, made_by: Iterable[str], plans: Sequence[SparsityPlan]) -> Scores:
    """For the best unit of a group, the next, …: the total sparsity at which it goes, shape (units,); the later the more worth."""
    names = sorted(made_by)
    shares = []
    for plan, total in zip(plans, _DENSITIES, strict=True):
        kept = sum(plan.keep[name] for name in names)
        density = kept / sum(plan.sizes[name] for name in names) if names else float(total)
        shares.append(math.sqrt(density))
    falling = np.minimum.accumulate(shares)  # rounding to whole weights may make it rise by one
    goes_at = (np.arange(size) + 0.5) / size
    # np.interp wants rising points; among equal ones the last counts, which is the largest density.
    log_density = np.interp(goes_at, falling[::-1], np.log(_DENSITIES)[::-1])
    result: Scores = -log_density
    return result
