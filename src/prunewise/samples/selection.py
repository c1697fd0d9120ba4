"""What each sample is good for, and which ones to keep for a share of the data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prunewise.core.checks import is_count, is_number
from prunewise.core.errors import DataError
from prunewise.samples.checking import array_of
from prunewise.samples.scores import Floats, Ints, SampleScores, require_scores
from prunewise.samples.suspecting import Suspects, suspects

GROUPS = ("easy", "ambiguous", "hard", "suspect", "redundant", "unseen")
STRATEGIES = ("difficulty", "coverage", "random")


@dataclass(frozen=True, eq=False)
class Triage:
    """The group of each sample.

    Attributes:
        sample_id: (N,). group: (N,) strings out of `GROUPS`.
    """

    sample_id: npt.NDArray[Any]
    group: npt.NDArray[np.str_]

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} {group}" for group, count in self.counts().items() if count)
        return f"Triage of {len(self.group):,} samples: {counts or 'none'}"

    def numbers(self, group: str) -> Ints:
        """The dense numbers of the samples in a group, ascending."""
        if group not in GROUPS:
            raise DataError(f"{group!r} is no group: choose one of {', '.join(GROUPS)}")
        return np.flatnonzero(self.group == group)

    def counts(self) -> dict[str, int]:
        """How many samples are in each group."""
        found = Counter(self.group.tolist())
        return {group: found[group] for group in GROUPS}


def triage(scores: SampleScores, targets: Any, *, ambiguous: float = 0.33) -> Triage:
    """Sort samples into groups; the first that fits, in this order, is a sample's.

    unseen: never observed. suspect: its label is likely wrong (`suspects`). hard: missed more often than not. redundant: right at
    every observation, the first too. ambiguous: among the `ambiguous` share of samples (of those observed) with the highest
    variability of confidence, which is the region that data maps train on (Swayamdipta et al. 2020, arXiv 2009.10795: a
    third). easy: the others. The cuts are ours.

    Raises:
        DataError: labels of another data set; `ambiguous` is no share in [0, 1].
    """
    if not (is_number(ambiguous) and 0 <= ambiguous <= 1):
        raise DataError(f"ambiguous={ambiguous!r} should be a share in [0, 1]")
    found = suspects(scores, targets)
    seen = scores.observations > 0
    group = np.full(len(scores), "easy", dtype="<U9")
    count = round(ambiguous * int(seen.sum()))
    by_spread = np.argsort(np.where(seen, -scores.variability, np.inf), kind="stable")
    group[by_spread[:count]] = "ambiguous"
    group[seen & (scores.hits == scores.observations)] = "redundant"
    group[seen & (scores.learnability < 0.5)] = "hard"
    group[found.number] = "suspect"
    group[~seen] = "unseen"
    return Triage(scores.sample_id, group)


def select_subset(
    scores: SampleScores,
    fraction: float,
    *,
    strategy: str = "coverage",
    by: str = "aum",
    keep: str = "hard",
    drop_hardest: float = 0.1,
    strata: int = 50,
    without: Any = (),
    seed: int = 0,
) -> Ints:
    """Numbers of the samples to keep, ascending: `round(fraction · N)` of them, at least one; fewer only by `without`.

    Strategies:
        difficulty: the hardest (`keep="hard"`) or the easiest samples by a score. Good for large fractions; below some 50 % the
            hardest alone are worse than random ones.
        coverage: coverage-centric selection (Zheng et al. 2022, arXiv 2210.15809): the hardest `drop_hardest` of all samples go,
            the others are sorted into `strata` of equal width in the score, and all strata give the same number, or all they have.
        random: the control that any other strategy has to beat.

    Args:
        scores: all N samples observed, but for "random".
        fraction: in (0, 1].
        strategy, by, keep, drop_hardest, strata: see above. Where fewer samples than asked for are left, fewer are dropped.
        without: samples that are out of the question: what `suspects(scores, labels)` found, their numbers, or a mask (N,) bool.
            All others are kept where they are fewer than asked for.
        seed: of the random choice; ties of difficulty are broken by it too.

    Raises:
        DataError: a setting out of range; samples that were never observed; nothing is left.

    Example:
        >>> import torch
        >>> from prunewise import LearnabilityRecorder
        >>> recorder = LearnabilityRecorder(4)
        >>> recorder.update(torch.arange(4), torch.tensor([3.0, -1.0, 2.0, 1.0]), torch.ones(4))
        >>> select_subset(recorder.scores(), 0.5, strategy="difficulty")
        array([1, 3])
    """
    if not (is_number(fraction) and 0 < fraction <= 1):
        raise DataError(f"fraction={fraction!r} should be a share in (0, 1]")
    if strategy not in STRATEGIES:
        raise DataError(f"strategy={strategy!r} should be one of {', '.join(STRATEGIES)}")
    if keep not in ("hard", "easy"):
        raise DataError(f"keep={keep!r} should be 'hard' or 'easy'")
    if not (is_number(drop_hardest) and 0 <= drop_hardest < 1) or not is_count(strata, 1) or not is_count(seed):
        raise DataError(
            f"drop_hardest={drop_hardest!r} should be in [0, 1), strata={strata!r} an int of at least 1, and seed={seed!r} one of "
            "at least 0"
        )
    require_scores(scores)
    n, fraction = len(scores), float(fraction)
    random = np.random.default_rng(seed)
    order = random.permutation(n)
    order = order[_wanted(without, n)[order]]
    count = min(max(1, round(fraction * n)), len(order))
    if strategy == "random":
        return np.sort(order[:count])
    difficulty = observed_difficulty(scores, by)
    # a stable sort of shuffled samples: ties come in random order
    easy_first = order[np.argsort(difficulty[order], kind="stable")]
    if strategy == "difficulty":
        return np.sort(easy_first[-count:] if keep == "hard" else easy_first[:count])
    left = easy_first[: max(count, len(order) - int(drop_hardest * n))]
    return np.sort(_stratified(left, difficulty, count, strata, random))


def _wanted(without: Any, n: int) -> npt.NDArray[np.bool_]:
    """(N,): which samples may be kept."""
    if isinstance(without, Suspects):
        if len(without.all_scores) != n:
            raise DataError(
                f"without= are suspects among {len(without.all_scores):,} samples, and the scores are of {n:,}"
            )
        without = without.number
    allowed = f"numbers of samples, from 0 to {n - 1}, or be what suspects() found"
    numbers = array_of(without, "the samples of without=", f"it should hold {allowed}")
    if numbers.dtype == bool and numbers.shape == (n,):
        numbers = np.flatnonzero(numbers)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= n):
        raise DataError(f"without={str(without)[:80]} should hold {allowed}")
    wanted = np.ones(n, bool)
    wanted[numbers.astype(np.int64)] = False
    if not wanted.any():
        raise DataError(f"without= names all {n:,} samples: nothing is left")
    return wanted


def observed_difficulty(scores: SampleScores, by: str) -> Floats:
    """The score `by`, higher = harder; `DataError` where a sample was never observed."""
    require_scores(scores)
    difficulty = scores.difficulty(by)
    missing = int(np.isnan(difficulty).sum())
    if missing:
        raise DataError(
            f"{missing:,} of {len(scores):,} samples were never observed, so they have no {by}: record a full epoch first"
        )
    return difficulty


def _stratified(left: Ints, difficulty: Floats, count: int, strata: int, random: np.random.Generator) -> Ints:
    """`count` of the samples `left`, as evenly from strata of equal width as their sizes allow."""
    values = difficulty[left]
    edges = np.linspace(values.min(), values.max(), strata + 1)
    stratum = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, strata - 1)
    members = [left[stratum == s] for s in range(strata)]
    members = sorted((m for m in members if len(m)), key=len)
    chosen = []
    for at, group in enumerate(members):  # the smallest first: what it lacks, the larger ones give
        share = count // (len(members) - at)
        taken = random.permutation(group)[:share]
        count -= len(taken)
        chosen.append(taken)
    return np.concatenate(chosen)
