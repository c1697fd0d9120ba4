"""Learning curves of cohorts: against the trace by hand, and with ids, ties and names of all kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import prunewise as pw
from prunewise.samples.cohorts import cohort_curves

# hits of five samples, an observation a column; sample 3 was observed twice, sample 4 never
HITS = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0], []]
LABELS = torch.tensor([0, 1, 0, 1, 0])


def recorded(trace: int = 3, ids: Any = None) -> pw.LearnabilityRecorder:
    recorder = pw.LearnabilityRecorder(5, trace=trace, ids=ids)
    for epoch in range(3):
        batch = torch.tensor([i for i, row in enumerate(HITS) if epoch < len(row)])
        right = torch.tensor([HITS[i][epoch] for i in batch.tolist()])
        logits = torch.nn.functional.one_hot(torch.where(right == 1, LABELS[batch], 1 - LABELS[batch]), 2).float()
        recorder.update(batch, logits, LABELS[batch])
    return recorder


def test_quantile_groups_lowest_first() -> None:
    curves = cohort_curves(recorded(), 2)
    assert [(c.name, c.samples) for c in curves] == [("learnability 0 to 0.333", 2), ("learnability 0.667 to 1", 2)]
    np.testing.assert_array_equal(curves[0].share, [0, 0, 1])  # sample 3 has no third observation
    np.testing.assert_array_equal(curves[1].share, [0.5, 1, 1])
    assert len(cohort_curves(recorded(), 1)) == 1 and len(cohort_curves(recorded(), 100)) == 4


@pytest.mark.parametrize("common", [0, 1])
def test_equal_scores_stay_together_and_apart_from_others(common: int) -> None:
    """Most samples never hit, or always: the rest is still a cohort of its own."""
    recorder = pw.LearnabilityRecorder(20, trace=2)
    for epoch in range(2):
        right = torch.tensor([common] * 16 + [epoch] * 4)
        recorder.update(torch.arange(20), torch.nn.functional.one_hot(right, 2).float(), torch.ones(20).long())
    assert sorted(c.samples for c in cohort_curves(recorder, 4)) == [4, 16]


def test_cohorts_of_one_s_own_go_by_id() -> None:
    recorder = recorded(ids=["e", "d", "c", "b", "a"])
    curves = cohort_curves(recorder, {"first": ["d", "e", "d"], "last": ["b"], "unseen": ["a"]})
    assert [(c.name, c.samples) for c in curves] == [("first", 2), ("last", 1)]
    np.testing.assert_array_equal(curves[0].share, [0.5, 1, 1])
    np.testing.assert_array_equal(curves[1].share, [0, 0, np.nan])
    with pytest.raises(pw.DataError, match="sample id 'z' is none of the 5"):
        cohort_curves(recorder, {"first": ["z"]})


def test_triage_and_a_trace_shorter_than_the_training() -> None:
    recorder = recorded(trace=2)
    groups = pw.triage(recorder.scores(), LABELS)
    curves = cohort_curves(recorder, groups)
    assert sum(c.samples for c in curves) == 4 and {c.name for c in curves} <= {
        g for g, n in groups.counts().items() if n
    }
    assert all(c.share.shape == (2,) for c in curves)
    with pytest.raises(pw.DataError, match="triage is of other samples"):
        cohort_curves(recorded(ids=list("abcde")), groups)


def test_the_picture_holds_the_curves() -> None:
    pytest.importorskip("matplotlib")
    axes = pw.plot_cohorts(recorded(), {"$\\frac{$ _x": [0, 1], "late": [2]})
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 1, 1], [0, 0, 1]]
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["$\\frac{$ _x (2)", "late (1)"]
    axes.figure.canvas.draw()  # a name that is no formula is not read as one
    assert pw.plot_cohorts(recorded(), axes=axes) is axes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cohort_curves(recorded(trace=0)), "make it with trace="),
        (lambda: cohort_curves(pw.LearnabilityRecorder(3, trace=2)), "no observation"),
        (lambda: cohort_curves(recorded().scores()), "need a LearnabilityRecorder.*SampleScores"),  # type: ignore[arg-type]
        (lambda: cohort_curves(recorded(), 0), "cohorts=0"),
        (lambda: cohort_curves(recorded(), True), "cohorts=True"),
        (lambda: cohort_curves(recorded(), "hard"), "cohorts='hard'"),  # type: ignore[arg-type]
        (lambda: cohort_curves(recorded(), by="size"), "no score of difficulty"),
        (lambda: cohort_curves(recorded(), {"a": "0"}), "cohort 'a' is a str"),
        (lambda: cohort_curves(recorded(), {"a": [0.5]}), "no sample id"),
        (lambda: cohort_curves(recorded(), {"a": []}), "no cohort has an observed sample"),
        (lambda: cohort_curves(recorded(), {}), "no cohort has an observed sample"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        make()


def test_groups_that_differ_in_a_late_digit_are_told_apart() -> None:
    recorder = pw.LearnabilityRecorder(400, trace=1)
    z = torch.linspace(6.5, 7.6, 400)
    recorder.update(torch.arange(400), torch.stack([z, -z * 0], 1), torch.zeros(400, dtype=torch.long))
    curves = cohort_curves(recorder, 8, by="confidence")
    assert [curve.samples for curve in curves] == [50] * 8 and len({curve.name for curve in curves}) == 8
