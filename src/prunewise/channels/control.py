"""The control of the gates: when which channel closes, so that the cost follows a falling target.

How many channels a layer needs is measured by its gates: the gradient of the loss with respect to a gate is,
to first order, what the loss would lose with the channel, and its mean square over steps (its Fisher mass)
tells how far the loss would move. Divided by what the channel costs, these masses are comparable through the
whole network. Which channels of a layer go is another question: there the magnitude of the weights ranks
better than the gradients do (measured), so the masses of a layer are handed to its channels in the order of
their magnitude. At every moment the gates of the lowest are closed, exactly as many as the target asks: that
is the solution of min Σ worth(open) + λ·cost for the λ at which the cost meets the target, so λ needs no
tuning and no chase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunewise.channels.choose import Limits, Scores, choose_units
from prunewise.channels.importance import in_order_of
from prunewise.core.errors import NonFiniteError

Keep = dict[str, tuple[int, ...]]
Ranking = Callable[[], Mapping[str, Scores]]


@dataclass(frozen=True)
class Schedule:
    """Shares of the training run: gates watch, then close until the budget is met, then stay as they are.

    Attributes:
        observe: share of the steps in which gates only watch.
        close: share of the steps at which the target reaches the budget.
        updates: how many times the gates are set in between.
        memory: share of the steps over which gradients are averaged.
    """

    observe: float = 0.1
    close: float = 0.2
    updates: int = 20
    memory: float = 0.1


class GateControl:
    """Collects gate gradients and says, every few steps, which units should be open.

    Args:
        limits: groups, costs and the budget.
        total_steps: optimizer steps of the whole run.
        schedule: shares of the run.
        device: where the gradients live; the statistics are kept there, and read only when gates are set.
        ranking: called when gates are set: one score a unit for each group, the order inside the group (higher
            = keep). None: the masses themselves.
    """

    def __init__(
        self,
        limits: Limits,
        total_steps: int,
        schedule: Schedule,
        device: torch.device,
        ranking: Ranking | None = None,
    ) -> None:
        self.ranking = ranking
        self.limits = limits
        self.full = limits.totals({})
        self._sizes = {g.name: g.size for g in limits.groups}  # at first; `shrink` leaves them
        self.total_steps = total_steps
        self.schedule = schedule
        self.step = 0
        self.frozen = False
        self.keep: Keep = {g.name: tuple(range(g.size)) for g in limits.groups}
        self._mass = [torch.zeros(g.size, device=device) for g in limits.groups]
        self._block_mass = [torch.zeros(1, device=device) for _ in limits.branches]
        self._weight = torch.zeros((), device=device)
        self._decay = 1 - 1 / max(10.0, schedule.memory * total_steps)
        self._every = max(1, round((schedule.close - schedule.observe) * total_steps / schedule.updates))

    @property
    def values(self) -> list[Tensor] | None:
        """What the gates should show where they are open or closed; None: one value for all."""
        return None

    def observe(self, gradients: list[Tensor], blocks: Sequence[Tensor] = ()) -> None:
        """Take in ∂loss/∂gate of every group (and block), after one backward pass (no host synchronisation).

        A step whose gradients are not finite (an overflow that a gradient scaler is about to skip) does not count.
        """
        finite = torch.stack([g.isfinite().all() for g in gradients]).all()
        share = (1 - self._decay) * finite
        self._weight.mul_(1 - share).add_(share)
        for mass, g in zip([*self._mass, *self._block_mass], [*gradients, *blocks], strict=True):
            square = torch.where(finite, g.detach().to(mass.dtype) ** 2, 0.0)
            mass.mul_(1 - share).add_(square * share)

    def update(self) -> bool:
        """Count one step; True where `keep` changed."""
        self.step += 1
        if self.frozen:
            return False
        first, last = self.schedule.observe * self.total_steps, self.schedule.close * self.total_steps
        if self.step < first or (self.step % self._every and self.step < last):
            return False
        self.frozen = self.step >= last
        before = self.keep
        self.keep = self.choose(None if self.frozen else self.target())
        return self.keep != before

    def target(self) -> dict[str, float]:
        """The cost limits of this step: from the full cost to the budget, fast at first and slower towards the end."""
        first, last = self.schedule.observe * self.total_steps, self.schedule.close * self.total_steps
        left = (1 - min(1.0, max(0.0, (self.step - first) / max(1.0, last - first)))) ** 3
        full = self.full
        return {kind: limit + (max(full[kind], limit) - limit) * left for kind, limit in self.limits.absolute.items()}

    def choose(self, slack: dict[str, float] | None = None) -> Keep:
        """The units that stay under `slack` (default: the budget). A closed unit stays closed.

        Raises:
            NonFiniteError: no gradient was ever finite.
        """
        share = self.limits.marginal({name: len(kept) for name, kept in self.keep.items()})
        seen = float(self._weight)
        if seen == 0 and self.step > 0:
            raise NonFiniteError("no gradient of any gate was finite so far: look at the loss (NaN, or overflow)")
        worth: dict[str, Scores] = {}
        ranks = self.ranking() if self.ranking is not None else None
        for group, mass in zip(self.limits.groups, self._mass, strict=True):
            values = (mass.double() / max(seen, 1e-30)).cpu().numpy() / share[group.name]
            if ranks is not None:
                # What a closed gate sees is no measure of the layer's need: only the open ones' masses are
                # handed out.
                units = np.array(self.keep[group.name], dtype=np.int64)
                values[units] = in_order_of(values[units], ranks[group.name][units], self._sizes[group.name])
            worth[group.name] = values
        masses = {
            b.name: float(m) / max(seen, 1e-30) for b, m in zip(self.limits.branches, self._block_mass, strict=True)
        }
        return choose_units(worth, self.limits, slack, self.keep, masses)

    def shrink(self, limits: Limits, keep: Mapping[str, Sequence[int]]) -> None:
        """Go on with the groups of the network cut down to `keep`, those of more than one unit."""
        masses = {g.name: mass for g, mass in zip(self.limits.groups, self._mass, strict=True)}
        self._mass = [masses[g.name][list(keep[g.name])] for g in limits.groups]
        blocks = {b.name: mass for b, mass in zip(self.limits.branches, self._block_mass, strict=True)}
        self._block_mass = [blocks[b.name] for b in limits.branches]
        units = {g.name: enumerate(keep[g.name]) for g in limits.groups}
        self.keep = {name: tuple(i for i, unit in rows if unit in self.keep[name]) for name, rows in units.items()}
        self.limits = limits

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: tensors, counters and the open units."""
        return {
            "step": self.step,
            "frozen": self.frozen,
            "keep": {name: list(kept) for name, kept in self.keep.items()},
            "mass": [m.clone() for m in self._mass],
            "block_mass": [m.clone() for m in self._block_mass],
            "weight": self._weight.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.step, self.frozen = int(state["step"]), bool(state["frozen"])
        self.keep = {name: tuple(kept) for name, kept in state["keep"].items()}
        saved_masses = [*state["mass"], *state.get("block_mass", [])]
        for mass, saved in zip([*self._mass, *self._block_mass], saved_masses, strict=True):
            mass.copy_(saved)
        self._weight.copy_(state["weight"])
