"""Attach gates to a model."""

from __future__ import annotations

from typing import Literal

from torch import nn

from prunewise.channels.budget import Budget
from prunewise.channels.control import GateControl, Schedule
from prunewise.channels.descent import DescentControl
from prunewise.channels.gate import Gates, Shaping, constant
from prunewise.channels.oneshot import limits_for
from prunewise.channels.session import GateSession
from prunewise.core.errors import BudgetError, PlanError
from prunewise.core.groups import Choice
from prunewise.core.surgery import Surgeon, require_ungated, require_unshared
from prunewise.core.trace import Inputs


def attach_gates(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: Budget,
    total_steps: int,
    include: Choice = None,
    exclude: Choice = None,
    min_keep: int = 1,
    round_to: int = 1,
    schedule: Schedule | None = None,
    shaping: Shaping = constant,
    initial: float = 1.0,
    shrink_every: int | None = None,
    control: Literal["fisher", "descent"] = "fisher",
    drop_blocks: bool = False,
) -> GateSession:
    """Put trainable gates on every removable channel of `model`.

    The gates multiply the weights that read the channels, so the gated model equals the pruned one at any
    time, and costs next to nothing more to train. Where a norm averages over channels (LayerNorm on a residual
    stream), hooks on it leave closed ones out of the average, at the price of some element-wise operations; `exclude=`
    the stream's group where that is too much. The model is changed in place: its weights are parametrised
    (`torch.nn.utils.parametrize`) and its norms hooked until `finish()` or `detach()`.

    Args:
        model: the network, on the device where it trains.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        budget: what the small network may cost: never exceeded, and met as nearly as whole channels can.
        total_steps: how many times `step()` will be called.
        include, exclude: names, shell patterns or a callable that select channel groups.
        min_keep: no group keeps fewer units.
        round_to: kept widths are multiples of this (or the full width).
        schedule: when gates close; the default is the best one measured.
        shaping: slope of the gate function in the backward pass.
        initial: start value of the gate parameters, ≥ 0 (open).
        control: how gates are learnt: "fisher" measures with their gradients what each layer needs (the
            default, the best measured); "descent" moves them by plain gradient descent, as the paper does.
        drop_blocks: residual blocks may go as a whole, where what they are worth per cost is least (needs
            `min_keep` 1 and the "fisher" control).
        shrink_every: remove closed channels for good every so many steps, so that training gets faster as it
            prunes. The model is shrunk in place (modules stay the same objects, parameters are new); `step()`
            then needs the optimizer, whose state is sliced along.

    Returns:
        The session: call `gates.step()` after every `optimizer.step()`, and `gates.finish()` at the end. `gates.penalty()`,
        added to the loss, shows what the gates still owe.

    Raises:
        BudgetError: the budget cannot be met, whatever is learnt; says what the floor is and what pins it.
        PlanError: a setting is out of range, or settings do not go together.
        NoPrunableGroupError: nothing can be removed.
        AlreadyGatedError: gates are attached already.
        TraceError: the model does not run on `example_inputs`.

    Source: Kim, Park, Jung, Choe, arXiv 1904.10921. Ours differs in the control: see `prunewise.channels.control`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gates = attach_gates(model, torch.zeros(1, 4), budget=Budget(macs=0.5), total_steps=10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(10):
        ...     loss = model(torch.randn(16, 4)).square().mean() + gates.penalty()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step(); gates.step()
        >>> gates.finish()[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    require_ungated(model)
    _check_settings(total_steps, shrink_every, control, drop_blocks)
    surgeon = Surgeon.of(model, example_inputs, blocks=drop_blocks)
    limits = limits_for(
        model, surgeon.costs, budget, include, exclude, min_keep, round_to, example_inputs, drop_blocks=drop_blocks
    )
    require_unshared(model)
    device = next(model.parameters()).device
    gates = Gates([g.size for g in limits.groups], device, shaping, initial, len(limits.branches))
    steering: GateControl
    if control == "fisher":
        steering = GateControl(limits, total_steps, schedule or Schedule(), device)
    else:
        steering = DescentControl(limits, total_steps, schedule or Schedule(), device, initial=initial)
    session = GateSession(model, surgeon, gates, steering, initial, shrink_every, budget.device)
    session.prove()
    return session


def _check_settings(total_steps: int, shrink_every: int | None, control: str, drop_blocks: bool) -> None:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise BudgetError(f"total_steps={total_steps!r} should be the number of optimizer steps of the run, at least 1")
    if control not in ("fisher", "descent"):
        raise PlanError(f"control {control!r} should be 'fisher' or 'descent'")
    if shrink_every is not None and (type(shrink_every) is not int or shrink_every < 1):
        raise PlanError(f"shrink_every={shrink_every!r} should be a number of steps, at least 1, or None")
    if drop_blocks and control != "fisher":
        raise PlanError(f"drop_blocks=True needs control='fisher', not {control!r}: it measures what a block is worth")
