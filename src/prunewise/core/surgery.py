"""Apply a channel plan: the only code that edits modules."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.core.attention import PrunedMultiheadAttention
from prunewise.core.cost import CostModel
from prunewise.core.errors import AlreadyGatedError, PlanError, SharedParameterError, VerificationError
from prunewise.core.groups import Grouping, find_groups
from prunewise.core.plan import ChannelPlan
from prunewise.core.sites import masked
from prunewise.core.structure import analyse
from prunewise.core.trace import Inputs, as_call, evaluating, tensors_of
from prunewise.core.widths import fit_attributes

Keep = dict[str, dict[int, npt.NDArray[np.int64]]]  # tensor name -> dimension -> indices that stay


@dataclass(frozen=True)
class Surgeon:
    """A model's structure, ready to make smaller copies of it. Made once, used for any number of plans."""

    costs: CostModel
    example_inputs: Inputs

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs) -> Surgeon:
        """Trace `model`."""
        return cls(CostModel(find_groups(analyse(model, example_inputs))), example_inputs)

    @property
    def grouping(self) -> Grouping:
        """The groups of the model."""
        return self.costs.grouping

    def cut(self, model: nn.Module, keep: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """A smaller copy of `model` with only the kept units; the user's classes, or else a graph module that warns.

        The copy's operations are checked one by one against what the plan predicts, on fake tensors.
        """
        small = copy.deepcopy(model)
        slices = state_slices(self.grouping, keep)
        slice_state(small, slices)
        widths = {name: len(kept) for name, kept in keep.items()}
        _set_widths(small, self.costs, widths)
        problem = fit_attributes(small, self.example_inputs, self.costs, widths)
        if problem is None:
            return small
        raise VerificationError(problem)


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
        >>> from prunewise.channels.oneshot import plan_channels
        >>> from prunewise.channels.budget import Budget
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = plan_channels(model, torch.zeros(1, 4), budget=Budget(macs=0.5))
        >>> apply_plan(model, plan, torch.zeros(1, 4))[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    if is_gated(model):
        raise AlreadyGatedError("gates are attached to this model: call gates.finish() or gates.detach() first")
    require_unshared(model)
    surgeon = Surgeon.of(model, example_inputs)
    plan.check(model, surgeon.grouping.groups)
    small = surgeon.cut(model, plan.keep)
    check_equal(model, small, surgeon.grouping, plan.keep, example_inputs)
    return small


def is_gated(model: nn.Module) -> bool:
    """True where a gate session is attached."""
    return any(getattr(m, "_prunewise_gate", False) for m in model.modules())


# -- slicing ------------------------------------------------------------------------------------------------------


def state_slices(grouping: Grouping, keep: Mapping[str, tuple[int, ...]]) -> Keep:
    """For every parameter and buffer that loses something: the indices that stay, by dimension."""
    shapes = {t.name: t.shape for t in grouping.structure.trace.tensors if t.name}
    gone: dict[str, dict[int, npt.NDArray[np.bool_]]] = {}
    for group in grouping.groups:
        if group.name not in keep:
            continue
        removed = np.setdiff1d(np.arange(group.size), np.asarray(keep[group.name], dtype=np.int64))
        for member in group.members:
            dims = gone.setdefault(member.name, {})
            if member.dim not in dims:
                dims[member.dim] = np.zeros(shapes[member.name][member.dim], dtype=bool)
            dims[member.dim][member.indices[removed]] = True
    return {
        name: {dim: np.flatnonzero(~mask) for dim, mask in dims.items() if mask.any()} for name, dims in gone.items()
    }


def take(tensor: Tensor, slices: Mapping[int, npt.NDArray[np.int64]]) -> Tensor:
    """`tensor` with only the given indices of each dimension, contiguous as the original was."""
    format_ = torch.preserve_format
    out = tensor
    for dim, indices in slices.items():
        out = out.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out.clone(memory_format=format_) if out is tensor else out


def slice_state(module: nn.Module, slices: Keep) -> None:
    """Replace the parameters and buffers of `module` by slices of them. Tied ones stay tied."""
    owners: dict[int, tuple[str, list[tuple[dict[str, Any], str]]]] = {}
    for path, sub in module.named_modules():
        for store in (sub._parameters, sub._buffers):
            for leaf, tensor in store.items():
                if tensor is not None:
                    name = f"{path}.{leaf}" if path else leaf
                    owners.setdefault(id(tensor), (name, []))[1].append((store, leaf))
    for name, places in owners.values():
        dims = slices.get(name)
        if not dims:
            continue
        store, leaf = places[0]
        old = store[leaf]
        with torch.no_grad():
            new = take(old.detach(), dims)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
                if old.grad is not None:
                    new.grad = take(old.grad, dims)
        for store, leaf in places:
            store[leaf] = new


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
    elif type(module) is nn.MultiheadAttention:
        PrunedMultiheadAttention.adopt(module)


# -- proof --------------------------------------------------------------------------------------------------------


def check_equal(
    model: nn.Module,
    small: nn.Module,
    grouping: Grouping,
    keep: Mapping[str, tuple[int, ...]],
    example_inputs: Inputs,
) -> float:
    """Compare the small model with the masked original on the example inputs, in eval mode.

    Returns:
        The largest difference relative to the largest output.

    Raises:
        VerificationError: it is larger than rounding explains.
    """
    if any(p.is_meta for p in model.parameters()):
        return 0.0
    args, kwargs = as_call(example_inputs)
    with torch.no_grad(), evaluating(model), evaluating(small):
        with masked(model, grouping.groups, keep):
            want = tensors_of(model(*args, **kwargs))
        got = tensors_of(small(*args, **kwargs))
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if a.shape != b.shape:
            raise VerificationError(
                f"an output has shape {tuple(b.shape)} where the gated model gives {tuple(a.shape)}"
            )
        if a.is_floating_point() or a.is_complex():
            scale = float(a.abs().max()) if a.numel() else 0.0
            difference = float((a - b).abs().max()) / max(scale, 1e-12) if a.numel() else 0.0
            tolerance = (
                max(1e-9, 1e5 * torch.finfo(a.dtype).eps)
                if a.dtype == torch.float64
                else (1e-3 if a.dtype == torch.float32 else 0.1)
            )
            if not difference <= tolerance and not math.isnan(scale):
                raise VerificationError(
                    f"the small model differs from the gated one by {difference:.2e} of the largest output. The model "
                    "was left as it was. This is a defect of prunewise: please report the model's code"
                )
            worst = max(worst, difference)
    return worst


# -- optimizers ---------------------------------------------------------------------------------------------------


def migrate_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    plan: ChannelPlan,
    example_inputs: Inputs,
) -> None:
    """Point `optimizer` (made for `model`) at the parameters of `small`, its state sliced as they were.

    Momenta, second moments and whatever else has a parameter's shape lose the removed channels; step counts,
    parameter groups and their settings stay. The optimizer is changed in place; parameters of other models in
    it are left alone.

    Raises:
        PlanError: `plan` is not the one that leads from `model` to `small`.
    """
    grouping = find_groups(analyse(model, example_inputs))
    plan.check(model, grouping.groups)
    move_optimizer(optimizer, model, small, state_slices(grouping, plan.keep))


def move_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, slices: Keep) -> None:
    """`migrate_optimizer` with the slices at hand."""
    new = dict(small.named_parameters())
    moves: dict[Tensor, tuple[Tensor, Mapping[int, npt.NDArray[np.int64]]]] = {}
    for name, p in model.named_parameters():
        target, dims = new.get(name), slices.get(name, {})
        shape = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(p.shape))
        if target is None or tuple(target.shape) != shape:
            raise PlanError(f"parameter {name!r} of the small model does not come from this model by this plan")
        moves[p] = (target, dims)
    for group in optimizer.param_groups:
        group["params"] = [moves[p][0] if p in moves else p for p in group["params"]]
    for before, (after, cut) in moves.items():
        state = optimizer.state.pop(before, None)
        if state is not None:
            optimizer.state[after] = {
                k: take(v, cut) if isinstance(v, Tensor) and v.shape == before.shape else v for k, v in state.items()
            }


def graft(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the tensors and widths of its cut copy `small`. Modules stay the same objects."""
    copies = dict(small.named_modules(remove_duplicate=False))
    for name, module in list(model.named_modules()):
        copied = copies[name]
        module.__class__ = copied.__class__
        vars(module).update({k: v for k, v in vars(copied).items() if k != "_modules"})


def require_unshared(model: nn.Module) -> None:
    """Raise where a module outside `model` holds one of its parameters: pruning would silently untie them.

    Raises:
        SharedParameterError: names the parameter and the other module.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    own = {id(m._parameters) for m in model.modules()}
    parameters = list(model.parameters())
    stores: list[Any] = gc.get_referrers(*parameters) if parameters else []
    for store in stores:
        if type(store) is not dict or id(store) in own:
            continue
        for owner in gc.get_referrers(store):
            attributes = vars(owner) if isinstance(owner, nn.Module) else owner
            if store is None or not isinstance(attributes, dict) or attributes.get("_parameters") is not store:
                continue
            shared = next((names[id(p)] for p in store.values() if id(p) in names), None)
            if shared is not None:
                raise SharedParameterError(
                    f"parameter {shared!r} is also held by a module outside the model: prune the model that "
                    "contains both, or untie them first (give one a copy)"
                )
