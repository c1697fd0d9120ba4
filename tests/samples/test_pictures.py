"""Pictures hold the numbers that they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import prunewise as pw
from tests.samples import hide_matplotlib
from tests.samples.test_suspects import scores_of

pytest.importorskip("matplotlib")
N = 50
SHARE = np.linspace(0, 1, N)
SEEN = np.where(np.arange(N) < 3, 0, 1000)
SCORES = scores_of(SHARE, observations=SEEN, hits=np.where(SEEN > 0, np.round(SHARE * 1000), 0).astype(int))


def test_the_data_map_has_a_point_a_sample() -> None:
    axes = pw.plot_data_map(SCORES)
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], SCORES.variability[3:])
    np.testing.assert_allclose(points[:, 1], SCORES.confidence[3:])
    np.testing.assert_allclose(axes.collections[0].get_array(), SCORES.learnability[3:])
    assert len(pw.plot_data_map(SCORES, max_points=10).collections[0].get_offsets()) == 10


def test_the_histogram_counts_all_samples_once() -> None:
    bars = pw.plot_histogram(SCORES, bins=7).patches
    assert len(bars) == 7 and sum(b.get_height() for b in bars) == N - 3
    labels = np.arange(N) % 3
    axes = pw.plot_histogram(SCORES, labels, by="confidence", bins=5)
    lines = axes.patches
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1", "2"]
    for label, line in enumerate(lines):
        expected = np.histogram(SCORES.confidence[(SEEN > 0) & (labels == label)], line.get_data().edges)[0]
        np.testing.assert_array_equal(line.get_data().values, expected)


def test_of_many_classes_the_hardest_are_drawn() -> None:
    labels = np.arange(N) // 2
    axes = pw.plot_histogram(SCORES, labels)
    assert axes.get_legend().get_title().get_text() == "hardest 10 of 24 classes"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [str(i) for i in range(1, 11)]


def test_the_area_of_a_point_is_how_many_samples_it_is() -> None:
    scores = scores_of(np.repeat([0.0, 0.5, 1.0], [1, 2, 100]))
    drawn = pw.plot_agreement(scores, scores).collections[0]
    np.testing.assert_allclose(drawn.get_offsets(), [[0, 0], [0.5, 0.5], [1, 1]])
    np.testing.assert_allclose(drawn.get_sizes(), [3, 4, 200])


def test_class_names_of_any_kind(tmp_path: Any) -> None:
    names = np.array(["_hidden", r"a $\frac$b"])[np.arange(N) % 2]
    axes = pw.plot_histogram(SCORES, names)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == sorted(set(names))
    axes.figure.savefig(tmp_path / "histogram.png")


def test_agreement_names_its_numbers(tmp_path: Any) -> None:
    axes = pw.plot_agreement(SCORES, SCORES, by="aum")
    assert axes.get_title().startswith("Pearson 1.000 [1.000, 1.000]") and axes.get_ylabel() == "aum, second run"
    assert len(axes.collections[0].get_offsets()) == N - 3
    axes.figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_axes_of_one_s_own() -> None:
    from matplotlib.figure import Figure

    own = Figure().subplots()
    assert pw.plot_histogram(SCORES, axes=own) is own


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pw.DataError, match="no score of difficulty"):
        pw.plot_histogram(SCORES, by="size")
    with pytest.raises(pw.DataError, match="one label a sample"):
        pw.plot_histogram(SCORES, np.zeros((N, 2)))
    with pytest.raises(pw.DataError, match="different samples"):
        pw.plot_agreement(SCORES, scores_of(SHARE[1:]))
    for wrong, message in (
        (lambda: pw.plot_data_map(None), "expected SampleScores"),  # type: ignore[arg-type]
        (lambda: pw.plot_histogram(None), "expected SampleScores"),  # type: ignore[arg-type]
        (lambda: pw.plot_histogram(SCORES, bins=-1), "bins=-1"),
        (lambda: pw.plot_data_map(SCORES, seed=-1), "seed=-1"),
        (lambda: pw.plot_data_map(SCORES, max_points=-1), "max_points=-1"),
    ):
        with pytest.raises(pw.DataError, match=message):
            wrong()
    hide_matplotlib(monkeypatch)
    with pytest.raises(pw.PrunewiseError, match="prunewise.plot."):
        pw.plot_data_map(SCORES)
