"""Plain gradient descent on the gates, as in the paper: the control that the default one is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunewise.channels.choose import Limits, choose_units
from prunewise.channels.control import GateControl, Keep, Schedule


class DescentControl(GateControl):
    """Gate values w move down the gradient of the loss plus λ times the cost; a gate is open where w ≥ 0.

    Steps are preconditioned by what a unit costs: w ← w − rate·(∂loss/∂gate / ∂cost/∂gate + λ), so w is a balance of
    benefit and cost. λ is not tuned but solved for at every update: it is the least that brings the cost of the open
    gates to the target, which falls from the full cost to the budget. Closed gates go on moving, and may reopen at the
    expense of others. Gates start spread, in the order of their units' magnitude, so that they close one after another
    and not as an avalanche. When the target has reached the budget, they are frozen.

    Source: the loss of arXiv 1904.10921; initial spread, preconditioner, falling target, λ and freezing are ours.

    Where a normalisation follows the reader of a layer, the gradients of that layer's gates sum to nothing (its
    output does not depend on the scale of its weights): descent ranks the units of a layer and says nothing on how many
    it needs. That is why it is not the default.

    Args:
        limits, total_steps, schedule, device: as for `GateControl`.
        speed: how far, in units of `initial`, a gate moves while gates close, for a gradient of one root mean square.
        initial: gates start evenly spread over (0, 2·initial).
    """

    def __init__(
        self, limits: Limits, total_steps: int, schedule: Schedule, device: torch.device, *,
        speed: float = 2.0, initial: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(limits, total_steps, schedule, device)
        self._rate = speed * initial / max(1.0, (schedule.close - schedule.observe) * total_steps)
        self._initial = initial
        self._w: list[Tensor] = []
        self._velocity: list[Tensor] = []

    @property
    def values(self) -> list[Tensor] | None:
        """The gate values of every group; None before the first step."""
        return self._w or None

    def observe(self, gradients: list[Tensor], blocks: Sequence[Tensor] = ()) -> None:
        """Move every gate one step (momentum 0.9)."""
        super().observe(gradients, blocks)
        if not self._w:
            self._start(gradients)
        if self.frozen or self.step < self.schedule.observe * self.total_steps:
            return
        share = self.limits.marginal({name: len(kept) for name, kept in self.keep.items()})
        benefit = [
            torch.nan_to_num(g.to(w.dtype)) / share[group.name]
            for group, g, w in zip(self.limits.groups, gradients, self._w, strict=True)
        ]
        rms = torch.cat(benefit).square().mean().sqrt().clamp(min=1e-20)
        for w, v, g in zip(self._w, self._velocity, benefit, strict=True):
            v.mul_(0.9).add_(g / rms, alpha=0.1)
            w.sub_(v, alpha=self._rate)

    def choose(self, slack: dict[str, float] | None = None) -> Keep:
        """The gates that are highest, as many as the target (at the end: the budget) lets be open; w is moved by λ."""
        worth = {g.name: w.double().cpu().numpy() for g, w in zip(self.limits.groups, self._w, strict=True)}
        keep = choose_units(worth, self.limits, slack)
        closed = [np.delete(worth[g.name], keep[g.name]) for g in self.limits.groups]
        price = max((float(values.max()) for values in closed if values.size), default=0.0)
        for w in self._w:
            w.sub_(max(0.0, price))
        return keep

    def shrink(self, limits: Limits, keep: Mapping[str, Sequence[int]]) -> None:
        """As `GateControl.shrink`; closed gates cannot reopen after it."""
        for name in ("_w", "_velocity") if self._w else ():  # empty before the first step
            old = {g.name: value for g, value in zip(self.limits.groups, getattr(self, name), strict=True)}
            setattr(self, name, [old[g.name][list(keep[g.name])] for g in limits.groups])
        super().shrink(limits, keep)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {
            **super().state_dict(),
            "w": [w.clone() for w in self._w],
            "velocity": [v.clone() for v in self._velocity],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        super().load_state_dict(state)
        self._w, self._velocity = [w.clone() for w in state["w"]], [v.clone() for v in state["velocity"]]

    def _start(self, gradients: list[Tensor]) -> None:
        ranks = self.ranking() if self.ranking is not None else {g.name: np.arange(g.size) for g in self.limits.groups}
        for group, g in zip(self.limits.groups, gradients, strict=True):
            place = np.argsort(np.argsort(ranks[group.name], kind="stable"), kind="stable")
            spread = torch.from_numpy((place + 0.5) / group.size * 2 * self._initial)
            self._w.append(spread.to(g.device, torch.float32))
            self._velocity.append(torch.zeros(group.size, device=g.device))
