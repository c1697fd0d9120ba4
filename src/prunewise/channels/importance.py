"""One-shot importances: what each unit is worth, from the weights or from a few batches.

Each function maps (model, groups) to one score a unit, higher = keep, shape (units,), float64. Scores are not
divided by cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.core.batch import differentiable, gradients, loss_of
from prunewise.core.branches import Branch
from prunewise.core.errors import PlanError
from prunewise.core.gains import Gain
from prunewise.core.groups import ChannelGroup, Member

Scores = npt.NDArray[np.float64]
Importance = Callable[[nn.Module, Sequence[ChannelGroup]], Mapping[str, Scores]]


def magnitude(
    model: nn.Module | Mapping[str, Tensor], groups: Sequence[ChannelGroup], *, p: int = 1
) -> dict[str, Scores]:
    """Mean over a unit's weights of |w|^p, over every parameter that produces its channels.

    Args:
        model: a module, or its weights by name, as they act.
        groups: the groups to score.
        p: the power.

    Source: Li et al. 2017, arXiv 1608.08710 (L1 norm of filters); here over all coupled layers, each with
    equal weight.
    """
    tensors = _acting(model) if isinstance(model, nn.Module) else model
    scores = {}
    for group in groups:
        total = np.zeros(group.size)
        for member in group.members:
            weight = tensors.get(member.name)
            if member.role == "out" and weight is not None and weight.dim() > 1:
                total += _reduced(weight.detach().abs().double() ** p, member.dim, member.indices)
        scores[group.name] = total
    return scores


def bn_scale(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Scores]:
    """Mean |scale| of the normalisation layers on the channels.

    Source: Liu et al. 2017, arXiv 1708.06519 (network slimming).

    Raises:
        PlanError: a group has no normalisation layer.
    """
    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
        for name in ("weight", "weight_orig")
    }
    tensors = _acting(model)
    scores = {}
    for group in groups:
        found = [m for m in group.members if m.name in norms and m.name in tensors]
        if not found:
            raise PlanError(f"importance 'bn_scale': {group.name!r} has no normalisation layer; use 'magnitude'")
        scores[group.name] = sum(
            (_reduced(tensors[m.name].detach().abs().double(), m.dim, m.indices) for m in found),
            np.zeros(group.size),
        )
    return scores


def random(model: nn.Module, groups: Sequence[ChannelGroup], *, seed: int = 0) -> dict[str, Scores]:
    """Uniform random scores, the same for the same seed and group names."""
    rng = np.random.default_rng(seed)
    return {g.name: rng.random(g.size) for g in groups}


def taylor(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    data: Iterable[Any],
    loss: Callable[..., Tensor] | None = None,
    branches: Sequence[Branch] = (),
    masses: dict[str, float] | None = None,
) -> dict[str, Scores]:
    """Fisher mass of each unit's gate: mean over batches of (∂loss/∂gate)².

    The gate of a unit multiplies the weights that read it, so ∂loss/∂gate = Σ w·∂loss/∂w over these: the
    first-order change of the loss when the unit goes. Squared, it ranks by how far the loss would move either way.

    Args:
        model: run in eval mode (batch statistics do not move); its gradients are left as they were.
        groups: the groups to score.
        data: batches (inputs, targets), or batches that `loss` understands.
        loss: loss(model, batch) → scalar; default: cross-entropy of model(inputs) against targets.
        branches: residual blocks to score as a whole, by the gate on their last affine parameters.
        masses: takes the scores of the branches, by name.

    Source: Molchanov et al. 2019, arXiv 1906.10771; squared as there.

    Raises:
        PlanError: no batch was given.
    """
    tensors = _tensors(model)
    read = {name for g in groups for m in g.members if m.role == "in" for name in _read_by(m)}
    names = sorted(read | {n for b in branches for n in b.parameters})
    watched = [tensors[n] for n in names]
    scores = {g.name: np.zeros(g.size) for g in groups}
    totals = {b.name: 0.0 for b in branches}
    batches, value = 0, loss_of(loss)
    with differentiable(model, watched):
        for batch in data:
            slopes = gradients(value(model, batch), watched)
            batches += 1
            found = {n: (g, p.detach()) for n, g, p in zip(names, slopes, watched, strict=True) if g is not None}
            for group in groups:
                scores[group.name] += _first_order(group, found) ** 2
            for branch in branches:
                ends = [found[n] for n in branch.parameters if n in found]
                totals[branch.name] += sum(float((g * p).sum()) for g, p in ends) ** 2
    if not batches:
        raise PlanError("importance 'taylor' needs data: batches of (inputs, targets)")
    if masses is not None:
        masses.update({name: value / batches for name, value in totals.items()})
    return {name: value / batches for name, value in scores.items()}


def _first_order(group: ChannelGroup, found: Mapping[str, tuple[Tensor, Tensor]]) -> Scores:
    """Σ gradient · weight over all that reads each unit, shape (units,); `found` has both by parameter name."""
    total = np.zeros(group.size)
    for member in group.members:
        if member.role == "in" and member.name in found:
            gradient, weight = found[member.name]
            change = gradient * weight
            if member.gain is not None and member.gain.gain in found:
                change = _through_norm(member.gain, *found[member.name], *found[member.gain.gain])
            total += _reduced(change.double(), member.dim, member.indices, mean=False)
    return total


@torch.enable_grad()
def _through_norm(what: Gain, gradient: Tensor, direction: Tensor, of_gain: Tensor, gain: Tensor) -> Tensor:
    """Gradient of a mask on a normalised weight, of which the norm and the gain depend on the mask too."""
    mask = torch.ones_like(direction).requires_grad_()
    masked = [what.closed(direction, mask), gain * what.factor(direction, mask, gain)]
    return torch.autograd.grad(masked, mask, [gradient, of_gain])[0]


def _read_by(member: Member) -> list[str]:
    return [member.name] if member.gain is None else [member.name, member.gain.gain]


def by_magnitude(importance: Importance) -> Importance:
    """An importance with the scores of `importance`, handed to the units of each group in the order of their magnitude.

    Of `taylor` this is "hybrid": gradients tell better how many units a layer needs, magnitudes which ones (measured in
    benchmarks/).
    """

    def scored(model: nn.Module, groups: Sequence[ChannelGroup]) -> Mapping[str, Scores]:
        ranks = magnitude(model, groups)
        return {
            name: in_order_of(values, ranks[name], len(values)) for name, values in importance(model, groups).items()
        }

    return scored


def in_order_of(masses: Scores, ranks: Scores, size: int, power: float = 0.5) -> Scores:
    """`masses` handed to units in the order of `ranks`, with diminishing returns.

    The highest mass goes to the unit of the highest rank. The k-th highest counts (size / k)^power times, `size` being
    the units that the group had at first: a mass says what the loss loses with one unit while all others are there,
    and the fewer there are, the more each of them is worth. Without that, small budgets close whole layers but for a
    unit (measured in benchmarks/results/ablation.md, as is the power of 1/2).
    """
    result = np.empty(len(masses))
    growth = (size / np.arange(len(masses), 0, -1)) ** power
    result[np.argsort(ranks, kind="stable")] = np.sort(masses) * growth
    return result


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _acting(model: nn.Module) -> dict[str, Tensor]:
    return under_masks(_tensors(model), dict(model.named_buffers(remove_duplicate=False)))


def under_masks(weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they act, by the same names: those under a mask of torch.nn.utils.prune times it."""
    found = dict(weights)
    for name, weight in weights.items():
        mask = buffers.get(f"{name.removesuffix('_orig')}_mask")
        if mask is not None and name.endswith("_orig") and mask.shape == weight.shape:
            found[name] = weight.detach() * mask.to(weight.dtype)
    return found


def _reduced(values: Tensor, dim: int, indices: npt.NDArray[np.int64], mean: bool = True) -> Scores:
    """Sum (or mean) of `values` over all that each unit owns along `dim`."""
    if values.dim() > 1:
        others = [d for d in range(values.dim()) if d != dim]
        values = values.mean(others) if mean else values.sum(others)
    own = values[torch.from_numpy(indices).to(values.device)]
    result: Scores = (own.mean(1) if mean else own.sum(1)).cpu().numpy()
    return result
