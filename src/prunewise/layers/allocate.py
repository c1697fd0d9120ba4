"""`allocate`: one total sparsity in, a sparsity for each layer out. The one place that knows the importances by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.batch import Loss
from prunewise.core.errors import PlanError, SparsityError
from prunewise.core.sparsity import SparsityPlan
from prunewise.layers import allocators, ranking
from prunewise.layers import importance as imp
from prunewise.layers.allocators import Total, proportional
from prunewise.layers.statistics import INPUT, OUTPUT, SQUARES, LayerStatistics, gather
from prunewise.layers.weights import Choice, Layer, check_finite, find_layers

Importance = Callable[[nn.Module, Sequence[Layer]], Mapping[str, float]]
Allocator = Callable[[Total], dict[str, int]]


@dataclass(frozen=True)
class _Request:
    """What an importance may use."""

    name: str
    model: nn.Module
    layers: Sequence[Layer]
    data: Iterable[Any] | None
    loss: Loss | None
    shown: bool


def allocate(
    model: nn.Module,
    sparsity: float,
    importance: str | Importance = "capacity",
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    floor: float | None = None,
    include: Choice = None,
    exclude: Choice = None,
    progress: bool = True,
) -> SparsityPlan:
    """The sparsity of each layer, from how much each matters, such that one total is met to the weight.

    Counted are the weights of convolution and linear layers (`layers.weights.find_layers` says which), tied ones once,
    excluded ones not at all: the total is that of the layers in the plan.

    Args:
        model: any module; not changed. On the meta device too, for the importances that look at shapes only.
        sparsity: share of weights to remove over all layers, in [0, 1). At least one weight stays.
        importance: "capacity", the default: the split at which the layers together lose least, by what is left of each layer's
            energy, how far it moves the model's outputs, and how many directions it has (`ranking.by_capacity`). It
            needs `data`, without targets, and looks at the first 32 samples. Others by name (how: `layers.allocators`, `ranking`):
            - from shapes: "uniform"; "erk"; "params" (every layer as a whole is worth the same);
            - from weights: "lamp", "global_magnitude", "stable_rank", "alpha" (AlphaPruning);
            - from activations (needs `data`, a few hundred samples): "effective_rank" (how many directions of a layer's
              input and output are in use, for the weights it has; of more than 2,048 channels a sketch of 2,048), "rate"
              (log-det in place of the rank), "owl";
            - from gradients or losses (needs `data` with targets): "taylor", "fisher", "loss_increase";
            - or a callable from (model, layers) to {layer name: importance ≥ 0}: d_l = κ·importance, clipped.
        data: a loader of batches: (inputs, targets), inputs, or dicts.
        loss: loss(model, batch) → mean over the batch, or a criterion (an nn.Module of outputs and targets); default:
            cross-entropy, or the model's own `loss` for dicts.
        floor: least density of a layer, in [0, 1]. None: a tenth of the total density where densities are ours (that of a
            callable, too), none where an allocator is published.
        include, exclude: paths, shell patterns or a callable that select layers.
        progress: show how far the pass over the data is, on stderr.

    Raises:
        SparsityError: the total is outside [0, 1), or the floor cannot be met, or a callable's importances will not do.
        DataError: the importance needs data, the loader is empty, or a layer is never called.
        NonFiniteError: weights, activations or gradients are not finite; names the layer.
        PlanError: an unknown importance, or a name that fits no layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = allocate(model, 0.5, "erk")
        >>> dict(plan.keep), plan.sparsity
        ({'0': 13, '2': 11}, 0.5)
    """
    layers = find_layers(model, include, exclude)
    shapes = {layer.name: layer.shape for layer in layers}
    Total(shapes, sparsity, floor or 0.0)  # says what is wrong before any data is read
    return allocation(model, layers, importance, data, loss=loss, floor=floor, shown=progress)(sparsity)


def allocation(
    model: nn.Module,
    layers: Sequence[Layer],
    importance: str | Importance,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    floor: float | None = None,
    shown: bool = False,
) -> Callable[[float], SparsityPlan]:
    """`allocate` for as many totals as are wanted, measured once: a function from total sparsity to plan."""
    shapes = {layer.name: layer.shape for layer in layers}
    name = importance if isinstance(importance, str) else getattr(importance, "__name__", "custom")
    notes = {"importance": name}
    allocator: Allocator
    if callable(importance):
        check_finite(layers)
        given = importance(model, layers)
        if not isinstance(given, Mapping):
            raise SparsityError(
                f"importance {name!r} gave a {type(given).__name__}: it should give {{layer name: number}}"
            )
        allocator, ours = partial(proportional, given), True
    else:
        if not isinstance(importance, str) or (importance not in _PUBLISHED and importance not in _OURS):
            known = ", ".join((*_OURS, *_PUBLISHED))
            raise PlanError(f"unknown importance {importance!r}: use {known}, or a callable")
        if importance not in _FROM_SHAPES:
            _check_weights(layers, name)
        request = _Request(name, model, layers, data, loss, shown)
        ours = importance in _OURS
        with torch.inference_mode(False):  # what is summed up in it could not be changed outside
            allocator = _OURS[importance](request) if ours else _PUBLISHED[importance](request)

    def plan(sparsity: float) -> SparsityPlan:
        total = _total(shapes, sparsity, floor) if ours else Total(shapes, sparsity, floor or 0.0)
        return SparsityPlan(allocator(total), shapes, {**notes, "sparsity": repr(float(sparsity))})

    return plan


def _total(shapes: Mapping[str, tuple[int, ...]], sparsity: float, floor: float | None) -> Total:
    """The total with the floor asked for, or by default a tenth of the total density, where that can be."""
    if floor is not None:
        return Total(shapes, sparsity, floor)
    try:
        return Total(shapes, sparsity, (1 - sparsity) / 10)
    except SparsityError:  # fewer weights than layers
        return Total(shapes, sparsity)


def _check_weights(layers: Sequence[Layer], name: str) -> None:
    for layer in layers:
        if layer.parameter.is_meta:
            raise PlanError(
                f"importance {name!r} looks at the weight of {layer.name!r}, which is on the meta device: load the weights, or "
                f"take one of {', '.join(sorted(_FROM_SHAPES))}"
            )
    check_finite(layers)


def _statistics(request: _Request, *wanted: str) -> dict[str, LayerStatistics]:
    return gather(
        request.model, request.layers, request.data, wanted, what=f"importance {request.name!r}", shown=request.shown
    )


def _capacity(request: _Request) -> Allocator:
    """`by_capacity` with masses m = √(k·s): k directions that a layer has, s the outputs' sensitivity to it.

    The geometric mean of what m is at the two ends of `by_capacity`'s loss. Its exponents, and the share of removals anywhere, were
    chosen among some thirty candidates by accuracy after pruning: see benchmarks/README.md.
    """
    moved = imp.sensitivity(request.model, request.layers, request.data, shown=request.shown)
    costs = {
        x.name: ranking.capacity_costs(x.weight, math.sqrt(imp.directions(x) * moved[x.name])) for x in request.layers
    }
    return partial(ranking.among_highest, costs)


def _proportional(importances: Callable[[_Request], dict[str, float]]) -> Callable[[_Request], Allocator]:
    return lambda request: partial(proportional, importances(request))


def _by_covariance(request: _Request, measure: Callable[[Tensor], float]) -> dict[str, float]:
    found = _statistics(request, INPUT, OUTPUT)
    return {
        layer.name: imp.per_weight(
            measure(found[layer.name].input.covariance()), measure(found[layer.name].output.covariance()), layer
        )
        for layer in request.layers
    }


def _taylor(request: _Request) -> dict[str, float]:
    gradients = imp.mean_gradients(
        request.model, request.layers, request.data, loss=request.loss, what="importance 'taylor'", shown=request.shown
    )
    masses = {layer.name: imp.taylor_mass(gradients[layer.name], layer.weight) for layer in request.layers}
    return _for_each_weight(request, masses)


def _fisher(request: _Request) -> dict[str, float]:
    masses = imp.fisher_mass(request.model, request.layers, request.data, loss=request.loss, shown=request.shown)
    return _for_each_weight(request, masses)


def _loss_increase(request: _Request) -> dict[str, float]:
    rises = imp.loss_increase(request.model, request.layers, request.data, loss=request.loss, shown=request.shown)
    return _for_each_weight(request, rises)


def _for_each_weight(request: _Request, masses: Mapping[str, float]) -> dict[str, float]:
    """Masses of whole layers as densities: a layer keeps weights in proportion to its mass, whatever its size."""
    return {layer.name: masses[layer.name] / layer.size for layer in request.layers}


def _stable_rank(request: _Request) -> dict[str, float]:
    return {x.name: imp.freedom(imp.stable_rank(x.as_matrix(x.weight)), x) for x in request.layers}


def _owl(request: _Request) -> Allocator:
    found = _statistics(request, SQUARES)
    ratios = {}
    for layer in request.layers:
        squares = found[layer.name].squares
        assert squares is not None
        ratios[layer.name] = imp.outlier_ratio(layer.as_matrix(layer.weight), squares)
    return partial(allocators.owl, ratios)


def _alpha(request: _Request) -> Allocator:
    exponents = {x.name: imp.tail_exponent(x.by_position(x.weight)) for x in request.layers}
    return partial(allocators.alpha_pruning, exponents)


def _lamp(request: _Request) -> Allocator:
    scores = {x.name: ranking.lamp_scores(x.weight) for x in request.layers}
    return partial(ranking.among_highest, ranking.ascending(scores))


def _global_magnitude(request: _Request) -> Allocator:
    return partial(ranking.among_highest, ranking.ascending({x.name: x.weight.abs() for x in request.layers}))


_FROM_SHAPES = frozenset({"uniform", "erk", "params"})

# Allocators as published (up to what their docstrings say), which have no floor of their own.
_PUBLISHED: dict[str, Callable[[_Request], Allocator]] = {
    "uniform": lambda request: allocators.uniform,
    "erk": lambda request: allocators.erk,
    "lamp": _lamp,
    "global_magnitude": _global_magnitude,
    "owl": _owl,
    "alpha": _alpha,
}

# Ours: these have a floor by default.
_OURS: dict[str, Callable[[_Request], Allocator]] = {
    "capacity": _capacity,
    "effective_rank": _proportional(partial(_by_covariance, measure=imp.effective_rank)),
    "rate": _proportional(partial(_by_covariance, measure=imp.coding_rate)),
    "stable_rank": _proportional(_stable_rank),
    "params": _proportional(lambda request: {layer.name: 1 / layer.size for layer in request.layers}),
    "taylor": _proportional(_taylor),
    "fisher": _proportional(_fisher),
    "loss_increase": _proportional(_loss_increase),
}
