"""Agreement between runs, against scipy and loops."""

from __future__ import annotations

import tracemalloc
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import prunewise as pw
from prunewise.samples.agreement import ranks
from tests.samples.test_suspects import scores_of

N = 200


def runs(noise: float, count: int = 3, **given: Any) -> list[pw.SampleScores]:
    base = np.linspace(0, 1, N)
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        found.append(scores_of(np.clip(base + noise * random.normal(size=N), 0, 1), **given))
    return found


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    given = runs(0.1)
    found = pw.agreement(given, bootstrap=20)
    for i in range(3):
        for j in range(3):
            a, b = given[i].learnability, given[j].learnability
            assert found.pearson[i, j] == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-12)
            assert found.spearman[i, j] == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)
    assert found.samples == N and found.top == 20 and not found.noisy
    assert pw.agreement(given, top=np.float32(0.1), bootstrap=1).top == 20


def test_ranks_share_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).integers(5, size=40).astype(float)
    np.testing.assert_array_equal(ranks(values), stats.rankdata(values) - 1)


def test_the_hardest_in_common() -> None:
    a, b = np.zeros(10), np.zeros(10)
    a[[1, 2, 3]] = [3, 2, 1]
    b[[2, 3, 4]] = [3, 2, 1]
    given = [scores_of(1 - v / 3) for v in (a, b)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pw.agreement(given, top=3, bootstrap=5).top_overlap[0, 1] == pytest.approx(2 / 3)
        # one more place: seven tied samples share it
        assert pw.agreement([given[0], given[0]], top=4, bootstrap=5).top_overlap[0, 1] == pytest.approx(1)
        same = [scores_of(np.full(10, 0.5))] * 2
        found = pw.agreement(same, top=5, bootstrap=5)
    assert found.top_overlap[0, 1] == pytest.approx(1) and np.isnan(found.pearson[0, 1])


def test_intervals_hold_the_value_and_shrink_with_more_samples() -> None:
    found = pw.agreement(runs(0.15), bootstrap=100)
    for pair, e in found.pearson_intervals.items():
        assert e.low < e.value < e.high and e.value == found.pearson[pair] and e.high - e.low < 0.2
    again = pw.agreement(runs(0.15), bootstrap=100)
    assert again.pearson_intervals == found.pearson_intervals  # the seed decides
    assert found.table().count("\n") == 1 + 3


def test_one_resample_is_held_at_a_time() -> None:
    n, bootstrap = 10_000, 100
    given = [scores_of(np.linspace(0.1, 1, n))] * 2
    tracemalloc.start()
    try:
        pw.agreement(given, bootstrap=bootstrap)
        assert tracemalloc.get_traced_memory()[1] < 8 * n * bootstrap / 2
    finally:
        tracemalloc.stop()


def test_a_ranking_that_is_noise_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="mostly noise") as caught:
        found = pw.agreement(runs(5.0), bootstrap=30)
    assert caught[0].filename == __file__
    assert set(found.noisy) == {(0, 1), (0, 2), (1, 2)}
    lowest = min((0, 1), (0, 2), (1, 2), key=lambda pair: found.spearman[pair])
    assert f"{found.spearman_intervals[lowest]} (runs {lowest[0]}, {lowest[1]}), 3 of 3 pairs noisy" in repr(found)
    assert repr(found).startswith(
        f"Agreement of 3 runs on {found.samples:,} samples by 'learnability': lowest Spearman "
    )
    assert str(found) == repr(found) and len(repr(found)) < 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pw.agreement(runs(0.01), bootstrap=30)


def test_samples_that_a_run_never_saw_are_left_out() -> None:
    a, b = pw.LearnabilityRecorder(6), pw.LearnabilityRecorder(6)
    z = torch.tensor([[3.0, 0], [2, 0], [0, 1], [0, 0.5], [1, 0], [0, 3]])
    y = torch.zeros(6, dtype=torch.long)
    a.update(torch.arange(5), z[:5], y[:5])
    b.update(torch.arange(1, 6), z[1:], y[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pw.agreement([a.scores(), b.scores()], by="aum", bootstrap=10)
    assert found.samples == 4 and found.pearson[0, 1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pw.agreement(runs(0.1, 1)), "two or more"),
        (lambda: pw.agreement([1, 2]), "two or more"),
        (lambda: pw.agreement([*runs(0.1), scores_of(np.ones(N - 1))]), "scores 0 and 3 are of different samples"),
        (lambda: pw.agreement([scores_of(np.ones(5)), scores_of(np.ones(5), mode="clean")]), "different modes"),
        (
            lambda: pw.agreement([scores_of(np.ones(5), labels=np.zeros(5)), scores_of(np.ones(5), labels=np.ones(5))]),
            "different labels",
        ),
        (lambda: pw.agreement(runs(0.1), by="size"), "no score of difficulty"),
        (lambda: pw.agreement(runs(0.1), top=1.5), "top=1.5"),
        (lambda: pw.agreement(runs(0.1), top=0), "top=0"),
        (lambda: pw.agreement(runs(0.1), bootstrap=0), "bootstrap=0"),
        (lambda: pw.agreement(runs(0.1), bootstrap=True), "bootstrap=True"),
    ],
)
def test_what_cannot_be_compared(make: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        make()


def test_scores_of_any_scale_correlate() -> None:
    a, b = scores_of(np.linspace(0.1, 1, 50)), scores_of(np.linspace(0.1, 1, 50))
    a, b = (replace(s, loss=1e-7 * (np.arange(50.0) + 1)) for s in (a, b))
    assert pw.agreement([a, b], by="loss", bootstrap=5).pearson[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("given", [{"seed": -1}, {"by": ["aum"]}, {"scores": None}])
def test_settings_of_the_wrong_kind(given: dict[str, Any]) -> None:
    s = scores_of(np.linspace(0.1, 1, 50))
    with pytest.raises(pw.DataError):
        pw.agreement(**{"scores": [s, s], **given})
