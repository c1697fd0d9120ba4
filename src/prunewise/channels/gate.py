"""The trainable gate: a step in the forward pass, a chosen slope in the backward pass. On weights, and off them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunewise.core.branches import Branch
from prunewise.core.gains import Gain
from prunewise.core.groups import ChannelGroup, Grouping
from prunewise.core.norms import MaskedNorm, unhook
from prunewise.core.sites import Site, gate_sites, norm_sites

Shaping = Callable[[Tensor], Tensor]


def constant(w: Tensor) -> Tensor:
    """Slope 1 everywhere: a gate moves as fast far from the step as at it."""
    return torch.ones_like(w)


def sigmoid_slope(w: Tensor) -> Tensor:
    """Slope of a sigmoid, 1 at the step: gates far from it move slowly."""
    s = torch.sigmoid(w)
    return 4 * s * (1 - s)


class _Step(torch.autograd.Function):
    """Forward b(w), backward grad · g(w): the limit M → ∞ of the trainable gate function."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, slope: Tensor | None) -> Tensor:
        if slope is not None:
            ctx.save_for_backward(slope)
        return (w >= 0).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors
        return (grads[0] * saved[0] if saved else grads[0]), None


def gate(w: Tensor, shaping: Shaping = constant) -> Tensor:
    """The trainable gate function: 1 where `w` ≥ 0, else 0, with slope `shaping(w)`.

    Args:
        w: gate parameters, any shape, floating.
        shaping: the gradient-shaping function g, element-wise.

    Returns:
        Zeros and ones, shape and dtype of `w`.

    Source: Kim, Park, Jung, Choe, arXiv 1904.10921, TGF(w; g) = b(w) + s(w)·g(w) with s(w) = (M·w − ⌊M·w⌋)/M.
    This is its limit for M → ∞, value and slope: the literal formula's value is within sup|g|/M of it, and it
    is NaN in half precision for a large M.

    Example:
        >>> w = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
        >>> gate(w).tolist()
        [0.0, 1.0, 1.0]
        >>> gate(w).sum().backward()
        >>> w.grad.tolist()
        [1.0, 1.0, 1.0]
    """
    return _Step.apply(w, None if shaping is constant else shaping(w).detach())  # type: ignore[no-any-return,no-untyped-call]


class Gates:
    """The gate parameters of a session, shared by reference with every gated weight (and its copies)."""

    def __init__(
        self, sizes: list[int], device: torch.device, shaping: Shaping, initial: float, blocks: int = 0
    ) -> None:
        self.values = [nn.Parameter(torch.full((n,), initial, device=device)) for n in sizes]
        self.blocks = [nn.Parameter(torch.full((1,), initial, device=device)) for _ in range(blocks)]
        self.shaping = shaping

    def __deepcopy__(self, memo: dict[int, Any]) -> Gates:
        # A copy of a gated model (an average of weights, say) sees the same gates as the model it follows.
        return self

    def vector(self, groups: list[int]) -> Tensor:
        """Zeros and ones of the units of these groups, one after another, then a one for what always stays."""
        parts = [gate(self.values[k], self.shaping) for k in groups]
        return torch.cat([*parts, parts[0].new_ones(1)])


class UnitMask:
    """Zeros and ones for the entries of one dimension, from the gates of the units that own them.

    Args:
        gates: of the session.
        units: the unit of each entry, numbered through all groups; -1: it always stays.
        offsets, sizes: number of the first unit, and count of the units, of each group.
    """

    def __init__(
        self, gates: Gates, units: npt.NDArray[np.int64], offsets: Sequence[int], sizes: Sequence[int]
    ) -> None:
        self._gates = gates
        number = torch.from_numpy(units)
        owned = [(number >= start) & (number < start + size) for start, size in zip(offsets, sizes, strict=True)]
        self._groups = [k for k, own in enumerate(owned) if own.any()]
        total = sum(sizes[k] for k in self._groups)
        index = torch.full((len(number),), total, dtype=torch.int64)  # the last entry of `Gates.vector`: stays
        start = 0
        for k in self._groups:
            index[owned[k]] = number[owned[k]] - offsets[k] + start
            start += sizes[k]
        whole = len(self._groups) == 1 and torch.equal(index, torch.arange(total))
        # One copy a device; none: the units as they come. Not buffers: averages of weights would average them.
        self._index: dict[torch.device, Tensor] = {} if whole else {index.device: index}

    def __call__(self) -> Tensor:
        """The mask, shape (entries,), on the device of the gates."""
        if not self._index:
            return gate(self._gates.values[self._groups[0]], self._gates.shaping)
        mask = self._gates.vector(self._groups)
        if mask.device not in self._index:
            self._index[mask.device] = next(iter(self._index.values())).to(mask.device)
        return mask.index_select(0, self._index[mask.device])

    def beside(self, x: Tensor) -> Tensor:
        """The mask on the device of `x`."""
        return self().to(x.device)


class GatedWeight(nn.Module):
    """Parametrization: a weight times the gates of the channels that it reads, and of the blocks that it ends."""

    _prunewise_gate = True

    def __init__(
        self,
        gates: Gates,
        sites: list[Site],
        offsets: list[int],
        sizes: list[int],
        ndim: int,
        order: list[str],
        blocks: Sequence[int] = (),
        direction: tuple[Gain, nn.Module, str] | None = None,
    ) -> None:
        super().__init__()
        # Of a direction whose norm gates make smaller: the gain. Of that gain: the direction's module and name.
        self._normed_by = next((site.gain for site in sites if site.gain is not None), None)
        self._direction = direction  # in a tuple: no child of this module
        self._blocks = list(blocks)  # the branches that this weight turns on and off as a whole
        self.order = order  # names of the parameters of the gated module, as they were
        self._gates = gates
        self._masks = [UnitMask(gates, site.units, offsets, sizes) for site in sites]
        self._shapes = [[-1 if d == site.dim else 1 for d in range(ndim)] for site in sites]

    def masks(self, weight: Tensor) -> list[Tensor]:
        """Zeros where channels are closed, and ones, to multiply `weight` by: one along each dimension that has gates."""
        return [
            mask().to(device=weight.device, dtype=weight.dtype).view(shape)
            for mask, shape in zip(self._masks, self._shapes, strict=True)
        ]

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` with the entries of closed channels zero; and of a normalised weight, what makes up for its norm."""
        if self._normed_by is not None:
            weight = self._normed_by.closed(weight, math.prod(self.masks(weight), start=weight.new_ones(())))
        else:
            for mask in self.masks(weight):
                weight = weight * mask
        if self._direction is not None:
            gain, module, leaf = self._direction
            chains: Any = module.parametrizations
            chain, whole = chains[leaf], chains[leaf].original
            masks = next(p for p in chain if isinstance(p, GatedWeight)).masks(whole)
            weight = weight * gain.factor(whole, math.prod(masks, start=whole.new_ones(())), weight)
        for block in self._blocks:
            opened = gate(self._gates.blocks[block], self._gates.shaping)
            weight = weight * opened.to(device=weight.device, dtype=weight.dtype).view([1] * weight.dim())
        return weight


def put_on(
    model: nn.Module, grouping: Grouping, groups: Sequence[ChannelGroup], branches: Sequence[Branch], gates: Gates
) -> dict[str, nn.Parameter]:
    """Parametrise every weight that reads channels with gates, or that ends a block which may go; and hook norms.

    Returns:
        All parameters of the model by name, as they were before.
    """
    shapes = {t.name: t.shape for t in grouping.structure.trace.tensors if t.name}
    sizes = [g.size for g in groups]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
    sites: dict[str, list[Site]] = {}
    for site in gate_sites(groups, shapes):
        sites.setdefault(site.name, []).append(site)
    blocks: dict[str, list[int]] = {}
    for number, branch in enumerate(branches):
        for name in branch.parameters:
            blocks.setdefault(name, []).append(number)
    gains = {site.gain.gain: site.gain for own in sites.values() for site in own if site.gain is not None}
    weights: dict[str, nn.Parameter] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # a tied parameter has several
    for path, module in list(model.named_modules()):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
                weights[f"{path}.{leaf}" if path else leaf] = parameter
    orders: dict[nn.Module, list[str]] = {}
    for name in dict.fromkeys([*sites, *gains, *blocks]):
        weight = weights[name]
        direction = (gains[name], *places[id(weights[gains[name].direction])][0]) if name in gains else None
        for module, leaf in places[id(weight)]:
            order = orders.setdefault(module, list(module._parameters))
            gated = GatedWeight(
                gates, sites.get(name, []), offsets, sizes, weight.dim(), order, blocks.get(name, []), direction
            ).to(weight.device)
            gated.train(module.training)
            if parametrize.is_parametrized(module):  # torch is about to add to its class
                _give_own_class(module)
            parametrize.register_parametrization(module, leaf, gated, unsafe=True)
    modules = dict(model.named_modules())
    for norm, units in norm_sites(grouping, groups):
        MaskedNorm(norm, UnitMask(gates, units, offsets, sizes).beside).put_on(modules[norm.path])
    return weights


def _give_own_class(module: nn.Module) -> None:
    """Copies of a parametrised module share its class: this one gets a class of its own."""
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))


def take_off(model: nn.Module) -> None:
    """Remove every gate parametrization, and every hook of a norm, of a model (or of a copy of it)."""
    for module in list(model.modules()):
        unhook(module)
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for leaf, chain in list(chains.items()):
            gated = next((p for p in chain if isinstance(p, GatedWeight)), None)
            if gated is not None:
                _give_own_class(module)  # torch is about to delete from it
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
                # torch registers the weight anew, as the last one: optimizers and checkpoints go by the order.
                rank = {name: i for i, name in enumerate(gated.order)}
                ordered = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
                module._parameters.clear()
                module._parameters.update(ordered)


def swap_gates(
    optimizer: torch.optim.Optimizer,
    before: Mapping[tuple[str, str], nn.Parameter],
    after: Mapping[tuple[str, str], nn.Parameter],
) -> None:
    """Where `optimizer` holds gates from before, it gets those of the same name; gates that are gone leave it."""
    successor = {old: after.get(name) for name, old in before.items()}
    for group in optimizer.param_groups:
        now = [successor.get(p, p) for p in group["params"]]
        group["params"] = [p for p in now if p is not None]
    for old in successor:
        optimizer.state.pop(old, None)
