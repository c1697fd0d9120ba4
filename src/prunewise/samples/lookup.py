"""From a place in the scores to the sample itself, by its id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Subset

from prunewise.core.errors import DataError
from prunewise.samples.scores import SampleScores
from prunewise.samples.tracking import TrackedDataset, sample_at


def reader(dataset: Any, scores: SampleScores) -> Callable[[int], Any]:
    """What gives the sample that stands at a place of the scores, as the data set has it, without its number.

    Raises:
        DataError: no sample of this data set can be looked up by the ids of these scores; what is returned raises it too.
    """
    root = dataset
    while isinstance(root, Subset):
        root = root.dataset
    kind, total = scores.info.get("ids"), int(scores.info.get("total") or len(scores))
    dense = scores.sample_id.dtype.kind == "i" and np.array_equal(scores.sample_id, np.arange(len(scores)))
    if kind is None and dense:  # of a version that did not write it down
        known = isinstance(root, TrackedDataset) and set(scores.sample_id.tolist()) <= set(root.index)
        kind = "own" if known else "numbers"
    if isinstance(root, TrackedDataset):
        inner, index = root.dataset, root.index
        # a recorder that was made without ids has numbers for ids, whatever the data set calls its samples
        numbered = kind == "numbers"
        if numbered and total != len(index):
            raise DataError(_other_size(total, len(index)))

        def tracked(place: int) -> Any:
            sample_id = scores.sample_id[place]
            number = _place(sample_id, total) if numbered else index.number(sample_id)
            return _sample(inner, number, index[number])

        return tracked
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"no sample can be looked up in a {type(dataset).__name__}: give a map-style data set, or a dict of samples by id"
        )
    if _holds_tracked(dataset):
        raise DataError(
            f"the samples inside this {type(dataset).__name__} carry ids of their own: give the tracked data set itself, or track "
            "what is put together instead of its parts"
        )
    if isinstance(dataset, Mapping):
        return lambda place: _sample(dataset, place, scores.sample_id[place].item())
    if kind != "numbers":
        raise DataError(
            "the scores have sample ids, and the data set is not tracked by them: give track(dataset, ids=...), or a dict of "
            "samples by id"
        )
    if len(dataset) != total:
        raise DataError(_other_size(total, len(dataset)))
    return lambda place: dataset[_place(scores.sample_id[place], total)]


def _place(number: Any, total: int) -> int:
    if not 0 <= int(number) < total:
        raise DataError(f"the scores have a sample {number} of {total:,}: they are damaged, record again")
    return int(number)


def _sample(dataset: Any, number: int, sample_id: Any) -> Any:
    if isinstance(dataset, Mapping) and sample_id not in dataset:
        raise DataError(f"the data set has no sample {sample_id!r:.80}: give the one that the scores are of")
    return sample_at(dataset, number, sample_id)


def _holds_tracked(dataset: Any) -> bool:
    """True for wrappers of tracked data sets (ConcatDataset, say), whose positions are not the samples' numbers."""
    if isinstance(dataset, TrackedDataset):
        return True
    inside = getattr(dataset, "dataset", None), *_parts(dataset)
    return any(_holds_tracked(each) for each in inside if each is not None)


def _parts(dataset: Any) -> Sequence[Any]:
    parts = getattr(dataset, "datasets", ())
    return parts if isinstance(parts, (list, tuple)) else ()


def _other_size(total: int, size: int) -> str:
    return f"scores of {total:,} samples, and a data set of {size:,}: they are of another data set"
