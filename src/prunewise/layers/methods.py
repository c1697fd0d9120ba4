"""Pruning methods: which weights of a layer stay, given how many.

A method is a callable (weight, keep, **asked) → keep_mask: `weight` is a detached tensor (dead weights under a mask in
force are 0), `keep` a count, `keep_mask` a boolean tensor of the weight's shape with exactly `keep` True. It may return
(keep_mask, weight) instead, where it changes the weights that stay. What else it needs it asks for by `asks`:

    input_norms     ‖x‖₂ of what each weight is multiplied with over the data, shape of the weight, float64
    hessian         Σ x xᵀ over the data, shape (groups, columns, columns), float64
    gradient        mean ∂loss/∂w over the data, shape of the weight, float64
    layer           the `Layer`: its module, and the weight as matrices (`as_matrix`, `from_matrix`)
    rng             a torch.Generator on the CPU, seeded by the layer's name and `seed=`
"""

from __future__ import annotations

import functools
import re
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

ASKABLE = frozenset({"input_norms", "hessian", "gradient", "layer", "rng"})


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


@asks("rng")
def random(weight: Tensor, keep: int, *, rng: torch.Generator) -> Tensor:
    """Any weights, each with the same chance."""
    return top(torch.rand(weight.shape, generator=rng, dtype=torch.float64).to(weight.device), keep)


def magnitude(weight: Tensor, keep: int) -> Tensor:
    """The largest by |w|. Source: Han et al. 2015, arXiv 1506.02626."""
    return top(weight.abs(), keep)


@asks("layer")
def channel_l1(weight: Tensor, keep: int, *, layer: Layer) -> Tensor:
    """Whole filters (all weights of an output channel), the largest by Σ|w|; the last one in part, by |w|, to meet the count.

    Source: Li et al. 2017, arXiv 1608.08710. There filters are cut out; here their weights are zero.
    """
    matrix = layer.as_matrix(weight.abs().double())
    norms = matrix.sum(-1).reshape(-1)
    order = torch.argsort(norms, descending=True, stable=True)
    whole, part = divmod(keep, layer.columns)
    keep_mask = torch.zeros(matrix.shape, dtype=torch.bool, device=weight.device).reshape(-1, layer.columns)
    keep_mask[order[:whole]] = True
    if part:
        last = order[whole]
        keep_mask[last] = top(matrix.reshape(-1, layer.columns)[last], part)
    return layer.from_matrix(keep_mask.reshape(matrix.shape))


@asks("gradient")
def taylor(weight: Tensor, keep: int, *, gradient: Tensor) -> Tensor:
    """The largest by |w·∂loss/∂w|. Source: Molchanov et al. 2019, arXiv 1906.10771, of single weights."""
    return top((weight.double() * gradient).abs(), keep)


@asks("gradient")
def movement(weight: Tensor, keep: int, *, gradient: Tensor) -> Tensor:
    """The largest by −w·∂loss/∂w: weights that training would move away from zero.

    Source: Sanh et al. 2020, arXiv 2005.07683. There the score is summed up while the weights are trained; here it is that of
    the weights as they are, over one pass.
    """
    return top(-weight.double() * gradient, keep)


@asks("input_norms", "layer")
def wanda(weight: Tensor, keep: int, *, input_norms: Tensor, layer: Layer) -> Tensor:
    """The largest of each output by |w|·‖x‖. Every output keeps the same number of weights, to one.

    Source: Sun et al. 2024, arXiv 2306.11695. There each output rounds down; here the weights left over go to the outputs
    whose next weight scores highest, so that the count is exact.
    """
    scores = layer.as_matrix(weight.abs().double() * input_norms).reshape(-1, layer.columns)
    rows = len(scores)
    each, left = divmod(keep, rows)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    counts = torch.full((rows,), each, device=weight.device)
    if left:
        following = scores.gather(1, order[:, each : each + 1]).reshape(-1)
        counts += top(following, left)
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


@asks("layer")
def n_of_m(weight: Tensor, keep: int, *, layer: Layer, n: int = 2, m: int = 4) -> Tensor:
    """The `n` largest of every `m` weights next to each other along the input channels, by |w|; by name "2:4", "4:8", …

    2:4 is what sparse tensor cores take. The plan must ask for exactly n/m of the layer:
    `allocate(model, 1 - n / m, "uniform", exclude=...)`.

    Source: Mishra et al. 2021, arXiv 2104.08378.

    Raises:
        MethodError: the input channels are no multiple of m, or the plan asks for another count.
    """
    values = weight.abs().movedim(layer.input_dim, -1)
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
    keep_mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return keep_mask.reshape(values.shape).movedim(-1, layer.input_dim)


def of_torch(cls: Any) -> Method:
    """A class of torch.nn.utils.prune as a method: `prune.L1Unstructured`, `partial(prune.LnStructured, n=1, dim=0)`, or your own.

    It is made with amount= the number of weights to remove; a structured one with the number of channels along its `dim`, which
    must come out even.
    """

    @asks("layer")
    def method(weight: Tensor, keep: int, *, layer: Layer) -> Tensor:
        structured = getattr(cls, "func", cls).PRUNING_TYPE == "structured"
        pruner = cls(amount=weight.numel() - keep)
        if structured:
            channels = weight.shape[pruner.dim]
            each = weight.numel() // channels
            if keep % each:
                raise MethodError(
                    f"{type(pruner).__name__} removes whole channels of {each} weights of {layer.name!r}, and the plan keeps "
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
