"""Pruning methods: which weights of a layer stay, given how many.

A method is a callable (weight, keep, **asked) → keep_mask: `weight` is a detached tensor (dead weights under a mask in
force are 0), `keep` a count, `keep_mask` a boolean tensor of the weight's shape with exactly `keep` True. It may return
(keep_mask, weight) instead, where it changes the weights that stay. What else it needs it asks for by `asks`:

    input_norms     ‖x‖₂ of what each weight is multiplied with over the data, shape of the weight, float64
    hessian         Σ x xᵀ over the data, shape (groups, columns, columns), float64
    gradient        mean ∂loss/∂w over the data, shape of the weight, float64
    alive           False for weights that are gone already, under a mask in force; bool, shape of the weight
    layer           the `Layer`: its module, and the weight as matrices (`as_matrix`, `from_matrix`)
    rng             a torch.Generator on the CPU, seeded by the layer's name and `seed=`

One that does not ask for `alive` may choose dead weights; they make room for the largest that live.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import prune

from prunewise.core.errors import MethodError, PlanError
from prunewise.layers.masks import top
from prunewise.layers.sparsegpt import reconstruct
from prunewise.layers.weights import Layer

Method = Callable[..., Any]
_Method = TypeVar("_Method", bound=Method)

ASKABLE = frozenset({"input_norms", "hessian", "gradient", "alive", "layer", "rng"})


def asks(*names: str) -> Callable[[_Method], _Method]:
    """Mark what a method wants to be given as keywords; see the top of this module.

    Example:
        >>> @asks("input_norms")
        ... def largest_inputs(weight, keep, *, input_norms):
        ...     return top(input_norms, keep)
        >>> asked_by(largest_inputs)
        ('input_norms',)
    """
    unknown = set(names) - ASKABLE
    if unknown:
        raise MethodError(f"a method can ask for {', '.join(sorted(ASKABLE))}; not for {', '.join(sorted(unknown))}")

    def mark(method: _Method) -> _Method:
        method.asks = names  # type: ignore[attr-defined]
        return method

    return mark


def asked_by(method: Method) -> tuple[str, ...]:
    """What a method asks for."""
    inner = method.func if isinstance(method, functools.partial) else method
    return tuple(getattr(inner, "asks", ()))


def _top_alive(scores: Tensor, keep: int, alive: Tensor | None) -> Tensor:
    return top(scores if alive is None else scores.masked_fill(~alive, -torch.inf), keep)


@asks("rng", "alive")
def random(weight: Tensor, keep: int, *, rng: torch.Generator, alive: Tensor | None = None) -> Tensor:
    """Any weights, each with the same chance."""
    chance = torch.rand(weight.shape, generator=rng, dtype=torch.float64, device="cpu")
    return _top_alive(chance.to(weight.device), keep, alive)


@asks("alive")
def magnitude(weight: Tensor, keep: int, *, alive: Tensor | None = None) -> Tensor:
    """The largest by |w|. Source: Han et al. 2015, arXiv 1506.02626."""
    return _top_alive(weight.abs(), keep, alive)


@asks("layer", "alive")
def channel_l1(weight: Tensor, keep: int, *, layer: Layer, alive: Tensor | None = None) -> Tensor:
    """Whole filters (all weights of an output channel), the largest by Σ|w|; the last one in part, by |w|, to meet the count.

    Source: Li et al. 2017, arXiv 1608.08710. There filters are cut out; here their weights are zero.
    """
    alive = torch.ones_like(weight, dtype=torch.bool) if alive is None else alive
    filters, living = (layer.as_matrix(t).reshape(-1, layer.columns) for t in (weight.abs().double(), alive))
    order = torch.argsort(filters.sum(1), descending=True, stable=True)
    until = living.sum(1)[order].cumsum(0)  # weights that all filters up to this one have
    whole = int((until <= keep).sum())
    part = keep - (int(until[whole - 1]) if whole else 0)
    keep_mask = torch.zeros_like(living)
    keep_mask[order[:whole]] = living[order[:whole]]
    if part:
        last = order[whole]
        keep_mask[last] = _top_alive(filters[last], part, living[last])
    return layer.from_matrix(keep_mask.reshape(layer.groups, layer.rows, layer.columns))


@asks("gradient", "alive")
def taylor(weight: Tensor, keep: int, *, gradient: Tensor, alive: Tensor | None = None) -> Tensor:
    """The largest by |w·∂loss/∂w|. Source: Molchanov et al. 2019, arXiv 1906.10771, of single weights."""
    return _top_alive((weight.double() * gradient).abs(), keep, alive)


@asks("gradient", "alive")
def movement(weight: Tensor, keep: int, *, gradient: Tensor, alive: Tensor | None = None) -> Tensor:
    """The largest by −w·∂loss/∂w: weights that training would move away from zero.

    Source: Sanh et al. 2020, arXiv 2005.07683. There the score is summed up while the weights are trained; here it is that of
    the weights as they are, over one pass.
    """
    return _top_alive(-weight.double() * gradient, keep, alive)


@asks("input_norms", "layer", "alive")
def wanda(weight: Tensor, keep: int, *, input_norms: Tensor, layer: Layer, alive: Tensor | None = None) -> Tensor:
    """The largest of each output by |w|·‖x‖. Every output keeps the same number of weights, to one, or all that it has left.

    Source: Sun et al. 2024, arXiv 2306.11695. There each output rounds down; here the weights left over go to the outputs
    whose next weight scores highest, so that the count is exact.
    """
    alive = torch.ones_like(weight, dtype=torch.bool) if alive is None else alive
    scores = (weight.abs().double() * input_norms).masked_fill(~alive, -1)
    scores, living = (layer.as_matrix(t).reshape(-1, layer.columns) for t in (scores, alive))
    available = living.sum(1)
    each = bisect_right(range(1, layer.columns + 1), keep, key=lambda n: int(available.clamp(max=n).sum()))
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    counts = available.clamp(max=each)
    left = keep - int(counts.sum())
    if left:
        following = scores.gather(1, order[:, each : each + 1]).reshape(-1)
        counts += _top_alive(following, left, available > each)
    ranked = torch.arange(layer.columns, device=weight.device) < counts[:, None]
    keep_mask = torch.zeros_like(ranked).scatter_(1, order, ranked)
    return layer.from_matrix(keep_mask.reshape(layer.groups, layer.rows, layer.columns))


@asks("hessian", "layer")
def sparsegpt(
    weight: Tensor, keep: int, *, hessian: Tensor, layer: Layer, block: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Weights that cost the layer's output least, the others being changed to make up for them.

    Source: Frantar and Alistarh 2023, arXiv 2301.00774. What differs: the count is exact (each block of columns takes its
    share of it, rounded so that the sum is right), the Hessian is that of the dense model for all layers rather than of
    the layers before pruned already, and an input that is always zero keeps its weight's value where the mask keeps it.
    """
    matrix = layer.as_matrix(weight)
    mask, updated = reconstruct(matrix.double(), hessian, keep, block=block, damping=damping)
    return layer.from_matrix(mask), layer.from_matrix(updated).to(weight.dtype)


@asks("layer", "alive")
def n_of_m(weight: Tensor, keep: int, *, layer: Layer, alive: Tensor | None = None, n: int = 2, m: int = 4) -> Tensor:
    """The `n` largest of every `m` weights next to each other along the input channels, by |w|; by name "2:4", "4:8", …

    2:4 is what sparse tensor cores take. The plan must ask for exactly n/m of the layer:
    `allocate(model, 1 - n / m, "uniform", exclude=...)`.

    Source: Mishra et al. 2021, arXiv 2104.08378.

    Raises:
        MethodError: the input channels are no multiple of m, the plan asks for another count, or fewer than n of some m are left
            under a mask in force.
    """
    values = weight.abs() if alive is None else weight.abs().masked_fill(~alive, -1)
    values = values.movedim(layer.input_dim, -1)
    channels = layer.columns // layer.positions
    if channels % m:
        raise MethodError(
            f"{n}:{m} needs input channels in multiples of {m}, and {layer.name!r} has {channels}: leave it out of the "
            f"plan, by exclude={layer.name!r} in allocate"
        )
    if keep * m != layer.size * n:
        raise MethodError(
            f"{n}:{m} keeps {layer.size * n // m} of the {layer.size} weights of {layer.name!r}, and the plan {keep}: allocate "
            f"with sparsity={1 - n / m:g} and importance='uniform'"
        )
    grouped = values.reshape(-1, m)
    order = torch.argsort(grouped, dim=1, descending=True, stable=True)
    if bool((grouped.gather(1, order[:, :n]) < 0).any()):
        raise MethodError(
            f"{n}:{m} cannot go on from the mask in force on {layer.name!r}: call make_permanent_ first, or start from the dense "
            "model"
        )
    keep_mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return keep_mask.reshape(values.shape).movedim(-1, layer.input_dim)


def of_torch(cls: Any) -> Method:
    """A class of torch.nn.utils.prune as a method: `prune.L1Unstructured`, `partial(prune.LnStructured, n=1, dim=0)`, or your own.

    It is made with amount= the number of weights to remove; a structured one with the number of channels along its `dim`, which
    must come out even.
    """

    @asks("layer")
    def method(weight: Tensor, keep: int, *, layer: Layer) -> Tensor:
        name = getattr(cls, "func", cls).__name__
        structured = getattr(cls, "func", cls).PRUNING_TYPE == "structured"
        try:
            pruner = cls(amount=weight.numel() - keep)
        except TypeError as error:
            raise MethodError(
                f"{name} cannot be made with amount= alone: give partial({name}, ...) with all else it needs ({error})"
            ) from error
        if structured:
            channels = weight.shape[pruner.dim]
            each = weight.numel() // channels
            if keep % each:
                raise MethodError(
                    f"{name} removes whole channels of {each} weights of {layer.name!r}, and the plan keeps "
                    f"{keep} of {weight.numel()}: ask for a multiple, or use 'channel_l1'"
                )
            pruner = cls(amount=channels - keep // each)
        mask: Tensor = pruner.compute_mask(weight, torch.ones_like(weight))
        return mask

    method.__name__ = getattr(cls, "func", cls).__name__
    return method


METHODS: dict[str, Method] = {
    "random": random,
    "magnitude": magnitude,
    "channel_l1": channel_l1,
    "taylor": taylor,
    "movement": movement,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}


def find_method(method: str | Method) -> tuple[str, Method]:
    """A method and its name, from a name ("magnitude", "2:4", …), a callable, or a class of torch.nn.utils.prune.

    Raises:
        PlanError: there is no method of that name.
    """
    inner = method.func if isinstance(method, functools.partial) else method
    if isinstance(inner, type) and issubclass(inner, prune.BasePruningMethod):
        return inner.__name__, of_torch(method)
    if isinstance(method, str):
        pattern = re.fullmatch(r"(\d+):(\d+)", method)
        if pattern and 0 < int(pattern[1]) <= int(pattern[2]):
            return method, functools.partial(n_of_m, n=int(pattern[1]), m=int(pattern[2]))
        if method in METHODS:
            return method, METHODS[method]
    elif callable(method):
        return getattr(inner, "__name__", type(inner).__name__), method
    raise PlanError(
        f"unknown method {method!r}: use one of {', '.join(METHODS)}, '2:4', a class of torch.nn.utils.prune, or a callable"
    )
