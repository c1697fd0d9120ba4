"""Pictures of the scores; each needs the extra `plot` and returns matplotlib Axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from prunewise.core.checks import is_count
from prunewise.core.errors import DataError, PrunewiseError
from prunewise.samples.agreement import agreement
from prunewise.samples.checking import require
from prunewise.samples.cohorts import cohort_curves
from prunewise.samples.recorder import LearnabilityRecorder
from prunewise.samples.scores import SampleScores, require_difficulty, require_scores
from prunewise.samples.selection import Triage

_MOST_CLASSES = 10  # as many colours as are told apart
_POINT, _SMALLEST, _LARGEST = 4.0, 3.0, 200.0  # areas in points²: of one sample, and what can be seen


def plot_data_map(scores: SampleScores, *, axes: Any = None, max_points: int = 20_000, seed: int = 0) -> Any:
    """The data map: variability against confidence, a point a sample, coloured by learnability (Swayamdipta et al. 2020).

    Left and high are easy samples, left and low hard (or mislabelled) ones, right the ambiguous ones.

    Args:
        scores: samples never observed are left out.
        axes: where to draw; default: a new figure.
        max_points: more samples than this are thinned out at random.
        seed: of the thinning.

    Raises:
        DataError: no scores; a setting out of range.
    """
    require_scores(scores)
    require(is_count(max_points, 1), f"max_points={max_points!r} should be an int of at least 1")
    require(is_count(seed), f"seed={seed!r} should be an int of at least 0")
    axes = _axes(axes)
    seen = np.flatnonzero(scores.observations > 0)
    if len(seen) > max_points:
        seen = np.sort(np.random.default_rng(seed).permutation(seen)[:max_points])
    drawn = axes.scatter(
        scores.variability[seen],
        scores.confidence[seen],
        c=scores.learnability[seen],
        s=6,
        cmap="viridis",
        vmin=0,
        vmax=1,
    )
    axes.figure.colorbar(drawn, ax=axes, label="learnability")
    title = f"{_named(scores, 'data map')}: {len(seen):,} samples"
    axes.set(xlabel="variability", ylabel="confidence", xlim=(0, 0.5), ylim=(0, 1))
    axes.set_title(title, parse_math=False)
    return axes


def plot_histogram(
    scores: SampleScores, targets: Any = None, *, by: str = "learnability", bins: int = 20, axes: Any = None
) -> Any:
    """How many samples have which score; one line a class where labels are given, else bars.

    Of more than ten classes those ten are drawn that are the hardest in the mean.

    Raises:
        DataError: no scores; labels of another data set, or not one a sample; a setting out of range.
    """
    require_scores(scores)
    require_difficulty(by)
    require(is_count(bins, 1), f"bins={bins!r} should be an int of at least 1")
    axes = _axes(axes)
    values, seen = getattr(scores, by), scores.observations > 0
    edges = np.histogram_bin_edges(values[seen], bins)
    if targets is None:
        axes.hist(values[seen], edges)
    else:
        labels = scores.check_targets(targets)
        if labels.ndim != 1:
            raise DataError(f"labels of shape {labels.shape}: the histogram by class takes one label a sample")
        classes = np.unique(labels[seen])
        title = "class"
        if len(classes) > _MOST_CLASSES:
            difficulty = scores.difficulty(by)
            means = np.array([difficulty[seen & (labels == label)].mean() for label in classes])
            title = f"hardest {_MOST_CLASSES} of {len(classes)} classes"
            classes = classes[np.argsort(-means, kind="stable")[:_MOST_CLASSES]]
        steps = [axes.stairs(np.histogram(values[seen & (labels == label)], edges)[0], edges) for label in classes]
        _legend(axes, steps, [str(label) for label in classes], title=title)
    axes.set(xlabel=by, ylabel="samples")
    return axes


def plot_agreement(a: SampleScores, b: SampleScores, *, by: str = "learnability", axes: Any = None) -> Any:
    """One run's scores against another's, a point a sample, with Pearson and Spearman in the title.

    Where samples have the same scores in both runs, the area of their point is that of as many (smaller for all, if too large).

    Raises:
        DataError: scores of different data sets; see `agreement`.
    """
    found = agreement([a, b], by=by, bootstrap=100)
    axes = _axes(axes)
    seen = (a.observations > 0) & (b.observations > 0)
    places, counts = np.unique(np.stack([getattr(a, by)[seen], getattr(b, by)[seen]]), axis=1, return_counts=True)
    areas = np.maximum(counts * min(_POINT, _LARGEST / counts.max()), _SMALLEST)
    axes.scatter(*places, s=areas, alpha=0.3 if counts.max() == 1 else 0.6, linewidths=0)
    title = f"Pearson {found.pearson_intervals[0, 1]}\nSpearman {found.spearman_intervals[0, 1]}"
    axes.set(xlabel=f"{by}, {_named(a, 'first run')}", ylabel=f"{by}, {_named(b, 'second run')}", title=title)
    return axes


def plot_cohorts(
    recorder: LearnabilityRecorder,
    cohorts: int | Triage | Mapping[str, Iterable[Any]] = 4,
    *,
    by: str = "learnability",
    axes: Any = None,
) -> Any:
    """Learning curves of cohorts: the share of hits over the observations (epochs, where each has a sample once).

    `prunewise.samples.cohorts.cohort_curves` gives the numbers. Quantile groups of learnability are made of the same hits as their
    curves: that the lines lie apart says nothing, when they rise does.

    Args:
        recorder: made with `trace=`, the number of observations to keep of each sample (a bit each).
        cohorts: how many quantile groups of the score `by`; or a `Triage`; or the sample ids of each cohort by name.
        by: a score, for quantile groups.
        axes: where to draw; default: a new figure.

    Raises:
        DataError: the recorder has no trace or no observation; ids that it does not know; a triage of other samples.

    Example:
        plot_cohorts(recorder, pw.triage(recorder.scores(), labels)).figure.savefig("cohorts.png")
    """
    curves = cohort_curves(recorder, cohorts, by=by)
    axes = _axes(axes)
    lines = [axes.plot(np.arange(1, len(share) + 1), share, marker=".")[0] for _, _, share in curves]
    _legend(axes, lines, [f"{name} ({samples:,})" for name, samples, _ in curves])
    axes.set(xlabel="observation", ylabel="share of hits", ylim=(-0.02, 1.02))
    return axes


def _legend(axes: Any, drawn: list[Any], names: list[str], title: str | None = None) -> None:
    """A legend of names that others chose: one is no formula, whatever it holds, and none is left out."""
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": "small"}  # where it hides nothing
    for text in axes.legend(drawn, names, title=title, **beside).get_texts():
        text.set_parse_math(False)


def _named(scores: SampleScores, otherwise: str) -> str:
    model, seed = scores.info.get("model"), scores.info.get("seed")
    return otherwise if model is None else f"{model}" if seed is None else f"{model}, seed {seed}"


def new_figure(**settings: Any) -> Any:
    """An empty matplotlib Figure; `PrunewiseError` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrunewiseError("pictures need matplotlib: pip install 'prunewise[plot]'") from error
    return Figure(layout="constrained", **settings)  # no pyplot: nothing is shown or kept behind the user's back


def _axes(axes: Any) -> Any:
    return new_figure().subplots() if axes is None else axes
