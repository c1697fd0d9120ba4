"""From importances or shapes and one total to the number of weights that each layer keeps.

Pure functions. Each takes a `Total` (what all layers together keep) and gives {layer: kept weights}, whose sum is that
number to the weight. Where a published rule misses its own total, the docstring says what differs here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt
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
    alpha = positive(importances, total)
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


def positive(given: Mapping[str, float], total: Total) -> Array:
    """One number a layer, shape (L,); an error of ours names the layer that has none, or one that is negative or not finite."""
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
