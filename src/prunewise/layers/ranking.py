"""From the weights themselves and one total to the number of weights that each layer keeps: the highest scores of all layers.

Pure functions, like those of `layers.allocators`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunewise.core.errors import NonFiniteError, SparsityError
from prunewise.layers.allocators import Array, Total, positive


def by_score(scores: Mapping[str, Tensor], total: Total) -> dict[str, int]:
    """How many of each layer's weights are among the highest scores of all layers together.

    Ties at the threshold are shared between layers in proportion to how many each has (largest remainders), so that the
    order of layers does not matter. A floor keeps the highest scores of each layer before all others.

    Args:
        scores: a score ≥ 0 for every weight, any shape and float dtype, higher = keep.
        total: what all layers keep.

    Raises:
        NonFiniteError: a score is NaN.
        SparsityError: a layer has no scores, or not one for each weight.
    """
    return among_highest(ascending(scores), total)


def ascending(scores: Mapping[str, Tensor]) -> dict[str, Array]:
    """The scores of each layer, sorted, flat, float64: what `among_highest` takes, for as many totals as are wanted."""
    found = {}
    for name, values in scores.items():
        flat = values.detach().reshape(-1).to("cpu", torch.float64).numpy()
        if np.isnan(flat).any():
            raise NonFiniteError(f"the weight of {name!r} gives scores that are NaN: load a sound checkpoint")
        found[name] = np.sort(flat)
    return found


def among_highest(ranked: Mapping[str, Array], total: Total) -> dict[str, int]:
    """`by_score`, of scores that are sorted already."""
    rest, least = [], total.least
    for (name, shape), first in zip(total.shapes.items(), least.tolist(), strict=True):
        if len(ranked.get(name, ())) != math.prod(shape):
            raise SparsityError(f"layer {name!r}: {len(ranked.get(name, ()))} scores for {math.prod(shape)} weights")
        rest.append(ranked[name][: math.prod(shape) - first])  # the first to be kept anyway stand last
    need = total.keep - int(least.sum())
    if not need:
        return total.named(least)
    threshold = _highest([v for v in rest if len(v)], need)
    above = np.array([len(v) - np.searchsorted(v, threshold, "right") for v in rest])
    ties = np.array([len(v) - np.searchsorted(v, threshold, "left") for v in rest]) - above
    need -= int(above.sum())
    wanted = need * (ties / ties.sum())
    share = np.floor(wanted + 1e-9).astype(np.int64)
    order = np.argsort(share - wanted, kind="stable")
    open_ = order[(share < ties)[order]]
    share[open_[: need - int(share.sum())]] += 1
    return total.named(least + above + share)


def _highest(ranked: Sequence[Array], number: int) -> float:
    """The `number`-th highest of all values in some ascending arrays, without putting them together.

    Halves the range of floats that it lies in: read as integers (negative ones mirrored), floats are in the same order.
    """
    mirror = 2**63 - 1

    def to_place(value: float) -> int:
        place = int(np.float64(value).view(np.int64))
        return place if place >= 0 else -(place & mirror)

    def to_value(place: int) -> float:
        return float(np.int64(abs(place)).view(np.float64)) * (-1 if place < 0 else 1)

    low, high = to_place(min(v[0] for v in ranked)), to_place(max(v[-1] for v in ranked))
    while low < high:
        middle = (low + high + 1) // 2
        value = to_value(middle)
        if sum(len(v) - int(np.searchsorted(v, value)) for v in ranked) >= number:
            low = middle
        else:
            high = middle - 1
    return to_value(low)


# Which share of a removal is taken to hit any weight alike, rather than the smallest ones.
ANYWHERE = 0.05


def by_capacity(
    weights: Mapping[str, Tensor], masses: Mapping[str, float], total: Total, *, anywhere: float = ANYWHERE
) -> dict[str, int]:
    """How many weights each layer keeps where the sum of what all layers lose is least: Σ −m_l·log(1 − r_l) over layers.

    r_l is the share of its energy Σ w² that layer l loses. Where r is small the loss is m·r, which is what a first-order
    expansion of the outputs says, with m their sensitivity to the layer. Where r is near 1 it is that of a Gaussian channel: each
    of m directions loses ½ log 1/(1 − r) of its capacity, so that no layer that says anything is silenced. Removing the next
    smallest weight costs m_l·x / (what is left of the layer), x its share of the energy; this grows along a layer, so the
    least sum is reached by keeping the weights of highest cost in the whole network (water-filling).

    Masses all alike and removals of the smallest weights: LAMP. Removals anywhere (r = share of weights removed): densities in
    proportion to m_l / size, with m the inputs, outputs and kernel lengths: Erdős–Rényi-kernel. Pruning methods lie
    between: here a share `anywhere` of each removal counts as if it hit any weight alike.

    Source: ours; it has LAMP (Lee et al. 2021, arXiv 2010.07611) and ERK (Evci et al. 2020, arXiv 1911.11134) as its ends.

    Args:
        weights: the weights of each layer. Zeros cost nothing.
        masses: m_l ≥ 0 by layer; only their ratios count.
        total: what all layers keep.
        anywhere: in [0, 1].

    Raises:
        NonFiniteError: a weight is NaN, or a mass is not finite.
        SparsityError: a layer has no weights or no mass here, or a negative one.

    Example:
        >>> weights = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
        >>> by_capacity(weights, {"a": 1.0, "b": 3.0}, Total({"a": (2, 2), "b": (2, 2)}, sparsity=0.5))
        {'a': 1, 'b': 3}
    """
    positive(masses, total)
    return among_highest({name: capacity_costs(w, masses[name], anywhere) for name, w in weights.items()}, total)


def capacity_costs(weight: Tensor, mass: float, anywhere: float = ANYWHERE) -> Array:
    """What each weight of a layer costs when it is the next to go, ascending, flat, float64; see `by_capacity`."""
    flat = weight.detach().abs().reshape(-1)
    size = (flat if flat.dtype == torch.float64 else flat.float()).sort().values.to("cpu", torch.float64).numpy()
    if np.isnan(size).any():
        raise NonFiniteError("a weight is NaN: load a sound checkpoint")
    if not size.size or not size[-1]:
        return size
    energy = np.square(size / size[-1])
    alive = size > 0
    share = (1 - anywhere) * energy / energy.sum() + anywhere * alive / alive.sum()
    left = np.cumsum(share[::-1])[::-1]
    costs: Array = mass * share / left
    return costs


def global_magnitude(weights: Mapping[str, Tensor], total: Total) -> dict[str, int]:
    """How many weights of each layer are among the largest of the network by |w|.

    Source: Han et al. 2015, arXiv 1506.02626; the global form as in Blalock et al. 2020, arXiv 2003.03033.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
        >>> global_magnitude(weights, Total({"a": (2,), "b": (2,)}, sparsity=0.25))
        {'a': 1, 'b': 2}
    """
    return by_score({name: w.detach().abs() for name, w in weights.items()}, total)


def lamp(weights: Mapping[str, Tensor], total: Total) -> dict[str, int]:
    """How many weights of each layer are among the highest LAMP scores of the network.

    The score of a weight is its square over the sum of squares of all weights of its layer that are not smaller.

    Source: Lee et al. 2021, arXiv 2010.07611, equation 2. The largest weight of every layer has score 1, so no layer is
    emptied while there are as many weights to keep as layers; among equal weights the order is that of the tensor. A layer of
    zeros has scores 0.
    """
    return by_score({name: lamp_scores(w) for name, w in weights.items()}, total)


def lamp_scores(weight: Tensor) -> Tensor:
    """LAMP score of each weight, the weight's shape, float64, in [0, 1]."""
    squares = weight.detach().double().reshape(-1)
    largest = squares.abs().max()
    squares = (squares / largest if largest > 0 else squares).square()  # the ratio does not depend on the scale
    order = torch.argsort(squares, stable=True)
    ranked = squares[order]
    behind = ranked.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = torch.where(behind == 0, torch.zeros_like(behind), ranked / behind)
    return scores.reshape(weight.shape)
