"""Which labels are likely wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prunewise.core.errors import DataError
from prunewise.samples.scores import Floats, Ints, SampleScores


@dataclass(frozen=True, eq=False)
class Suspects:
    """Samples whose labels are likely wrong, worst first; arrays of shape (S,) but for `all_scores`.

    Attributes:
        sample_id: int64 or strings. number: int64, the dense sample numbers.
        score: float64 in [-1, 1], descending; how much more probability the model gave to another class than to the label, in
            the mean over the training.
        given_label: the labels as given.
        proposed_label: int64; the class that the model predicted when it last contradicted the label; -1 where there is none
            (several labels a sample, or a class number above 32,766).
        threshold: suspects score above it.
        estimated_count: how many labels are likely wrong in the whole data set.
        all_scores: (N,) float64, the score of every sample; NaN where it was never observed.
    """

    sample_id: npt.NDArray[Any]
    number: Ints
    score: Floats
    given_label: npt.NDArray[Any]
    proposed_label: Ints
    threshold: float
    estimated_count: int
    all_scores: Floats

    def __len__(self) -> int:
        return len(self.number)

    def table(self, rows: int = 20) -> str:
        """The worst ones, as Markdown."""
        lines = ["| sample | score | label | proposed |", "| --- | --- | --- | --- |"]
        for i in range(min(rows, len(self))):
            lines.append(
                f"| {self.sample_id[i]} | {self.score[i]:.3f} | {self.given_label[i]} | {self.proposed_label[i]} |"
            )
        return "\n".join(lines)


def suspects(
    scores: SampleScores, targets: Any, *, threshold: float | None = None, limit: int | None = None
) -> Suspects:
    """Likely mislabelled samples, worst first.

    A network learns what many samples say before it learns single ones by heart. So for a wrong label it gives another class
    the higher probability over much of the training, and the mean softmax margin (`aum_softmax`) is negative; Pleiss et al.
    2020 (arXiv 2001.10528) use the margin of the logits, which a network's overconfidence inflates.

    The threshold comes from the data set: the cut that splits all scores best into two groups (least variance within them,
    Otsu 1979), if the group above it contradicts its labels in the mean; otherwise 0, which is where the model begins to prefer
    another class. The estimated count is the number of samples above it. All of this is ours; Pleiss et al. spend
    a class of deliberately wrong labels on the threshold. Measured in benchmarks/label_noise.py.

    Record a training that does not go on long after the network knows everything by heart, from the first epoch.

    Args:
        scores: of one training.
        targets: the N labels, in the order of the sample numbers.
        threshold: use this one instead; a score in [-1, 1].
        limit: at most so many, the worst ones; the estimated count is not limited.

    Raises:
        DataError: labels of another data set, or outside the classes; a setting out of range.

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
        raise DataError(f"suspects takes SampleScores, as recorder.scores() gives them; got a {type(scores).__name__}")
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
    if threshold is not None and not -1 <= threshold <= 1:
        raise DataError(f"threshold={threshold!r} should be a score in [-1, 1]")
    score = -scores.aum_softmax
    seen = np.flatnonzero(scores.observations > 0)
    cut = suspect_threshold(score[seen]) if threshold is None else float(threshold)
    found = seen[score[seen] > cut]
    count = len(found)
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
    )


def suspect_threshold(score: Floats) -> float:
    """Where the data set splits into labels that the model accepts and labels that it contradicts; 0 if it does not."""
    cut = two_groups(score)
    above = score[score > cut]
    return cut if len(above) and above.mean() > 0 and score[score <= cut].mean() < 0 else 0.0


def two_groups(values: Floats) -> float:
    """The cut between two groups of values that leaves the least variance within them (Otsu 1979)."""
    ordered = np.sort(values)
    n = len(ordered)
    if n < 2 or ordered[0] == ordered[-1]:
        return float(ordered[-1]) if n else 0.0
    below = np.arange(1, n)
    sums = np.cumsum(ordered)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * gap**2
    between[ordered[1:] == ordered[:-1]] = -1  # no cut between equals
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)
