"""Which labels are likely wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from prunewise.core.checks import is_number
from prunewise.core.errors import DataError
from prunewise.samples.checking import kind_of, warn_caller
from prunewise.samples.mirroring import FEWEST, Split, mirrored_split
from prunewise.samples.scores import Floats, Ints, SampleScores
from prunewise.samples.showing import cell

EL2N_WINDOW = 10  # as the recorder has it by default
FIRM = 2 / 3  # relative margin: another class had five times the label's probability
FIRMEST = 0.1  # share of the samples, those on which the model was surest, by which it tells how many labels are wrong
MOST = 0.5  # share of labels that may be wrong


@dataclass(frozen=True, eq=False)
class Suspects:
    """Samples whose labels are likely wrong, worst first; arrays of shape (S,) but for `all_scores`.

    Attributes:
        sample_id: int64 or strings. number: int64, the dense sample numbers.
        score: float64 in [-1, 1], descending; how much more probability the model gave to another class than to the label, in
            the mean over the training; where not `separable`, divided by the sum of the two.
        given_label: the labels as given.
        proposed_label: int64; the class that the model predicted when it last contradicted the label; -1 where there is none
            (several labels a sample, or a class number above 32,766).
        threshold: suspects score above it.
        estimated_count: how many labels are wrong in the whole data set, in expectation: the sum of the probabilities; where not
            `separable`, by the samples of which the model was surest; where a threshold was given, how many scores lie above it.
        all_scores: (N,) float64, the score of every sample; NaN where it was never observed.
        separable: False where this training did not tell wrong labels from hard samples.
    """

    sample_id: npt.NDArray[Any]
    number: Ints
    score: Floats
    given_label: npt.NDArray[Any]
    proposed_label: Ints
    threshold: float
    estimated_count: int
    all_scores: Floats
    separable: bool = True

    def __len__(self) -> int:
        return len(self.number)

    def __repr__(self) -> str:
        shown = [repr(sample_id)[:40] for sample_id in self.sample_id[:3].tolist()]
        worst = f", worst first: {', '.join(shown)}{', …' if len(self) > len(shown) else ''}" if shown else ""
        return (
            f"Suspects: {len(self):,} of {len(self.all_scores):,} samples, score above {self.threshold:.3f}, "
            f"estimated_count={self.estimated_count:,}{'' if self.separable else ', not separable'}{worst}"
        )

    def table(self, rows: int = 20) -> str:
        """The worst ones, as Markdown."""
        lines = ["| sample | score | label | proposed |", "| --- | --- | --- | --- |"]
        for i in range(min(rows, len(self))):
            cells = [self.sample_id[i], f"{self.score[i]:.3f}", self.given_label[i], self.proposed_label[i]]
            lines.append("| " + " | ".join(cell(each).replace("|", "\\|") for each in cells) + " |")
        return "\n".join(lines)


def suspects(
    scores: SampleScores, targets: Any, *, threshold: float | None = None, limit: int | None = None
) -> Suspects:
    """Likely mislabelled samples, worst first.

    A network learns what many samples say before it learns single ones by heart. So for a wrong label it gives another class
    the higher probability over much of the training, and the mean softmax margin (`aum_softmax`) is negative; Pleiss et al.
    2020 (arXiv 2001.10528) use the margin of the logits, which a network's overconfidence inflates.

    The threshold comes from the data set, and no label is spent on it (Pleiss et al. train on a class of deliberately wrong
    ones). A model that generalises contradicts a wrong label as firmly as it would confirm the right one: the scores of
    wrong labels are the mirror image, about 0, of the scores of right ones. A mixture of one group and its image is fitted to all
    scores; suspects are those that are more likely of the image. So hard samples of a short training, whose scores reach above
    0 but which no firm contradictions accompany, are not flagged, and few are where all labels are right.

    In a training of twice as many epochs as the EL2N window, or more, a model may learn wrong labels by heart, which moves their
    scores down. There the mirror may stand below 0, if EL2N, which is of the first epochs, says that the model knew the other
    samples by then, and that the samples so found were nearer to being contradicted firmly than to being undecided. A model that
    has known everything by heart for most of its training misses many wrong labels, all the more where one wrong label is
    nearly as frequent in a class as the right one: record a shorter training. All of this is ours; measured in
    benchmarks/label_noise.py.

    A model that has learned little contradicts right labels, too: no mirror explains its scores (nearly half of all labels
    would be wrong, or a single bell describes the scores clearly better). Then there is a warning, and wrong labels are counted
    where the model errs least: of the tenth of all samples that had the highest probabilities, for the label or for another
    class, the share of those contradicted, at most a half. As many are suspected of all samples, ranked by the ratio of the two
    probabilities: the margins of a model that is unsure of everything are small everywhere. Labels that are wrong the more often
    the harder a sample is, as those of people are, are more than this tells. In a training of fewer epochs than the EL2N window
    a model is sure of much that is not so, and suspects are only the samples of which another class had more than five times
    the label's probability in the mean.

    With fewer than 30 observed samples the threshold is 0, where the model begins to prefer another class.

    Args:
        scores: of one training.
        targets: the N labels, in the order of the sample numbers.
        threshold: use this one instead; a score in [-1, 1].
        limit: at most so many, the worst ones; the estimated count is not limited.

    Raises:
        DataError: labels of another data set, or outside the classes; a setting out of range; observed samples without a
            finite margin, which no recorder gives.

    Warns:
        UserWarning: the training did not tell wrong labels from hard samples.

    Example:
        >>> import torch
        >>> from prunewise import LearnabilityRecorder
        >>> recorder = LearnabilityRecorder(4)
        >>> logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> recorder.update(torch.arange(4), logits, labels)
        >>> found = suspects(recorder.scores(), labels)
        >>> found.sample_id.tolist(), found.proposed_label.tolist(), found.estimated_count
        ([3], [0], 1)
    """
    if not isinstance(scores, SampleScores):
        raise DataError(f"suspects takes SampleScores, as recorder.scores() gives them; got {kind_of(scores)}")
    labels = scores.check_targets(targets)
    classes = scores.info.get("num_classes")
    if (
        labels.ndim == 1
        and labels.dtype.kind == "i"
        and classes is not None
        and scores.info.get("task") == "multiclass"
    ):
        wrong = labels[(scores.observations > 0) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise DataError(
                f"label {wrong[0]} is none of the {classes} classes that were recorded: give the recorded labels"
            )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise DataError(f"limit={limit!r} should be a count, or None")
    if threshold is not None and not (is_number(threshold) and -1 <= threshold <= 1):
        raise DataError(f"threshold={threshold!r} should be a score in [-1, 1]")
    score = -scores.aum_softmax
    seen = np.flatnonzero(scores.observations > 0)
    broken = int((~np.isfinite(score[seen])).sum())
    if broken:
        raise DataError(f"{broken:,} observed samples have no finite aum_softmax: the scores are damaged, record again")
    if threshold is None:
        split = suspect_split(scores)
        cut, count, separable = split.cut, round(split.count), split.separable
        if not separable:
            score = _relative(scores)
            cut, count = _firm_cut(scores, score[seen])
            hits = scores.hits[seen].sum() / scores.observations[seen].sum()
            warn_caller(
                f"wrong labels cannot be told from hard samples: this training got {hits:.0%} of its labels right, and contradicts "
                f"too many for all of them to be wrong. The {(score[seen] > cut).sum():,} are suspected of which it is surest. "
                "Record a training that learns more (more epochs, another learning rate, a stronger model)"
            )
    else:
        cut, separable = float(threshold), True
        count = int((score[seen] > cut).sum())
    found = seen[score[seen] > cut]
    # a stable sort: equal scores stay in the order of the data set
    found = found[np.argsort(-score[found], kind="stable")][:limit]
    return Suspects(
        sample_id=scores.sample_id[found],
        number=found,
        score=score[found],
        given_label=labels[found],
        proposed_label=scores.last_wrong[found],
        threshold=cut,
        estimated_count=count,
        all_scores=score,
        separable=separable,
    )


def _label_and_rival(scores: SampleScores) -> tuple[Floats, Floats]:
    """Probabilities of the label and of its strongest rival, means over the training; (N,) each."""
    if scores.info.get("task") == "multilabel":  # the margin is p - (1 - p) of one label, the confidence a mean of all
        return (1 + scores.aum_softmax) / 2, (1 - scores.aum_softmax) / 2
    return scores.confidence, np.maximum(scores.confidence - scores.aum_softmax, 0)


def _relative(scores: SampleScores) -> Floats:
    """By how much the strongest other class exceeds the label, of the probability of both."""
    label, other = _label_and_rival(scores)
    return np.clip((other - label) / np.maximum(other + label, 1e-12), -1, 1)


def _firm_cut(scores: SampleScores, relative: Floats) -> tuple[float, int]:
    """The relative margin above which a model that is unsure of most samples is believed, and how many labels are wrong.

    A right label is confirmed with the probability with which a wrong one is contradicted: that of the true class, on which
    a model that is sure errs rarely, so that among the samples with the highest probabilities the contradicted ones are as many
    as labels are wrong. (Margins would not do: to a wrong label they are those to any class, to a right one those to its
    strongest rival.)
    """
    seen = scores.observations > 0
    if np.median(scores.observations[seen]) < _window(scores):
        cut = max(FIRM, _cut_of(relative, round(MOST * len(relative))))
        return cut, int((relative > cut).sum())
    label, other = (p[seen] for p in _label_and_rival(scores))
    firmest = np.argsort(-np.maximum(label, other), kind="stable")[: max(FEWEST, round(FIRMEST * len(label)))]
    count = round(min(float((other > label)[firmest].mean()), MOST) * len(label))
    return _cut_of(relative, count), count


def _cut_of(relative: Floats, count: int) -> float:
    """The cut above which `count` scores lie, or as near to it as ties let it come; not below 0, where the label is preferred."""
    values, sizes = np.unique(relative[relative > 0], return_counts=True)
    above = np.concatenate([[0], np.cumsum(sizes[::-1])])
    taken = int(np.abs(above - count).argmin())  # of the different values, from the highest
    return float(values[-1 - taken]) if taken < len(values) else 0.0


def _window(scores: SampleScores) -> int:
    """Epochs of a training in which nothing is known by heart yet."""
    return int(scores.info.get("el2n_window") or EL2N_WINDOW)


def suspect_split(scores: SampleScores) -> Split:
    """How the observed scores split; at 0 where they are too few to tell."""
    seen = scores.observations > 0
    score = -scores.aum_softmax[seen]
    if len(score) < FEWEST:
        return Split(0.0, float((score > 0).sum()), 0.0)
    split = mirrored_split(score, memorised=False)
    if not split.separable:
        return split
    # in fewer epochs EL2N and the margins are of the same observations, and one says no more than the other
    if np.median(scores.observations[seen]) < 2 * _window(scores) or scores.info.get("task") == "multilabel":
        return split
    shifted = mirrored_split(score, memorised=True)
    found, early = score > shifted.cut, scores.el2n[seen]
    if not found.any() or found.all():
        return split
    # EL2N of a label with probability p beside one other class: √2 (1 - p); of its mirror image √2 p; undecided √½
    wrong, right, undecided = float(np.median(early[found])), float(np.median(early[~found])), float(np.sqrt(0.5))
    contradicted = wrong > (undecided + (2 * undecided - right)) / 2
    # EL2N has confirmed it: then half of the labels may be wrong
    return replace(shifted, separable=True) if right < undecided and contradicted else split
