"""From importances, shapes or weights and one total to the number of weights that each layer keeps.

Pure functions. Each takes a `Total` (what all layers together keep) and gives {layer: kept weights}, whose sum is that
number to the weight. Where a published rule misses its own total, the docstring says what differs here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunewise.core.errors import NonFiniteError, SparsityError

Array = npt.NDArray[np.float64]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Total:
    """What all layers together may keep.

    Attributes:
        shapes: the shape of each layer's weight.
        sparsity: share of all weights removed, in [0, 1).
        floor: least density of a layer, in [0, 1]; a floor above 0 keeps at least one weight of each.
    """

    shapes: Shapes
    sparsity: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        given: tuple[object, object] = self.sparsity, self.floor  # NumPy's numbers are welcome, text is not
        if not isinstance(given[0], Real) or not 0 <= float(given[0]) < 1:
            raise SparsityError(f"sparsity={self.sparsity!r} should be a share of weights removed, in [0, 1)")
        if not isinstance(given[1], Real) or not 0 <= float(given[1]) <= 1:
            raise SparsityError(f"floor={self.floor!r} should be a density, in [0, 1]")
        if not self.shapes or not self.sizes.all():
            raise SparsityError("there is no layer to allocate to, or one without weights")
        if self.least.sum() > self.keep:
            raise SparsityError(
                f"floor={self.floor} keeps {int(self.least.sum()):,} weights and sparsity={self.sparsity} allows only "
                f"{self.keep:,}: lower one of them"
            )

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Weights of each layer, shape (L,)."""
        return np.array([math.prod(shape) for shape in self.shapes.values()], dtype=np.int64)

    @property
    def keep(self) -> int:
        """Weights to keep over all layers: (1 − sparsity) of all, to the nearest weight, and at least one."""
        return max(1, math.floor((1 - float(self.sparsity)) * int(self.sizes.sum()) + 0.5))

    @property
    def least(self) -> npt.NDArray[np.int64]:
        """Fewest weights that each layer keeps, shape (L,)."""
        least: npt.NDArray[np.int64] = np.ceil(self.floor * self.sizes - 1e-9).astype(np.int64)
        return least

    def named(self, counts: npt.NDArray[np.int64]) -> dict[str, int]:
        """Counts by layer."""
        return dict(zip(self.shapes, counts.tolist(), strict=True))


# -- by importance ------------------------------------------------------------------------------------------------


def proportional(importances: Mapping[str, float], total: Total) -> dict[str, int]:
    """Densities in proportion to importances: d_l = κ·α_l, clipped to [floor, 1], with κ such that the total is met.

    The counts depend on the ratios of the importances only. Layers of importance 0 keep the floor, and get more (all
    the same density) only when every other layer is whole. Rounding is by largest remainders; ties go to earlier layers.

    Args:
        importances: α_l ≥ 0 by layer.
        total: what all layers keep.

    Raises:
        SparsityError: a layer has no importance, or a negative one.
        NonFiniteError: an importance is NaN or infinite.

    Example:
        >>> total = Total({"a": (10, 10), "b": (20, 10)}, sparsity=0.5)
        >>> proportional({"a": 3, "b": 1}, total)
        {'a': 90, 'b': 60}
    """
    alpha = _positive(importances, total)
    # Ratios, to twelve digits: another unit of the importances must not tip a remainder.
    alpha = _digits(alpha / alpha.max()) if alpha.max() > 0 else alpha
    return total.named(_counts(_densities(np.zeros(len(alpha)), alpha, total), total))


def uniform(total: Total) -> dict[str, int]:
    """The same density for every layer.

    Example:
        >>> uniform(Total({"a": (10,), "b": (30,)}, sparsity=0.8))
        {'a': 2, 'b': 6}
    """
    return proportional(dict.fromkeys(total.shapes, 1.0), total)


def erk(total: Total) -> dict[str, int]:
    """Erdős–Rényi kernel: d_l in proportion to Σ dims / Π dims of the weight's shape.

    Source: Evci et al. 2020, arXiv 1911.11134 (RigL), section 3. There a layer that would exceed density 1 is made dense
    and the rest solved again, as here; ours also rounds to the exact total and knows a floor.

    Example:
        >>> erk(Total({"a": (10, 10), "b": (100, 100)}, sparsity=0.9))
        {'a': 92, 'b': 918}
    """
    return proportional({n: sum(shape) / math.prod(shape) for n, shape in total.shapes.items()}, total)


def owl(outlier_ratios: Mapping[str, float], total: Total, *, spread: float = 0.08) -> dict[str, int]:
    """Densities shifted by the outlier ratios: d_l = c + 2·spread·(D_l − min D) / (max D − min D).

    Source: Yin et al. 2024, arXiv 2310.05175 (OWL), whose λ is `spread`. There c makes the mean over layers meet the
    target, so that layers of different sizes miss the total, and nothing is clipped; one ratio holds for a transformer block. Here
    c meets the total counted in weights, densities are clipped to [floor, 1] and c solved again, and each layer has
    its own ratio. All ratios alike: uniform.

    Args:
        outlier_ratios: D_l by layer, higher = denser; `importance.outlier_ratio` gives them.
        total: what all layers keep.
        spread: half of the largest difference of densities.

    Raises:
        SparsityError, NonFiniteError: as `proportional` does (but ratios may have any sign).
    """
    ratio = _unit(_values(outlier_ratios, total))
    return total.named(_counts(_densities(2 * spread * ratio, np.ones(len(ratio)), total), total))


def alpha_pruning(exponents: Mapping[str, float], total: Total, *, spread: float = 0.3) -> dict[str, int]:
    """Sparsities in proportion to a linear map of the heavy-tail exponents to [1 − spread, 1 + spread].

    A heavier tail (lower exponent) marks a layer that has learnt more, which keeps more.

    Source: Lu et al. 2024, arXiv 2410.10912 (AlphaPruning), and the authors' code (haiquanlu/AlphaPruning), whose epsilon is
    `spread`: 0.3 in their scripts for Llama at 70 % by magnitude, 0.2 with Wanda and SparseGPT and in their example for image
    classifiers. As there, one factor on all sparsities meets the total counted in weights. There sparsities above 1 are not
    clipped, and for language models one mean exponent holds for a block; here they are clipped to [0, 1 − floor] and
    solved again, and each layer has its own. A layer whose exponent is undefined (NaN) counts as the mean of the others.

    Raises:
        SparsityError: a layer has no exponent.
        NonFiniteError: an exponent is infinite.
    """
    alpha = _values(exponents, total, nan_ok=True)
    known = ~np.isnan(alpha)
    alpha = np.where(known, alpha, alpha[known].mean() if known.any() else 1.0)
    slope = 1 - spread + 2 * spread * _unit(alpha)
    if np.ptp(alpha) == 0:
        slope[:] = 1.0
    # d = 1 − η·slope: falls with η, so the level is −η.
    return total.named(_counts(_densities(np.ones(len(alpha)), slope, total), total))


def _positive(given: Mapping[str, float], total: Total) -> Array:
    values = _values(given, total)
    if (values < 0).any():
        name = list(total.shapes)[int(np.argmin(values))]
        raise SparsityError(f"the importance of {name!r} is negative ({values.min():g}): importances should be ≥ 0")
    return values


def _values(given: Mapping[str, float], total: Total, nan_ok: bool = False) -> Array:
    for name in total.shapes:
        if name not in given:
            raise SparsityError(f"layer {name!r} has no importance: give one for each of {', '.join(total.shapes)}")
        if not _is_number(given[name]):
            raise SparsityError(f"the importance of {name!r} should be a number, and is {given[name]!r:.80}")
        if not (math.isfinite(given[name]) or (nan_ok and math.isnan(given[name]))):
            raise NonFiniteError(
                f"the importance of layer {name!r} is {given[name]}: look at its weights and the data, or give exclude="
            )
    return np.array([float(given[name]) for name in total.shapes])


def _is_number(value: object) -> bool:
    """True for Python's and NumPy's real numbers, and for a tensor or array of one."""
    if isinstance(value, (Tensor, np.ndarray)):
        return math.prod(value.shape) == 1 and not isinstance(value.item(), complex)
    return isinstance(value, Real)


def _unit(values: Array) -> Array:
    """A linear map to [0, 1]; all 0 where the values are alike. Halved first, so that no difference overflows."""
    half = values / 2
    width = np.ptp(half)
    return _digits((half - half.min()) / width) if width > 0 else np.zeros(len(values))


def _digits(values: Array) -> Array:
    """Numbers in [0, 1] to twelve significant digits; below 1e-100 they are 0."""
    return np.array([float(f"{v:.12g}") if v >= 1e-100 else 0.0 for v in values])


def _densities(start: Array, slope: Array, total: Total) -> Array:
    """D = clip(start + t·slope, least, 1) with t such that Σ size·d is the total; slope ≥ 0, shape (L,).

    The sum is piecewise linear in t and does not fall: the piece is found among its corners, then solved exactly.
    Layers without a slope share, at one density, what the others cannot take.
    """
    size = total.sizes.astype(np.float64)
    low = total.least / size
    moves = slope > 0

    def at(level: float) -> Array:
        return np.clip(start + np.where(moves, level * slope, 0.0), low, 1.0)

    held = np.clip(start, low, 1.0)  # where nothing moves, the start itself
    if moves.any():
        corners = np.unique(np.concatenate([(low - start)[moves] / slope[moves], (1 - start)[moves] / slope[moves]]))
        sums = np.array([float(size @ at(t)) for t in corners])
        if sums[0] <= total.keep <= sums[-1]:
            upper = int(np.searchsorted(sums, total.keep))
            if upper == 0:
                return at(corners[0])
            left, right = corners[upper - 1], corners[upper]
            share = (total.keep - sums[upper - 1]) / (sums[upper] - sums[upper - 1])
            between: Array = at(left) + share * (at(right) - at(left))
            return between
        held = at(corners[0] if total.keep < sums[0] else corners[-1])
    rest = ~moves
    if moves.any() and not rest.any():
        return held
    # What moves has reached its end: the others meet the total at one density, within their own limits.
    held[rest] = _one_density(size[rest], low[rest], total.keep - float(size[moves] @ held[moves]))
    return held


def _one_density(size: Array, low: Array, keep: float) -> Array:
    """max(t, low) with t such that Σ size·d = keep."""
    corners = np.unique(np.concatenate([low, [0.0, 1.0]]))
    sums = np.array([float(size @ np.maximum(t, low)) for t in corners])
    densities: Array = np.maximum(np.interp(keep, sums, corners), low)
    return densities


def _counts(densities: Array, total: Total) -> npt.NDArray[np.int64]:
    """Whole weights by largest remainders, to the exact total, within the limits of each layer."""
    wanted = np.round(densities * total.sizes, 6)
    counts = np.clip(np.floor(wanted).astype(np.int64), total.least, total.sizes)
    missing = total.keep - int(counts.sum())
    while missing:  # one round nearly always: rounding leaves at most one weight a layer
        step = 1 if missing > 0 else -1
        room = counts < total.sizes if step > 0 else counts > total.least
        order = np.argsort(-step * (wanted - counts), kind="stable")
        chosen = order[room[order]][: abs(missing)]
        counts[chosen] += step
        missing -= step * len(chosen)
    return counts


# -- by the weights themselves ------------------------------------------------------------------------------------


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
    """The `number`-th highest of all values in some ascending arrays; some twenty times as fast as a partition.

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
    _positive(masses, total)
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
