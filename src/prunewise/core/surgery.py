"""Apply a channel plan: the only code that edits modules."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.attention import PrunedMultiheadAttention
from prunewise.core.blocks import with_branches
from prunewise.core.branches import Dropped, check_keep, drop, drops_blocks, translate
from prunewise.core.checks import require_module
from prunewise.core.config import fit_config, has_config
from prunewise.core.cost import CostModel
from prunewise.core.errors import AlreadyGatedError, SharedParameterError, VerificationError
from prunewise.core.graph import Parts, rebuild
from prunewise.core.groups import Grouping, find_groups
from prunewise.core.plan import ChannelPlan
from prunewise.core.proof import check_equal
from prunewise.core.slices import slice_state, state_slices
from prunewise.core.structure import analyse
from prunewise.core.trace import Inputs
from prunewise.core.untouched import copied, evaluating, forget_caches
from prunewise.core.widths import fit_attributes


@dataclass(frozen=True)
class Surgeon:
    """A model's structure, ready to make smaller copies of it. Made once, used for any number of plans."""

    costs: CostModel
    example_inputs: Inputs

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs, *, blocks: bool = False) -> Surgeon:
        """Trace `model`; with `blocks`, find the residual branches that can be dropped as well."""
        grouping = find_groups(analyse(model, example_inputs))
        if blocks:
            grouping = with_branches(grouping, model, example_inputs)
        return cls(CostModel(grouping), example_inputs)

    @property
    def grouping(self) -> Grouping:
        """The groups of the model."""
        return self.costs.grouping

    def cut(self, model: nn.Module, keep: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """A smaller copy of `model` with only the kept units, in the user's classes.

        Where a width is written into a module's code, that module becomes a graph of it, or else the whole model does; a
        warning names them.

        The copy's operations are checked one by one against what the plan predicts, on fake tensors, and its outputs
        against the masked model's.

        Raises:
            VerificationError: neither way gives a network that computes what the masked one does.
        """
        if drops_blocks(keep):
            return self._cut_blocks(model, keep, Surgeon.cut)
        if self.grouping.structure.trace.asks_at:  # no graph has what values decide
            return self._configured(self._sliced(model, keep))
        parts = Parts(model, self.grouping, keep, self.example_inputs)
        try:
            small = self._configured(self._sliced(model, keep, parts))
            if parts.reasons:
                _tell_of_parts(small, parts.reasons)
            return small
        except VerificationError as error:
            problem = str(error).partition(". The model was left")[0]
        warnings.warn(
            f"the small {type(model).__name__} is a graph module, not your class, because {problem}. It trains, saves and "
            "loads all the same; make that width follow from shapes or attributes to keep your class",
            stacklevel=3,
        )
        return rebuild(model, self.grouping, keep, self.example_inputs)

    def sliced(self, model: nn.Module, keep: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """As `cut`, in the user's classes or not at all.

        Raises:
            VerificationError: the classes do not work at the smaller widths; the message says where.
        """
        if drops_blocks(keep):
            return self._cut_blocks(model, keep, Surgeon.sliced)
        return self._sliced(model, keep)

    def _sliced(self, model: nn.Module, keep: Mapping[str, tuple[int, ...]], parts: Parts | None = None) -> nn.Module:
        small = copied(model)
        forget_caches(small)
        slice_state(small, state_slices(self.grouping, keep))
        with evaluating(small):  # a weight made by a parametrization may change with every look in train mode
            _set_widths(small, self.costs, {name: len(kept) for name, kept in keep.items()})
        problem = fit_attributes(small, self.example_inputs, self.costs, keep, parts)
        if problem is not None:
            asks_at = self.grouping.structure.trace.asks_at
            if asks_at:
                problem += f". The code asks for values at {asks_at}: without these channels they may decide otherwise"
            raise VerificationError(problem)
        check_equal(model, small, self.grouping, keep, self.example_inputs)
        return small

    def _configured(self, small: nn.Module) -> nn.Module:
        """`small` with the new widths in its config, where it has one; a warning where the config cannot hold them."""
        if has_config(small) and not any(p.is_meta for p in small.parameters()):
            problem = fit_config(small, self.example_inputs)
            if problem is not None:
                warnings.warn(
                    f"the config of the small {type(small).__name__} keeps the old widths: {problem}. Save and load it with "
                    "save_pruned() and load_pruned(); a model built from its config would not have its shapes",
                    stacklevel=4,
                )
        return small

    def rebuilt(self, model: nn.Module, keep: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """As `cut`, but a graph module in any case."""
        if drops_blocks(keep):
            return self._cut_blocks(model, keep, Surgeon.rebuilt)
        return rebuild(model, self.costs, keep, self.example_inputs)

    def _cut_blocks(self, model: nn.Module, keep: Mapping[str, tuple[int, ...]], cut: Way) -> nn.Module:
        """First the blocks go, then the rest is cut like any model, in the given way."""
        grouping = self.grouping
        if not grouping.branches:
            grouping = with_branches(grouping, model, self.example_inputs)
        check_keep(keep, grouping.branches)
        shallow = copied(model)
        drop(shallow, [b for b in grouping.branches if not b.reason and b.dropped(keep)])
        rest = Surgeon.of(shallow, self.example_inputs)
        small = cut(rest, shallow, translate(grouping, rest.grouping, keep))
        check_equal(model, small, grouping, keep, self.example_inputs)
        return small


def _tell_of_parts(small: nn.Module, reasons: Mapping[str, str]) -> None:
    """Warn of the modules that are graphs now."""
    paths = [p for p in reasons if not any(p.startswith(f"{other}.") for other in reasons)]
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    warnings.warn(
        f"in the small {type(small).__name__}, {shown} {'are graph modules' if len(paths) > 1 else 'is a graph module'}, not "
        f"of your class, because {reasons[paths[0]]}. They train, save and load all the same; make that width follow from "
        "shapes or attributes to keep your class",
        stacklevel=4,
    )


Way = Callable[[Surgeon, nn.Module, Mapping[str, tuple[int, ...]]], nn.Module]


def apply_plan(model: nn.Module, plan: ChannelPlan, example_inputs: Inputs) -> nn.Module:
    """A copy of `model` with only the channels that `plan` keeps.

    The copy consists of the user's own classes with smaller tensors. It is checked twice: operation by
    operation on fake tensors, and (unless the model is on the meta device) by comparing its output with that
    of the masked original.

    Args:
        model: the architecture that the plan was made for; not changed.
        plan: which units stay.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).

    Raises:
        PlanError: the plan is for another model.
        AlreadyGatedError: gates are attached; call `gates.finish()` or `gates.detach()` first.
        VerificationError: the small model does not compute what the masked one does.

    Example:
        >>> import torch
        >>> from prunewise.channels.oneshot import plan_channels
        >>> from prunewise.channels.budget import Budget
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = plan_channels(model, torch.zeros(1, 4), budget=Budget(macs=0.5))
        >>> apply_plan(model, plan, torch.zeros(1, 4))[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    require_ungated(model)
    require_unshared(model)
    surgeon = Surgeon.of(model, example_inputs, blocks=plan.drops_blocks)
    plan.check(model, surgeon.grouping.groups, surgeon.grouping.branches)
    return surgeon.cut(model, plan.keep)


def require_ungated(model: nn.Module) -> None:
    """Raise where gates are attached, or where this is no model."""
    require_module(model)
    if is_gated(model):
        raise AlreadyGatedError("gates are attached to this model: call finish() or detach() of their session first")


def is_gated(model: nn.Module) -> bool:
    """True where a gate session is attached."""
    return any(getattr(m, "_prunewise_gate", False) for m in model.modules())


def _set_widths(model: nn.Module, costs: CostModel, widths: Mapping[str, int]) -> None:
    """Width attributes of torch's own modules, from the shapes their tensors have now."""
    modules = dict(model.named_modules())
    for each in costs.grouping.structure.passes:
        for index, labels in each.group_counts.items():
            op = each.trace.ops[index]
            owner = modules[op.module]
            count = costs.count(labels, widths)
            if isinstance(owner, nn.modules.conv._ConvNd):
                owner.groups = count
            elif isinstance(owner, nn.GroupNorm):
                owner.num_groups = count
    for module in modules.values():
        _set_own_widths(module)


def _set_own_widths(module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        vector = module.weight if module.weight is not None else module.running_mean
        if vector is not None:
            module.num_features = len(vector)
    elif isinstance(module, nn.GroupNorm) and shape:
        module.num_channels = shape[0]
    elif isinstance(module, (nn.LayerNorm, getattr(nn, "RMSNorm", nn.LayerNorm))) and shape:
        module.normalized_shape = shape  # type: ignore[assignment]
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, PrunedMultiheadAttention) or type(module) is nn.MultiheadAttention:
        PrunedMultiheadAttention.adopt(module)


def graft(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the tensors and widths of its cut copy `small`. Modules stay the same objects."""
    copies = dict(small.named_modules(remove_duplicate=False))
    stubs = tuple(f"{name}." for name, copied in copies.items() if isinstance(copied, Dropped))
    for name, module in list(model.named_modules()):
        if name not in copies and name.startswith(stubs):
            continue  # it went with a block
        copied = copies[name]
        module.__class__ = copied.__class__
        if isinstance(copied, Dropped):
            vars(module).clear()
            vars(module).update(vars(copied))
        else:
            vars(module).update({k: v for k, v in vars(copied).items() if k != "_modules"})


def require_unshared(model: nn.Module) -> None:
    """Raise where a module outside `model` holds one of its parameters: pruning would silently untie them.

    Raises:
        SharedParameterError: names the parameter and the other module.
    """
    shared = _held_outside(model)
    if shared is not None:
        gc.collect()  # what an exported graph or an old wrapper left behind is no user
        shared = _held_outside(model)
    if shared is not None:
        raise SharedParameterError(
            f"parameter {shared!r} is also held by a module outside the model: prune the model that contains both, "
            "or untie them first (give one a copy)"
        )


def _held_outside(model: nn.Module) -> str | None:
    """The name of a parameter that a module outside `model` holds too."""
    # torch keeps the module that a scripted one was made of; nothing of it is ever cut.
    scripted = {id(p) for m in model.modules() if isinstance(m, torch.jit.ScriptModule) for p in m.parameters()}
    names = {id(p): name for name, p in model.named_parameters() if id(p) not in scripted}
    own = {id(m._parameters) for m in model.modules()}
    parameters = [p for p in model.parameters() if id(p) not in scripted]
    found: list[Any] = gc.get_referrers(*parameters) if parameters else []
    for store in (s for s in found if isinstance(s, dict) and id(s) not in own):
        for owner in gc.get_referrers(store):
            attributes: Any = vars(owner) if isinstance(owner, nn.Module) else owner
            if isinstance(attributes, dict) and attributes.get("_parameters") is store:
                return next((names[id(p)] for p in store.values() if id(p) in names), None)
    return None
