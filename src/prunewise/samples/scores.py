"""The scores of all samples, by sample id."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from prunewise.core.checks import is_count
from prunewise.core.errors import DataError
from prunewise.samples.checking import array_of, kind_of
from prunewise.samples.ids import SampleIndex, hash_array
from prunewise.samples.state import (
    AUM,
    AUM_SOFTMAX,
    CONFIDENCE,
    EL2N,
    FIRST,
    FORGOTTEN,
    HITS,
    LOSS,
    OBSERVATIONS,
    STREAK,
    VARIANCE,
    WRONG,
    State,
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of N samples; every attribute but `info` is an array of shape (N,), in the order of the sample numbers.

    Samples that were never observed have NaN scores. `.learnability` and `.forgetting` are computed from the counts.

    Attributes:
        sample_id: int64 or strings.
        observations, hits: int64.
        forgetting_events: int64; how often a hit was followed by a miss (Toneva et al. 2019, arXiv 1812.05159), up to 32,767.
        first_learnt: int64; the observation, from 0, that was the first hit; -1 where there was none.
        last_missed: int64; the observation, from 0, that was the last miss; -1 where there was none.
        aum: mean of the logit margin (logit of the label minus the highest other one); higher = easier, in logits (Pleiss
            et al. 2020, arXiv 2001.10528).
        aum_softmax: the same of probabilities, in [-1, 1]. Not Pleiss's, though often named so.
        el2n: mean of ‖softmax − one-hot label‖₂ over the first observations (`info["el2n_window"]`), in [0, √2]; higher = harder
            (Paul et al. 2021, arXiv 2107.07075, who average over several runs, early in training).
        confidence: mean probability of the label, in [0, 1]; higher = easier. With
        variability: its standard deviation (of the population), in [0, 0.5]: data maps (Swayamdipta et al. 2020,
            arXiv 2009.10795).
        loss: mean cross-entropy, nats; higher = harder.
        last_wrong: int64; the class of the last wrong prediction; -1 where there was none, or no single class.
        info: what was recorded and how: mode, task, num_classes, el2n_window, not_counted, model, seed, label_hash; ids ("numbers"
            of a recorder without ids, or the samples' "own") and total, how many samples the recorder was made for.
    """

    sample_id: npt.NDArray[Any]
    observations: Ints
    hits: Ints
    forgetting_events: Ints
    first_learnt: Ints
    last_missed: Ints
    aum: Floats
    aum_softmax: Floats
    el2n: Floats
    confidence: Floats
    variability: Floats
    loss: Floats
    last_wrong: Ints
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in COLUMNS:
            value = np.asarray(getattr(self, name))
            if value.shape != self.observations.shape or value.ndim != 1:
                raise DataError(f"scores: {name} has shape {value.shape}, observations {self.observations.shape}")

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def learnability(self) -> Floats:
        """Share of observations that were hits, in [0, 1]; higher = easier (arXiv 1901.02347)."""
        return _unseen_as_nan(self.hits / np.maximum(self.observations, 1), self.observations)

    @property
    def forgetting(self) -> Floats:
        """Forgetting events; higher = harder, in [0, most observations of any sample].

        A sample that was never learned has no events, and is the hardest: it gets the highest number of observations of any
        sample, which no count of events can reach. (Toneva et al. say infinity; a finite number keeps means and
        correlations defined.)
        """
        hardest = float(self.observations.max(initial=0))
        values = np.where(self.hits == 0, hardest, self.forgetting_events.astype(np.float64))
        return _unseen_as_nan(values, self.observations)

    @property
    def never_learned(self) -> npt.NDArray[np.bool_]:
        """True where a sample was observed, and never right."""
        return np.asarray((self.hits == 0) & (self.observations > 0))

    def difficulty(self, by: str = "learnability") -> Floats:
        """The score `by`, turned so that higher = harder."""
        require_difficulty(by)
        return np.asarray(getattr(self, by), dtype=np.float64) * DIRECTION[by]

    def take(self, numbers: Any) -> SampleScores:
        """The scores of some samples, by number or by a mask, (N,) bool, as scores of a data set of their own."""
        wanted = f"numbers of samples, from 0 to {len(self) - 1}, or one truth value a sample"
        chosen = array_of(numbers, "the samples to take", f"give {wanted}")
        if chosen.dtype == bool and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        if not chosen.size:
            chosen = chosen.astype(np.int64)
        valid = chosen.ndim == 1 and chosen.dtype.kind in "iu"
        if not valid or (chosen.size and (chosen.min() < 0 or chosen.max() >= len(self))):
            raise DataError(f"{str(numbers)[:80]} should be {wanted}")
        columns = {name: getattr(self, name)[chosen] for name in COLUMNS}
        return SampleScores(**columns, info={**self.info, "label_hash": None})

    def check_targets(self, targets: Any) -> npt.NDArray[Any]:
        """The labels as an array, if they are those that the scores were recorded with (as far as is known).

        Raises:
            DataError: another number of labels; others than when `scores(targets)` was called; or a sample whose label is what
                the model predicted when it missed that sample's label.
        """
        labels = as_labels(targets)
        if len(labels) != len(self):
            raise DataError(
                f"{len(labels):,} labels for the scores of {len(self):,} samples: they are of another data set"
            )
        known = self.info.get("label_hash")
        if known is not None and known != hash_array(labels):
            raise DataError(
                "these are not the labels that the scores were recorded with (their hashes differ): give the labels of the same "
                "data set, in the order of the sample numbers"
            )
        self._check_misses(labels)
        return labels

    def _check_misses(self, labels: npt.NDArray[Any]) -> None:
        """Raise `DataError` where a sample's label is what the model predicted when it missed that label."""
        if labels.ndim != 1 or self.info.get("task") not in ("multiclass", "binary"):
            return
        clash = np.flatnonzero((self.last_wrong >= 0) & (self.last_wrong == labels))
        if len(clash):
            first = repr(self.sample_id[clash[0]].item())[:80]
            raise DataError(
                f"{len(clash):,} samples, the first {first}, were predicted as the label given here when they missed the one "
                "that was recorded: give the recorded labels, in the order of the sample numbers. If they are, the ids were "
                "not the samples' own (positions in a batch, say): see prunewise.track"
            )

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write one row a sample to `path`, and a manifest beside it, `path` + ".json"; needs the extra `samples`.

        Both files are replaced at one stroke each; the manifest, with the SHA-256 of the table, is the last.

        Raises:
            PrunewiseError: pyarrow is not installed.
            CheckpointError: the folder cannot be written to.
            DataError: a sample is there twice, as `take` may give it.
        """
        from prunewise.samples.table import write_table

        write_table(self, path)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str], *, targets: Any = None, sample_ids: Any = None) -> SampleScores:
        """Read what `to_parquet` wrote.

        Args:
            path: the Parquet file.
            targets: the labels of the data set at hand, in the order of the sample numbers.
            sample_ids: its sample ids, in order (`track(...).index`), or their number.

        Raises:
            CheckpointError: a file is missing, truncated, changed or of another version.
            DataError: the scores are those of another data set than `targets` or `sample_ids`.
            PrunewiseError: pyarrow is not installed.
        """
        from prunewise.samples.table import read_table

        scores = read_table(path)
        if targets is not None:
            scores.check_targets(targets)
        if sample_ids is not None:
            index = _index_of(sample_ids)
            if index.hash() != hash_array(scores.sample_id):
                raise DataError(
                    f"{path} holds the scores of another data set: {len(scores):,} samples, and the ids are not those of the "
                    f"{len(index):,} at hand"
                )
        return scores

    def __repr__(self) -> str:
        seen = int((self.observations > 0).sum())
        return f"SampleScores of {len(self):,} samples ({seen:,} observed, mode {self.info.get('mode')!r})"


COLUMNS = tuple(f.name for f in fields(SampleScores) if f.name != "info")
# +1: higher = harder; -1: higher = easier
DIRECTION = {
    "learnability": -1, "forgetting": 1, "aum": -1, "aum_softmax": -1, "el2n": 1, "confidence": -1, "loss": 1,
}  # fmt: skip


def from_state(state: State, index: SampleIndex, info: Mapping[str, Any], targets: Any) -> SampleScores:
    """The scores that a recorder's state amounts to."""
    counts, small = (t.cpu().numpy().astype(np.int64) for t in (state.counts, state.small))
    means = state.means.cpu().numpy().astype(np.float64)
    observations, hits, streak = counts[:, OBSERVATIONS], counts[:, HITS], small[:, STREAK]
    value = {name: _unseen_as_nan(means[:, column], observations) for name, column in _MEANS.items()}
    labels, label_hash = None, None
    if targets is not None:
        labels = as_labels(targets)
        if len(labels) != len(index):
            raise DataError(f"{len(labels):,} labels for {len(index):,} samples: give those of the whole data set")
        label_hash = hash_array(labels)
    scores = SampleScores(
        sample_id=index.array(),
        observations=observations,
        hits=hits,
        forgetting_events=small[:, FORGOTTEN],
        first_learnt=small[:, FIRST] - 1,
        last_missed=np.where(hits == observations, -1, observations - 1 - streak),
        variability=np.sqrt(np.maximum(_unseen_as_nan(means[:, VARIANCE], observations), 0)),
        last_wrong=small[:, WRONG] - 1,
        info={**info, "label_hash": label_hash},
        **value,
    )
    if labels is not None:
        scores._check_misses(labels)
    return scores


_MEANS = {"aum": AUM, "aum_softmax": AUM_SOFTMAX, "confidence": CONFIDENCE, "loss": LOSS, "el2n": EL2N}


def require_scores(scores: Any) -> None:
    """Raise `DataError` for anything but SampleScores."""
    if not isinstance(scores, SampleScores):
        raise DataError(f"expected SampleScores, as recorder.scores() gives them; got {kind_of(scores)}")


def require_difficulty(by: Any) -> None:
    """Raise `DataError` for anything but the name of a score of difficulty."""
    if not isinstance(by, str) or by not in DIRECTION:
        raise DataError(f"{by!r} is no score of difficulty: choose one of {', '.join(DIRECTION)}")


def as_labels(targets: Any) -> npt.NDArray[Any]:
    """Labels as an array with a row a sample: whole numbers where they are such, so that 1 and 1.0 are the same label."""
    labels = array_of(targets, "the labels", "give one label a sample")
    if labels.ndim == 0 or labels.dtype.kind not in "biufUS":
        raise DataError(f"the labels are {labels.dtype} of shape {labels.shape}: give one label a sample")
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.round(labels)).all():
        return labels.astype(np.int64)
    return labels.astype(np.int64) if labels.dtype.kind in "biu" else labels


def _index_of(sample_ids: Any) -> SampleIndex:
    """The index of ids in order, or of their number."""
    if isinstance(sample_ids, SampleIndex):
        return sample_ids
    if getattr(sample_ids, "ndim", None) == 0:
        sample_ids = sample_ids.item()  # NumPy's ints
    if not is_count(sample_ids) and not isinstance(sample_ids, Iterable):
        raise DataError(f"sample_ids={sample_ids!r} should be the ids in order, or their number")
    return SampleIndex(sample_ids)


def _unseen_as_nan(values: Floats, observations: Ints) -> Floats:
    return np.where(observations > 0, values, np.nan)
