"""Groups of samples, and how well each is hit as the training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from prunewise.core.checks import is_count
from prunewise.core.errors import DataError
from prunewise.samples.checking import kind_of
from prunewise.samples.recorder import LearnabilityRecorder
from prunewise.samples.scores import DIRECTION, Floats, Ints, SampleScores
from prunewise.samples.selection import GROUPS, Triage


class Curve(NamedTuple):
    """One cohort's learning curve.

    Attributes:
        name: of the cohort.
        samples: how many observed samples it has.
        share: (E,) float64 in [0, 1]; the share of hits at a sample's first, second, ... E-th observation, over the
            samples that have so many; NaN where none has.
    """

    name: str
    samples: int
    share: Floats


def cohort_curves(
    recorder: LearnabilityRecorder,
    cohorts: int | Triage | Mapping[str, Iterable[Any]] = 4,
    *,
    by: str = "learnability",
) -> list[Curve]:
    """The learning curve of each cohort: the numbers that `plot_cohorts` draws. E is at most the recorder's `trace`.

    Args:
        recorder: made with `trace=`, the number of observations to keep.
        cohorts: how many quantile groups of the score `by`, lowest first, equal scores in one group; or the groups of a
            `triage`; or the sample ids of each cohort by name. Cohorts without an observed sample are left out.
        by: a score, for quantile groups.

    Raises:
        DataError: the recorder has no trace or no observation; ids that it does not know; a triage of other samples; no
            cohort with an observed sample.

    Example:
        >>> import torch
        >>> recorder = LearnabilityRecorder(4, trace=3)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> for epoch in range(3):
        ...     recorder.update(torch.arange(4), torch.tensor([[2.0, epoch]]).repeat(4, 1), labels)
        >>> for name, samples, share in cohort_curves(recorder, {"zeros": [0, 1], "ones": [2, 3]}):
        ...     print(name, samples, share)
        zeros 2 [1. 1. 0.]
        ones 2 [0. 0. 0.]
    """
    if not isinstance(recorder, LearnabilityRecorder):
        raise DataError(f"learning curves need a LearnabilityRecorder made with trace=; got {kind_of(recorder)}")
    hits = recorder.trace()[0]
    scores = recorder.scores()
    length = min(hits.shape[1], int(scores.observations.max()))
    hits = hits[:, :length]
    traced = np.arange(length) < scores.observations[:, None]
    curves = []
    for name, numbers in _members(cohorts, scores, recorder, by).items():
        seen = traced[numbers].sum(0)
        if length and seen[0]:
            # a trace is False beyond a sample's observations, so its hits need no mask
            share = np.divide(hits[numbers].sum(0), seen, out=np.full(length, np.nan), where=seen > 0)
            curves.append(Curve(name, int(seen[0]), share))
    if not curves:
        raise DataError("no cohort has an observed sample: name ids of samples that were recorded")
    return curves


def _members(cohorts: Any, scores: SampleScores, recorder: LearnabilityRecorder, by: str) -> dict[str, Ints]:
    """The dense numbers of each cohort's samples, ascending, by the cohort's name."""
    if is_count(cohorts) and cohorts >= 1:
        return _quantiles(scores, cohorts, by)
    if isinstance(cohorts, Triage):
        if not np.array_equal(cohorts.sample_id, scores.sample_id):
            raise DataError("the triage is of other samples than the recorder's: make it from recorder.scores()")
        return {group: cohorts.numbers(group) for group in GROUPS}
    if isinstance(cohorts, Mapping):
        return {str(name): _numbers(name, ids, recorder) for name, ids in cohorts.items()}
    raise DataError(
        f"cohorts={cohorts!r:.80} should be a number of quantile groups, a Triage, or sample ids by cohort name"
    )


def _numbers(name: Any, ids: Any, recorder: LearnabilityRecorder) -> Ints:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise DataError(f"cohort {name!r:.80} is {kind_of(ids)}: give its sample ids, as a list")
    return np.unique(np.asarray([recorder.index.number(i) for i in ids], dtype=np.int64))


def _quantiles(scores: SampleScores, count: int, by: str) -> dict[str, Ints]:
    values = scores.difficulty(by) * DIRECTION[by]
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return {}
    # By the middle rank of all equal values, so that equals stay together wherever they pile up.
    distinct, which, sizes = np.unique(values[known], return_inverse=True, return_counts=True)
    middle = (np.cumsum(sizes) - sizes / 2) / len(known)
    group = np.floor(middle * count).astype(np.int64)
    groups = [int(number) for number in np.unique(group)]
    edges = [(distinct[group == number][0], distinct[group == number][-1]) for number in groups]
    for digits in range(3, 18):  # as many as tell the groups apart
        shown = [[f"{edge:.{digits}g}" for edge in pair] for pair in edges]
        names = [f"{by} {low}" if low == high else f"{by} {low} to {high}" for low, high in shown]
        if len(set(names)) == len(names):
            break
    return {name: known[group[which] == number] for name, number in zip(names, groups, strict=True)}
