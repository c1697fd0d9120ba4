"""Gates on a model in training: attach, train, finish."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunewise.channels.budget import Budget
from prunewise.channels.choose import Limits, Scores
from prunewise.channels.control import GateControl, Keep, Schedule
from prunewise.channels.descent import DescentControl
from prunewise.channels.dropping import droppable
from prunewise.channels.gate import GatedWeight, Gates, Shaping, constant
from prunewise.channels.importance import magnitude
from prunewise.channels.oneshot import limits_for, make_plan
from prunewise.core.branches import check_keep
from prunewise.core.cost import Cost
from prunewise.core.errors import AlreadyGatedError, BudgetError, PlanError, PrunewiseError, VerificationError
from prunewise.core.groups import Choice
from prunewise.core.optimizer import move_optimizer
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.proof import compare, outputs
from prunewise.core.sites import gate_sites, masked
from prunewise.core.slices import state_slices
from prunewise.core.surgery import Surgeon, graft, is_gated, require_unshared
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
    time, and costs next to nothing more to train. The model is changed in place: its weights are parametrised
    (`torch.nn.utils.parametrize`) until `finish()` or `detach()`.

    Args:
        model: the network, on the device where it trains.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        budget: what the small network may cost; met exactly, never exceeded.
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
        The session: add `gates.penalty()` to the loss, call `gates.step()` after `optimizer.step()`, and
        `gates.finish()` at the end.

    Raises:
        BudgetError: the budget cannot be met, whatever is learnt; says what the floor is and what pins it.
        NoPrunableGroupError: nothing can be removed.
        AlreadyGatedError: gates are attached already.
        TraceError: the model does not run on `example_inputs`.

    Source: Kim, Park, Jung, Choe, arXiv 1904.10921. Ours differs in the control: see `prunewise.channels.control`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gates = attach_gates(model, torch.zeros(1, 4), budget=Budget(macs=0.5), total_steps=10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(10):
        ...     loss = model(torch.randn(16, 4)).square().mean() + gates.penalty()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step(); gates.step()
        >>> gates.finish()[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    if is_gated(model):
        raise AlreadyGatedError("gates are attached to this model already: finish() or detach() that session first")
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise BudgetError(f"total_steps={total_steps!r} should be the number of optimizer steps of the run, at least 1")
    if drop_blocks and control != "fisher":
        raise PlanError(f"drop_blocks=True needs control='fisher', not {control!r}: it measures what a block is worth")
    surgeon = Surgeon.of(model, example_inputs, blocks=drop_blocks)
    limits = limits_for(
        model, surgeon.costs, budget, include, exclude, min_keep, round_to, example_inputs, drop_blocks=drop_blocks
    )
    require_unshared(model)
    device = next(model.parameters()).device
    gates = Gates([g.size for g in limits.groups], device, shaping, initial, len(limits.branches))
    plan = schedule or Schedule()
    if control == "fisher":
        steering = GateControl(limits, total_steps, plan, device)
    elif control == "descent":
        steering = DescentControl(limits, total_steps, plan, device, initial=initial)
    else:
        raise PlanError(f"control {control!r} should be 'fisher' or 'descent'")
    session = GateSession(model, surgeon, gates, steering, initial, shrink_every)
    session._prove()
    return session


class GateSession:
    """Gates on one model. Made by `attach_gates`."""

    def __init__(
        self,
        model: nn.Module,
        surgeon: Surgeon,
        gates: Gates,
        control: GateControl,
        initial: float,
        shrink_every: int | None,
    ) -> None:
        self.model = model
        self.control = control
        self._surgeon = surgeon
        self._gates = gates
        self._initial = max(abs(initial), 1e-3)
        self._owners: list[tuple[nn.Module, str]] = []
        self._fingerprint = fingerprint(model)
        self._costs = surgeon.costs  # of the original: plans are always plans for it
        self._limits = control.limits  # of the original, as well
        self._original: Keep = {g.name: tuple(range(g.size)) for g in control.limits.groups}
        self._shrink_every = shrink_every
        self._weights: dict[str, Tensor] = {}
        control.ranking = self._magnitudes

    @property
    def groups(self) -> list[Any]:
        """The channel groups that have gates."""
        return list(self.control.limits.groups)

    @property
    def attached(self) -> bool:
        """False after `finish()` or `detach()`."""
        return bool(self._owners)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The gate parameters: one vector a group, one number a block that may go.

        An optimizer may hold them (without weight decay); it need not.
        """
        return iter([*self._gates.values, *self._gates.blocks])

    def penalty(self) -> Tensor:
        """λ · (cost / full cost − target), summed over the budget's kinds: what the gates still owe.

        A scalar for the loss; its gradient with respect to the gates is applied by `step()`, exactly and not
        through the optimizer, so its value informs (0 once the budget is met).
        """
        if self.control.frozen:
            return self._gates.values[0].new_zeros(())
        target = self.control.target()
        now = self.control.limits.totals({name: len(kept) for name, kept in self.control.keep.items()})
        full = self.control.full
        excess = sum(max(0.0, now[kind] - limit) / full[kind] for kind, limit in target.items())
        return self._gates.values[0].new_tensor(excess)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Once after every `optimizer.step()`: read the gates' gradients, and close gates where it is time.

        Args:
            optimizer: needed with `shrink_every` only: its state is sliced when channels are removed.

        Raises:
            NonFiniteError: the loss has given no finite gradient.
            PrunewiseError: no gradient reached the gates at all (no backward pass, or another model was run).
        """
        self._require_attached()
        gradients = [g.grad if g.grad is not None else torch.zeros_like(g) for g in self._gates.values]
        if all(g.grad is None for g in self._gates.values):
            raise PrunewiseError(
                "no gradient reached any gate: call loss.backward() on a loss of the gated model before "
                "gates.step(), and do not "
                "clear the gates' gradients in between"
            )
        blocks = [g.grad if g.grad is not None else torch.zeros_like(g) for g in self._gates.blocks]
        self.control.observe(gradients, blocks)
        for value in self.parameters():
            value.grad = None
        if self.control.update():
            self._show(self.control.keep)
        if self._shrink_every and self.control.step % self._shrink_every == 0:
            self.shrink(optimizer)

    def shrink(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Remove closed channels for good, in place; the gates, the optimizer's state and the plan follow.

        Modules stay the same objects, so schedulers and compiled wrappers go on; parameters are new ones, and
        `optimizer` is pointed at them. Weight averages made earlier keep the old shapes: start them after the
        last shrink.

        Returns:
            False where nothing is closed, or where the user's forward has widths written into it so that only
            the final network can be made smaller (a warning says so once).

        Raises:
            PlanError: no optimizer was given.
        """
        self._require_attached()
        keep = self.control.keep
        if all(len(keep[g.name]) == g.size for g in self.control.limits.groups):
            return False
        if optimizer is None:
            raise PlanError("shrinking slices the optimizer's state too: call gates.step(optimizer)")
        slices = state_slices(self._surgeon.grouping, keep)
        _ungate(self.model)
        self._owners = []
        try:
            small = self._surgeon.sliced(self.model, keep)  # a graph module would take the place of the classes
            surgeon = Surgeon.of(small, self._surgeon.example_inputs, blocks=bool(self.control.limits.branches))
            limits = self._limits_after(surgeon, keep)
        except (VerificationError, PlanError) as error:
            warnings.warn(f"the model cannot be shrunk while it trains: {error}", stacklevel=2)
            self._shrink_every = None
            self._attach()
            return False
        move_optimizer(optimizer, self.model, small, slices)
        graft(self.model, small)
        self._original = {
            name: tuple(units[i] for i in keep[name]) if name in keep else units
            for name, units in self._original.items()
        }
        self.control.shrink(limits)
        self._surgeon = surgeon
        device = next(self.model.parameters()).device
        self._gates = Gates(
            [g.size for g in limits.groups], device, self._gates.shaping, self._initial, len(limits.branches)
        )
        self._attach()
        return True

    def _limits_after(self, surgeon: Surgeon, keep: Keep) -> Limits:
        """The limits for the shrunk model: its groups are the old ones, smaller; a single unit is no group."""
        old = self.control.limits
        found = {g.name: g for g in surgeon.costs.groups}
        groups = []
        for group in old.groups:
            size = len(keep[group.name])
            if size > 1:
                if group.name not in found or found[group.name].size != size:
                    raise PlanError(f"group {group.name!r} changes its shape when shrunk")
                groups.append(found[group.name])
        if not groups:
            raise PlanError("no group has more than one unit left")
        latency = old.latency.bind(surgeon.costs) if old.latency is not None else None
        names = {b.name for b in old.branches}
        branches = [b for b in droppable(surgeon.grouping.branches, groups, old.min_keep) if b.name in names]
        return Limits(surgeon.costs, tuple(groups), old.absolute, old.min_keep, old.round_to, latency, tuple(branches))

    def cost(self) -> Cost:
        """What the network costs as gated now."""
        return self._surgeon.costs({name: len(kept) for name, kept in self.control.keep.items()})

    def set_plan(self, plan: ChannelPlan) -> None:
        """Open and close the gates as `plan` says (groups that it does not name are open)."""
        self._require_attached()
        for name, size in plan.sizes.items():
            known = {g.name: g.size for g in self.control.limits.groups}
            if known.get(name) != size:
                raise PlanError(f"the plan is for a group {name!r} of {size} units, which has no gates here")
        check_keep(plan.keep, self.control.limits.branches)
        self.control.keep = {g.name: tuple(plan.keep.get(g.name, range(g.size))) for g in self.control.limits.groups}
        self._show(self.control.keep)

    def harden(self) -> ChannelPlan:
        """Freeze the gates where they meet the budget, and return the plan.

        Closes what is still too much (if training stopped early, say); the cost never exceeds the budget.
        """
        self._require_attached()
        if not self.control.limits.met({name: len(kept) for name, kept in self.control.keep.items()}):
            self.control.keep = self.control.choose()
            self._show(self.control.keep)
        self.control.frozen = True
        return self._plan()

    def finish(self, model: nn.Module | None = None) -> nn.Module:
        """Harden the gates, remove what is closed, and return the small network, a plain module.

        Args:
            model: a copy of the gated model to cut instead (an average of its weights, say); default: the
                model itself.

        Returns:
            A smaller copy, verified to compute what the gated model computes. The model itself gets its full weights
            back, as after `detach()`.

        Raises:
            VerificationError: the small network differs; the model is whole again all the same.
        """
        plan = self.harden()
        keep = self.control.keep
        source = self.model if model is None else model
        if model is not None:
            _ungate(model)
        self.detach()
        small = self._surgeon.cut(source, keep)
        self.plan = plan
        return small

    def detach(self) -> nn.Module:
        """Take the gates off: the original model back, untouched but for its training."""
        _ungate(self.model)
        self._owners = []
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides the model's and the optimizer's own state: tensors, numbers, lists, strings."""
        return self.control.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; for a session made with the same arguments.

        Raises:
            PlanError: the state is of other groups.
        """
        sizes = {g.name: g.size for g in self.control.limits.groups}
        if set(state.get("keep", ())) != set(sizes):
            raise PlanError("the saved gates are of another model, or of other include/exclude choices")
        self.control.load_state_dict(state)
        self._show(self.control.keep)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _plan(self) -> ChannelPlan:
        keep = {
            name: tuple(units[i] for i in self.control.keep[name]) if name in self.control.keep else units
            for name, units in self._original.items()
        }
        inputs = self._surgeon.example_inputs
        notes = {"importance": "gates", **self._limits.notes(keep)}
        return make_plan(self._fingerprint, self._costs, keep, notes, inputs)

    def _prove(self) -> None:
        """Attach, and check that the gates reach what `forward` reads: with every other unit closed.

        Raises:
            VerificationError: `forward` gets at some weight otherwise than by attribute; the model is left ungated.
        """
        keep = {g.name: tuple(range(0, g.size, 2)) for g in self.control.limits.groups}
        branches = self.control.limits.branches
        keep.update({name: () for branch in branches[::2] for name in branch.groups})
        inputs = self._surgeon.example_inputs
        if any(p.is_meta for p in self.model.parameters()):
            self._attach()
            return
        with masked(self.model, self.control.limits.groups, keep, branches):
            want = outputs(self.model, inputs, False)
        self._attach()
        self._show(keep)
        try:
            compare(want, outputs(self.model, inputs, False), "the gated model")
        except VerificationError as error:
            self.detach()
            raise VerificationError(
                f"{str(error).partition('. ')[0]}: forward() seems to read a weight otherwise than as an attribute of "
                "its module (through a list kept from before, or module._parameters), where no gate can stand. Read it "
                "as an attribute"
            ) from error
        self._show(self.control.keep)

    def _magnitudes(self) -> dict[str, Scores]:
        """L1 of the filters of every unit, as the weights are now."""
        return magnitude(self._weights, self.control.limits.groups)

    def _attach(self) -> None:
        grouping = self._surgeon.grouping
        groups = self.control.limits.groups
        shapes = {t.name: t.shape for t in grouping.structure.trace.tensors if t.name}
        sizes = [g.size for g in groups]
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
        by_name: dict[str, list[Any]] = {}
        for site in gate_sites(groups, shapes):
            by_name.setdefault(site.name, []).append(site)
        modules = list(self.model.named_modules())
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        names: dict[str, Tensor] = {}
        for path, module in modules:
            for leaf, tensor in module._parameters.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, leaf))
                    names[f"{path}.{leaf}" if path else leaf] = tensor
        self._weights = dict(names)
        orders: dict[nn.Module, list[str]] = {}
        blocks: dict[str, list[int]] = {}
        for number, branch in enumerate(self.control.limits.branches):
            for name in branch.parameters:
                blocks.setdefault(name, []).append(number)
        for name in dict.fromkeys([*by_name, *blocks]):
            sites, ends = by_name.get(name, []), blocks.get(name, [])
            weight = names[name]
            for module, leaf in places[id(weight)]:
                order = orders.setdefault(module, list(module._parameters))
                gated = GatedWeight(self._gates, sites, offsets, sizes, weight.dim(), order, ends).to(weight.device)
                gated.train(module.training)
                parametrize.register_parametrization(module, leaf, gated, unsafe=True)
                self._owners.append((module, leaf))

    def _show(self, keep: Keep) -> None:
        """Set the gate parameters: open ones at the initial value, closed ones at minus that."""
        with torch.no_grad():
            for group, value in zip(self.control.limits.groups, self._gates.values, strict=True):
                index = torch.tensor(keep[group.name], dtype=torch.int64, device=value.device)
                value.fill_(-self._initial).index_fill_(0, index, self._initial)
            for branch, value in zip(self.control.limits.branches, self._gates.blocks, strict=True):
                value.fill_(-self._initial if branch.dropped(keep) else self._initial)

    def _require_attached(self) -> None:
        if not self.attached:
            raise PrunewiseError("this session has ended: its gates were taken off by finish() or detach()")


def _ungate(model: nn.Module) -> None:
    """Remove every gate parametrization of a model (or of a copy of it)."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for leaf, chain in list(chains.items()):
            gated = next((p for p in chain if isinstance(p, GatedWeight)), None)
            if gated is not None:
                # Copies of a parametrised module share its class, from which torch is about to delete: its own first.
                cls = type(module)
                module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
                # torch registers the weight anew, as the last one: optimizers and checkpoints go by the order.
                rank = {name: i for i, name in enumerate(gated.order)}
                ordered = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
                module._parameters.clear()
                module._parameters.update(ordered)
