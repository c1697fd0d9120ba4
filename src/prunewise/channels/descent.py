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
    """Gate parameters move down the gradient of the loss plus λ times the cost over its target.

    Every quantity is normalised, so that nothing has to be tuned between networks: the task's gradients by
    their root mean square over all gates, the cost's gradient by its own. λ is proportional to the excess of
    the cost over a target that falls from the full cost to the budget. Gates start spread, in the order of
    their units' magnitude, so that they close one after another and not as an avalanche. When the target has
    reached the budget, the gates are frozen where the budget is met exactly.

    Source: the loss of arXiv 1904.10921; initial spread, falling target, λ and freezing are ours.

    Args:
        limits, total_steps, schedule, device: as for `GateControl`.
        rate: step size, in gate units a step, for a gradient of one root mean square.
        gain: λ for an excess of the whole target.
        initial: gates start evenly spread over (0, 2·initial).
    """

    def __init__(
        self, limits: Limits, total_steps: int, schedule: Schedule, device: torch.device, *,
        rate: float = 0.02, gain: float = 50.0, initial: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(limits, total_steps, schedule, device)
        self._rate, self._gain, self._initial = rate, gain, initial
        self._w: list[Tensor] = []
        self._velocity: list[Tensor] = []

    def observe(self, gradients: list[Tensor], blocks: Sequence[Tensor] = ()) -> None:
        """Move every gate one step (momentum 0.9)."""
        super().observe(gradients, blocks)
        if not self._w:
            self._start(gradients)
        if self.frozen:
            return
        rms = torch.cat(self._mass).mean().div(self._weight.clamp(min=1e-12)).sqrt().clamp(min=1e-20)
        widths = {name: len(kept) for name, kept in self.keep.items()}
        now, target = self.limits.totals(widths), self.target()
        excess = sum(max(0.0, now[kind] / limit - 1) for kind, limit in target.items())
        share = self.limits.marginal(widths)
        typical = float(np.sqrt(np.mean([v**2 for v in share.values()])))
        for group, w, v, g in zip(self.limits.groups, self._w, self._velocity, gradients, strict=True):
            push = self._gain * excess * share[group.name] / typical
            v.mul_(0.9).add_(torch.nan_to_num(g.to(w.dtype)) / rms + push, alpha=0.1)
            w.sub_(v, alpha=self._rate)

    def choose(self, slack: dict[str, float] | None = None) -> Keep:
        """On the way: the gates at or above zero, and the floors; at the end: the highest that meet the budget."""
        if slack is None:
            worth = {g.name: w.double().cpu().numpy() for g, w in zip(self.limits.groups, self._w, strict=True)}
            return choose_units(worth, self.limits)
        keep = {}
        for group, w in zip(self.limits.groups, self._w, strict=True):
            count = max(int((w >= 0).sum()), self.limits.floor(group))
            keep[group.name] = tuple(sorted(w.topk(count).indices.tolist()))
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
