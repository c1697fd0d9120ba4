"""Gates on a model in training: train, shrink, save and go on, finish."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.channels.choose import Scores
from prunewise.channels.control import GateControl, Keep
from prunewise.channels.gate import Gates, put_on, swap_gates, take_off
from prunewise.channels.importance import magnitude, under_masks
from prunewise.channels.latency import in_words, measure_latency
from prunewise.channels.oneshot import make_plan
from prunewise.channels.replay import device_of
from prunewise.core.branches import check_keep
from prunewise.core.cost import Cost
from prunewise.core.errors import PlanError, PrunewiseError, VerificationError
from prunewise.core.groups import ChannelGroup
from prunewise.core.optimizer import move_optimizer
from prunewise.core.plan import ChannelPlan, check_kept, fingerprint
from prunewise.core.proof import compare, outputs
from prunewise.core.sites import masked
from prunewise.core.slices import state_slices
from prunewise.core.surgery import Surgeon, graft


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
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model
        self.control = control
        self._surgeon = surgeon
        self._gates = gates
        self._initial = max(abs(initial), 1e-3)
        self._fingerprint = fingerprint(model)
        self._costs = surgeon.costs  # of the original: plans are always plans for it
        self._limits = control.limits  # of the original, as well
        self._whole: Keep = {g.name: tuple(range(g.size)) for g in control.limits.groups}
        self._original = self._whole  # the units of the original that are left, by group
        self._shrink_every = shrink_every
        self._device = device  # where latency counts; None: where the model is
        # By name, as they were before the gates; none: no gates are attached.
        self._weights: dict[str, nn.Parameter] = {}
        control.ranking = self._magnitudes

    @property
    def groups(self) -> list[ChannelGroup]:
        """The channel groups that have gates."""
        return list(self.control.limits.groups)

    @property
    def attached(self) -> bool:
        """False after `finish()` or `detach()`."""
        return bool(self._weights)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The gate parameters: one vector a group, one number a block that may go.

        An optimizer may hold them (without weight decay); it need not.
        """
        return iter([*self._gates.values, *self._gates.blocks])

    def penalty(self) -> Tensor:
        """How far the cost of the gated network lies above what it may be at this step, as a share of the full cost.

        A scalar without gradient, ≥ 0, summed over the budget's kinds; 0 once the budget is met. In the loss it shows what the
        gates still owe. It steers nothing: what the budget asks of the gates is done by `step()`, exactly.
        """
        if self.control.frozen:
            return self._gates.values[0].new_zeros(())
        target = self.control.target()
        now = self.control.limits.totals({name: len(kept) for name, kept in self.control.keep.items()})
        full = self.control.full
        excess = sum(max(0.0, now[kind] - limit) / full[kind] for kind, limit in target.items())
        return self._gates.values[0].new_tensor(excess)

    def step(self, optimizer: torch.optim.Optimizer | None = None, *, grad_scale: float | Tensor = 1.0) -> None:
        """Once after every `optimizer.step()`: read the gates' gradients, and close gates where it is time.

        In float16 a gradient scaler multiplies the loss by a number that changes. Tell it, before the scaler changes it:

            scaler.scale(criterion(model(inputs), targets) + gates.penalty()).backward()
            scaler.step(optimizer)
            gates.step(grad_scale=scaler.scale(torch.ones((), device=device)))
            scaler.update()

        Args:
            optimizer: needed with `shrink_every` only: its state is sliced when channels are removed.
            grad_scale: what the loss was multiplied by before `backward()`, > 0; a number, or a tensor of one element, which
                is not read on the host. Leave it at 1 where the optimizer holds the gates and `scaler.unscale_(optimizer)`
                was called.

        Raises:
            NonFiniteError: the loss has given no finite gradient.
            PrunewiseError: no gradient reached the gates at all (no backward pass, or another model was run).
        """
        self._require_attached()
        if not self.control.frozen:
            self._observe(grad_scale)
        if self.control.update() or (self.control.values is not None and not self.control.frozen):
            self._show(self.control.keep)
        else:
            self._set_values()  # an optimizer that holds the gates has moved them
        if self._shrink_every and self.control.step % self._shrink_every == 0:
            self.shrink(optimizer)

    def _observe(self, grad_scale: float | Tensor) -> None:
        gradients = [g.grad if g.grad is not None else torch.zeros_like(g) for g in self._gates.values]
        if all(g.grad is None for g in self._gates.values):
            raise PrunewiseError(
                "no gradient reached any gate: call loss.backward() on a loss of the gated model before gates.step(), and "
                "do not clear the gates' gradients in between"
            )
        blocks = [g.grad if g.grad is not None else torch.zeros_like(g) for g in self._gates.blocks]
        if isinstance(grad_scale, Tensor) or grad_scale != 1:
            gradients, blocks = [g / grad_scale for g in gradients], [g / grad_scale for g in blocks]
        self.control.observe(gradients, blocks)

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
        keep = self._staying()
        if all(len(keep[g.name]) == g.size for g in self.groups):
            return False
        if optimizer is None:
            raise PlanError("shrinking slices the optimizer's state too: call gates.step(optimizer)")
        try:
            self._cut(keep, optimizer)
        except (VerificationError, PlanError) as error:
            warnings.warn(f"the model cannot be shrunk while it trains: {error}", stacklevel=2)
            self._shrink_every = None
            return False
        return True

    def _staying(self) -> Keep:
        """The open units. A block that may still go keeps a second, closed one: a single unit is no group that could close."""
        keep = dict(self.control.keep)
        closable = {name for b in self.control.limits.branches for name in b.groups}
        for group in self.groups if not self.control.frozen else ():
            if group.name in closable and len(keep[group.name]) == 1 < group.size:
                keep[group.name] = (0, *keep[group.name]) if keep[group.name] != (0,) else (0, 1)
        return keep

    def _cut(self, keep: Keep, optimizer: torch.optim.Optimizer) -> None:
        """Cut the model down to `keep`, in place, and with it all that is counted in its units.

        Raises:
            VerificationError, PlanError: it cannot be cut; model and gates are as they were.
        """
        slices = state_slices(self._surgeon.grouping, keep)
        self._take_off()
        try:
            small = self._surgeon.sliced(self.model, keep)  # a graph module would take the place of the classes
            surgeon = Surgeon.of(small, self._surgeon.example_inputs, blocks=bool(self.control.limits.branches))
            limits = self.control.limits.after(surgeon.costs, keep)
            move_optimizer(optimizer, self.model, small, slices)
        except (VerificationError, PlanError):
            self._attach()
            raise
        graft(self.model, small)
        self._original = {
            name: tuple(units[i] for i in keep[name]) if name in keep else units
            for name, units in self._original.items()
        }
        before = self._gates_by_name()
        self.control.shrink(limits, keep)
        self._surgeon = surgeon
        device = next(self.model.parameters()).device
        self._gates = Gates(
            [g.size for g in limits.groups], device, self._gates.shaping, self._initial, len(limits.branches)
        )
        swap_gates(optimizer, before, self._gates_by_name())
        self._attach()
        self._show(self.control.keep)

    def _gates_by_name(self) -> dict[tuple[str, str], nn.Parameter]:
        limits = self.control.limits
        names = [*(("group", g.name) for g in limits.groups), *(("block", b.name) for b in limits.branches)]
        return dict(zip(names, self.parameters(), strict=True))

    def cost(self) -> Cost:
        """What the network costs as gated now."""
        return self._surgeon.costs({name: len(kept) for name, kept in self.control.keep.items()})

    def set_plan(self, plan: ChannelPlan) -> None:
        """Open and close the gates as `plan` says (groups that it does not name are open).

        Raises:
            PlanError: the plan is not one for this model and these gates, or the model has been shrunk, while plans are
                for the original; the message names what is wrong. Nothing was changed.
        """
        self._require_attached()
        if plan.fingerprint != self._fingerprint:
            raise PlanError(
                "the plan is for another model than the one that has the gates: names or shapes of parameters differ. Make "
                "a plan for this architecture, unpruned"
            )
        if self._original != self._whole:
            raise PlanError(
                "the model has been shrunk, and what is removed cannot be opened again: set the plan before training, or "
                "attach the gates without shrink_every="
            )
        for name, kept in plan.keep.items():
            size = plan.sizes.get(name)
            if name not in self._whole or size != len(self._whole[name]):
                raise PlanError(
                    f"the plan is for a group {name!r} of {size} units, which has no gates here: attach them with the "
                    "include= and exclude= that the plan was made with"
                )
            check_kept(name, kept, len(self._whole[name]))
        check_keep(plan.keep, self.control.limits.branches)
        self.control.keep = {name: tuple(plan.keep.get(name, units)) for name, units in self._whole.items()}
        self._show(self.control.keep)

    def harden(self) -> ChannelPlan:
        """Freeze the gates where they meet the budget, and return the plan.

        Closes what is still too much, with a warning (if training stopped early, say); the cost never exceeds the budget.
        """
        return self._harden()

    def _harden(self) -> ChannelPlan:
        self._require_attached()
        control = self.control
        if not control.limits.met({name: len(kept) for name, kept in control.keep.items()}):
            warnings.warn(
                f"the gates are hardened after {control.step} of total_steps={control.total_steps} steps, above the budget: what "
                "is too much is closed at once",
                stacklevel=3,
            )
            self.control.keep = self.control.choose()
        self.control.frozen = True
        self._show(self.control.keep)
        return self._plan()

    def finish(self, model: nn.Module | None = None) -> nn.Module:
        """Harden the gates, remove what is closed, and return the small network, a plain module.

        The plan is then in `gates.plan`. With a latency budget, its notes say beside the predicted latency
        ("latency_ms") what the small network takes in truth ("latency_ms_measured", the median of a second's passes),
        if this is the device, with as many threads, that the budget was measured on.

        Args:
            model: a copy of the gated model to cut instead (an average of its weights, say); default: the
                model itself.

        Returns:
            A smaller copy, verified to compute what the gated model computes. The model itself gets its full weights
            back, as after `detach()`.

        Raises:
            VerificationError: the small network differs; the model is whole again all the same.
        """
        plan = self._harden()
        keep = self.control.keep
        source = self.model if model is None else model
        if model is not None:
            take_off(model)
        self.detach()
        small = self._surgeon.cut(source, keep)
        self.plan = replace(plan, notes={**plan.notes, **self._measured(small)})
        return small

    def _measured(self, small: nn.Module) -> dict[str, str]:
        latency = self._limits.latency
        device = device_of(small) if self._device is None else torch.device(self._device)
        if latency is None or latency.device != in_words(device):
            return {}
        taken = measure_latency(small, self._surgeon.example_inputs, device, seconds=1.0)
        return {"latency_ms_measured": f"{taken:.6g}"}

    def detach(self) -> nn.Module:
        """Take the gates off: the original model back, untouched but for its training."""
        self._take_off()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides the model's and the optimizer's own state: tensors, numbers, lists, strings."""
        units = {name: list(units) for name, units in self._original.items()}
        return {**self.control.state_dict(), "units": units, "shrink_every": self._shrink_every}

    def load_state_dict(self, state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on from `state_dict()`, in a session freshly made with the same arguments on the original, full-size model.

        A model that had been shrunk (`shrink_every=`) is shrunk again, in place, to the structure that it was saved
        with. So the order of calls is: model, optimizer and session as the first run made them, then

            gates.load_state_dict(gate_state, optimizer)
            model.load_state_dict(model_state)
            optimizer.load_state_dict(optimizer_state)

        Args:
            state: of `state_dict()`.
            optimizer: needed where the saved model had been shrunk: its parameters are replaced by the smaller ones. It
                has to be made before, for a shrunk model lists its parameters in another order.

        Raises:
            PlanError: the state is of other groups, or the optimizer is missing; nothing was changed.
            VerificationError: the model cannot be shrunk as it was; nothing was changed.
        """
        units: Keep = {name: tuple(kept) for name, kept in state.get("units", self._whole).items()}
        shrunk = units != self._original
        left = {name for name, kept in units.items() if len(kept) > 1} if shrunk else {g.name for g in self.groups}
        if set(units) != set(self._whole) or set(state.get("keep", ())) != left:
            raise PlanError("the saved gates are of another model, or of other include/exclude choices")
        for name, kept in units.items():
            check_kept(name, kept, len(self._whole[name]))
        if shrunk and self._original != self._whole:
            raise PlanError(
                "this session has shrunk its model already: load the state into a new one, on the original model"
            )
        if shrunk and optimizer is None:
            raise PlanError(
                "the saved model had been shrunk, so the optimizer needs its smaller parameters: make it before, and call "
                "gates.load_state_dict(state, optimizer)"
            )
        if shrunk and optimizer is not None:
            self._cut(units, optimizer)
        self._shrink_every = state.get("shrink_every", self._shrink_every)
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

    def prove(self) -> None:
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
            self._show(self.control.keep)
            return
        with masked(self.model, self._surgeon.grouping, keep):
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
        weights = under_masks(self._weights, dict(self.model.named_buffers(remove_duplicate=False)))
        return magnitude(weights, self.control.limits.groups)

    def _attach(self) -> None:
        self._weights = put_on(
            self.model, self._surgeon.grouping, self.groups, self.control.limits.branches, self._gates
        )

    def _take_off(self) -> None:
        take_off(self.model)
        self._weights = {}

    def _show(self, keep: Keep) -> None:
        """Set the gate parameters: open ones at the initial value, closed ones at minus that, or as the control says."""
        limits, gates = self.control.limits, self._gates
        self._shown = [torch.full_like(value, -self._initial) for value in self.parameters()]
        with torch.no_grad():
            for group, value in zip(limits.groups, self._shown[: len(gates.values)], strict=True):
                index = torch.tensor(keep[group.name], dtype=torch.int64, device=value.device)
                value.index_fill_(0, index, self._initial)
            if self.control.values is not None:
                for w, value in zip(self.control.values, self._shown, strict=False):
                    value.copy_(torch.where(value > 0, w.clamp(min=0), w.clamp(max=-1e-6)))
            for branch, value in zip(limits.branches, self._shown[len(gates.values) :], strict=True):
                if not branch.dropped(keep):
                    value.fill_(self._initial)
        self._set_values()
        for value in self.parameters():  # gates at rest need no gradient, and no optimizer moves what has none
            value.requires_grad_(not self.control.frozen)

    def _set_values(self) -> None:
        """What the gates show is put back, and their gradients, which were read, are gone."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.parameters()), self._shown)
        for value in self.parameters():
            value.grad = None

    def _require_attached(self) -> None:
        if not self.attached:
            raise PrunewiseError("this session has ended: its gates were taken off by finish() or detach()")
