"""How far several runs agree on which samples are hard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from prunewise.core.checks import is_count, is_number
from prunewise.core.errors import DataError
from prunewise.samples.checking import warn_caller
from prunewise.samples.scores import SampleScores

Floats = npt.NDArray[np.float64]
_TIED = 0.1  # share of samples with one score, from which on the rank correlation is of the others
_NOISY = 0.5  # two samples in different order agree three times in four at this rank correlation


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Agreement:
    """Agreement between R runs.

    Attributes:
        pearson, spearman: (R, R) float64, symmetric, ones on the diagonal; in [-1, 1], higher = more alike; NaN where a run gives
            all samples the same score.
        top_overlap: (R, R) float64 in [0, 1]; the share of the hardest samples (`top` of them) that two runs have in
            common. Samples tied at the border count by the share of them that belongs to the hardest. By chance it is
            `top` / samples.
        pearson_intervals, spearman_intervals, top_overlap_intervals: by pair (i, j), i < j: `Estimate`.
        by: the score compared. samples: how many were observed in all runs. top: how many are the hardest.
        noisy: the pairs whose Spearman interval reaches below 0.5: a ranking is mostly noise there.
    """

    pearson: Floats
    spearman: Floats
    top_overlap: Floats
    pearson_intervals: dict[tuple[int, int], Estimate]
    spearman_intervals: dict[tuple[int, int], Estimate]
    top_overlap_intervals: dict[tuple[int, int], Estimate]
    by: str
    samples: int
    top: int
    noisy: tuple[tuple[int, int], ...]

    def __repr__(self) -> str:
        lowest = min(self.spearman_intervals.items(), key=lambda item: item[1].value)
        return (
            f"Agreement of {len(self.pearson)} runs on {self.samples:,} samples by {self.by!r}: lowest Spearman {lowest[1]} "
            f"(runs {lowest[0][0]}, {lowest[0][1]}), {len(self.noisy)} of {len(self.spearman_intervals)} pairs noisy"
        )

    def table(self) -> str:
        """One line a pair, as Markdown."""
        lines = ["| runs | Pearson | Spearman | hardest in common |", "| --- | --- | --- | --- |"]
        for pair, pearson in self.pearson_intervals.items():
            rest = f"{self.spearman_intervals[pair]} | {self.top_overlap_intervals[pair]}"
            lines.append(f"| {pair[0]}, {pair[1]} | {pearson} | {rest} |")
        return "\n".join(lines)


def agreement(
    scores: Sequence[SampleScores],
    *,
    by: str = "learnability",
    top: float | int = 0.1,
    bootstrap: int = 200,
    seed: int = 0,
) -> Agreement:
    """Pearson, Spearman and top-k overlap between runs or architectures, with bootstrap intervals over samples.

    Compared are the samples that all runs observed. Runs of one architecture with different seeds are the ceiling: no other
    architecture can be expected to agree better than the same one with itself.

    Args:
        scores: two or more, of the same samples in the same order.
        by: a score: learnability, forgetting, aum, aum_softmax, el2n, confidence, loss.
        top: how many samples count as the hardest: a share in (0, 1) or a count.
        bootstrap: resamples for the 95 % intervals.
        seed: of the bootstrap.

    Warns:
        UserWarning: the rank correlation of a pair may be below 0.5.

    Raises:
        DataError: fewer than two, scores of different data sets or modes, or fewer than 3 samples in common.

    Example:
        >>> import torch
        >>> from prunewise import LearnabilityRecorder
        >>> runs = []
        >>> for _ in range(2):
        ...     recorder = LearnabilityRecorder(4)
        ...     for step in range(4):
        ...         recorder.update(torch.arange(4), torch.arange(4.0) - step, torch.ones(4))
        ...     runs.append(recorder.scores())
        >>> float(agreement(runs).spearman[0, 1])
        1.0
    """
    runs = list(scores) if isinstance(scores, Iterable) else []
    if len(runs) < 2 or not all(isinstance(s, SampleScores) for s in runs):
        raise DataError("agreement compares two or more SampleScores: give a list of them")
    for number, other in enumerate(runs[1:], 1):
        _require_same(runs[0], other, number)
    if not is_count(bootstrap, 1):
        raise DataError(f"bootstrap={bootstrap!r} should be a number of resamples, at least 1")
    if not is_count(seed):
        raise DataError(f"seed={seed!r} should be an int of at least 0")
    seen = np.logical_and.reduce([s.observations > 0 for s in runs])
    values = np.stack([s.difficulty(by)[seen] for s in runs])
    n = values.shape[1]
    if n < 3:
        raise DataError(f"{n} samples were observed in all runs: agreement needs at least 3")
    k = _count(top, n)
    size = len(runs)
    couples = list(combinations(range(size), 2))
    random = np.random.default_rng(seed)
    resampled = np.empty((bootstrap, len(couples), 3))
    for measures in resampled:  # one resample at a time: all of them are `bootstrap` times as many numbers as samples
        drawn = values[:, random.integers(n, size=n)]
        measures[:] = [_measures(drawn[i], drawn[j], k) for i, j in couples]
    matrices = [np.eye(size) for _ in range(3)]
    intervals: list[dict[tuple[int, int], Estimate]] = [{}, {}, {}]
    for at, (i, j) in enumerate(couples):
        measured = _measures(values[i], values[j], k)
        for which in range(3):
            matrices[which][i, j] = matrices[which][j, i] = measured[which]
            spread = resampled[:, at, which]
            spread = spread[np.isfinite(spread)]
            low, high = np.quantile(spread, [0.025, 0.975]) if len(spread) else (np.nan, np.nan)
            intervals[which][i, j] = Estimate(measured[which], float(low), float(high))
    noisy = tuple(pair for pair, e in intervals[1].items() if not e.low >= _NOISY)
    if noisy:
        pairs = ", ".join(f"{i} and {j} ({intervals[1][i, j]})" for i, j in noisy[:3])
        tied = max(_largest_tie(row) for row in values)
        ties = (
            f" (or ties: {tied:.0%} have the same score in a run, which by='aum' tells apart)" if tied > _TIED else ""
        )
        warn_caller(
            f"runs {pairs}: the rank correlation of {by!r} may be below {_NOISY}, so the order of samples is mostly noise{ties}: "
            "choose another score, average several seeds, or record more epochs"
        )
    pearson, spearman, overlap = matrices
    return Agreement(pearson, spearman, overlap, intervals[0], intervals[1], intervals[2], by, n, k, noisy)


def ranks(values: Floats) -> Floats:
    """Ranks from 0; ties share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[inverse], dtype=np.float64)


def _measures(a: Floats, b: Floats, k: int) -> tuple[float, float, float]:
    hardest = np.minimum(_membership(a, k), _membership(b, k)).sum() / k
    return _correlation(a, b), _correlation(ranks(a), ranks(b)), float(hardest)


def _largest_tie(values: Floats) -> float:
    """The share of the values that are all the same."""
    return float(np.unique(values, return_counts=True)[1].max() / len(values))


def _membership(values: Floats, k: int) -> Floats:
    """1 for the k highest values, 0 for the others; those tied at the border share what is left."""
    border = np.partition(values, len(values) - k)[len(values) - k]
    above, at = values > border, values == border
    return np.asarray(above + at * ((k - above.sum()) / at.sum()), dtype=np.float64)


def _correlation(a: Floats, b: Floats) -> float:
    if any(np.ptp(v) <= 1e-12 * np.abs(v).max() for v in (a, b)):  # constant, but for rounding
        return float("nan")
    a, b = (a - a.mean()) / np.ptp(a), (b - b.mean()) / np.ptp(b)
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _require_same(first: SampleScores, other: SampleScores, number: int) -> None:
    if len(first) != len(other) or not np.array_equal(first.sample_id, other.sample_id):
        raise DataError(
            f"scores 0 and {number} are of different samples ({len(first):,} and {len(other):,}): compare runs on one data set"
        )
    for key, what in (("label_hash", "labels"), ("mode", "modes (train or clean)")):
        a, b = first.info.get(key), other.info.get(key)
        if a is not None and b is not None and a != b:
            raise DataError(f"scores 0 and {number} are of different {what}: they cannot be compared")


def _count(top: float | int, n: int) -> int:
    count = max(1, round(float(top) * n)) if is_number(top) and 0 < top < 1 else top
    if not is_count(count, 1) or count > n:
        raise DataError(f"top={top!r} should be a share in (0, 1) or a count of at most {n:,} samples")
    return int(count)
