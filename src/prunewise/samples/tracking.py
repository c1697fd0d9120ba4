"""Every sample carries its id, so that no position in a batch is ever taken for one."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as _worker

from prunewise.core.errors import DataError
from prunewise.samples.checking import kind_of
from prunewise.samples.ids import SampleIndex, as_id

FIELD = "sample_id"


def track(
    dataset: Any, *, id_field: str | None = None, ids: Sequence[Any] | SampleIndex | None = None
) -> TrackedDataset | TrackedIterable:
    """The same samples, each carrying its sample id: a dense number in [0, N), an int, whatever loads the samples.

    The number is the last element of a tuple or a list, the key `"sample_id"` of a dict or another mapping, the last field
    `sample_id` of a namedtuple; any other sample (a tensor alone) becomes the pair (sample, number). PyTorch's default
    collate turns it into an int64 tensor of shape (B,).

    A map-style data set: the number is the sample's position in `dataset`. Track what is trained on: of a
    `Subset` the positions in the subset count; the subset of a tracked data set keeps the whole set's numbers.

    An iterable data set: the number is the sample's place in the stream, or comes from its `id_field`. With several workers
    every worker reads the whole stream and passes on its share, so that each sample comes once, under the same number
    for any number of workers, whether or not the data set shards itself by `get_worker_info()`; a `worker_init_fn` must not
    shard it. Streams must be in the same order every epoch and in every worker then; where they are not, and where each
    rank of a distributed run streams its own part, give `id_field`.

    Args:
        dataset: map-style (`__len__` and `__getitem__`; lists and Hugging Face data sets are such) or iterable.
        id_field: the name of a field of the samples that identifies them: a key, or a namedtuple's field. For a
            map-style data set this reads all samples once if the data set has no column of that name, unless `ids` says
            the same.
        ids: the samples' own ids, N ints or strings; `.index` keeps them. A map-style data set whose keys are these
            ids instead of positions is looked up by them. An iterable one with `id_field` needs them unless the field
            holds dense ints already.

    Returns:
        A data set of the same kind (map-style or iterable), with `.index` (`SampleIndex`: number ↔ id) for those of known ids.

    Raises:
        DataError: no data set (a loader is none); the wrong number of ids, or one of them twice; samples that have a field
            `sample_id` which `id_field` does not name; samples of an iterable with an unknown id.

    Example:
        >>> tracked = track([("a", 0), ("b", 1)], ids=["x17", "x4"])
        >>> tracked[1]
        ('b', 1, 1)
        >>> tracked.index[1]
        'x4'
    """
    if isinstance(dataset, (TrackedDataset, TrackedIterable)):
        raise DataError("the data set is tracked already: use it as it is")
    if isinstance(dataset, DataLoader):
        raise DataError("a DataLoader gives batches, not samples: track the data set, then make the loader of it")
    if isinstance(dataset, (str, bytes, Mapping)) and not hasattr(dataset, "__getitems__"):
        if ids is None or not isinstance(dataset, Mapping):
            raise DataError(f"{kind_of(dataset)} is no data set: give a Dataset, a list, or ids= with a mapping")
    elif isinstance(dataset, type):
        raise DataError(f"{dataset.__name__} is a class: give an instance of it")
    has_items = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or (not has_items and isinstance(dataset, Iterable)):
        return TrackedIterable(dataset, id_field, _index(ids))
    if not has_items:
        raise DataError(f"{kind_of(dataset)} is no data set: it has neither __len__ and __getitem__ nor __iter__")
    index = _index(ids)
    if index is None and id_field is not None:
        index = _index(_field_of_all(dataset, id_field))
    if index is None:
        index = SampleIndex(len(dataset))
    if len(index) != len(dataset):
        raise DataError(f"{len(index):,} ids for {len(dataset):,} samples: give one id per sample, in order")
    return TrackedDataset(dataset, id_field, index)


class TrackedDataset(Dataset[Any]):
    """A map-style data set whose samples carry their ids; made by `track`. `.index` maps numbers to ids and back."""

    def __init__(self, dataset: Any, id_field: str | None, index: SampleIndex) -> None:
        self.dataset, self.id_field, self.index = dataset, id_field, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self.__getitems__(range(*key.indices(len(self))))
        number = self._number(as_id(key))
        return with_id(sample_at(self.dataset, number, self.index[number]), number, self.id_field)

    def __getitems__(self, keys: Iterable[Any]) -> list[Any]:
        """The samples at `keys`; PyTorch's loader asks for whole batches where a data set can give them."""
        numbers = [self._number(as_id(k)) for k in keys]
        if not callable(getattr(self.dataset, "__getitems__", None)):
            return [self[n] for n in numbers]
        wanted = [self.index[n] for n in numbers] if isinstance(self.dataset, Mapping) else numbers
        samples = self.dataset.__getitems__(wanted)
        return [with_id(s, n, self.id_field) for s, n in zip(samples, numbers, strict=True)]

    def _number(self, key: int | str) -> int:
        """An int is a number, as samplers give it; a string is an id."""
        number = self.index.number(key) if isinstance(key, str) else key + len(self) if key < 0 else key
        if number < 0 or number >= len(self):
            raise IndexError(f"sample {key} of {len(self):,}")
        return number

    def __getattr__(self, name: str) -> Any:
        # `classes`, `transform` and the like of the wrapped data set; not while unpickling, when there is none yet
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)


class TrackedIterable(IterableDataset[Any]):
    """An iterable data set whose samples carry their ids; made by `track`."""

    def __init__(self, dataset: Iterable[Any], id_field: str | None, index: SampleIndex | None) -> None:
        self.dataset, self.id_field, self.index = dataset, id_field, index
        if hasattr(dataset, "__len__"):
            # only where the stream knows its length: DataLoader and len() trust it
            self.__class__ = _SizedIterable

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        share, shares = (0, 1) if info is None else (info.id, info.num_workers)
        for place, sample in enumerate(_Unsharded(self.dataset)):
            # shared out by the number and not by the place: every worker may shuffle the stream in its own way
            number = self._number(place, sample)
            if number % shares == share:
                yield with_id(sample, number, self.id_field)

    def _number(self, place: int, sample: Any) -> int:
        if self.id_field is None:
            if self.index is not None and place >= len(self.index):
                raise DataError(f"the stream is longer than the {len(self.index):,} ids that were given for it")
            return place
        value = as_id(field_of(sample, self.id_field))
        if self.index is not None:
            return self.index.number(value)
        if isinstance(value, str) or value < 0:
            raise DataError(
                f"the stream's field {self.id_field!r} holds {str(value)[:80]!r}, which is no dense number: give all ids of "
                "the stream with ids="
            )
        return value

    def set_epoch(self, epoch: int) -> None:
        """Handed on to the data set, if it takes epochs."""
        handed = getattr(self.dataset, "set_epoch", None)
        if callable(handed):
            handed(epoch)


class _SizedIterable(TrackedIterable):
    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class _Unsharded:
    """The whole stream in every worker: while the data set makes a sample, `get_worker_info()` is None.

    Data sets that shard themselves differ in how (every W-th, or contiguous parts), so no place in a shard tells the place in
    the stream. PyTorch has no public way to hide the worker; without it the data set must not shard itself.
    """

    def __init__(self, dataset: Iterable[Any]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is None:
            yield from self._dataset
            return
        iterator: Iterator[Any] | None = None
        while True:
            _worker._worker_info = None
            try:
                if iterator is None:
                    iterator = iter(self._dataset)
                sample = next(iterator)
            except StopIteration:
                return
            finally:
                _worker._worker_info = info
            yield sample


def sample_at(dataset: Any, number: int, sample_id: int | str) -> Any:
    """The sample of that number and id: at the place `number`, or under its id where the data set's keys are ids."""
    if isinstance(dataset, Mapping):
        return dataset[sample_id]
    try:
        return dataset[number]
    except (KeyError, TypeError):
        if not isinstance(sample_id, str):  # an int is a place, for all that is known
            raise
    return dataset[sample_id]


def with_id(sample: Any, number: int, id_field: str | None = None) -> Any:
    """`sample` with its number put in; the sample itself is not changed."""
    if isinstance(sample, Mapping):
        if FIELD in sample and id_field != FIELD:
            raise DataError(_taken("key"))
        # Others may share what they hold with their copy.
        made = copy.copy(sample) if isinstance(sample, (dict, UserDict)) else dict(sample)
        made[FIELD] = number
        return made
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        fields = sample._fields
        if FIELD in fields:
            if id_field != FIELD:
                raise DataError(_taken("field"))
            values = [v for f, v in zip(fields, sample, strict=True) if f != FIELD]
            if fields[-1] == FIELD:
                kind: Any = type(sample)
                return kind(*values, number)
            raise DataError(f"the namedtuple's field {FIELD!r} should be its last one, or have another name")
        return _remade(type(sample), (*sample, number))
    if isinstance(sample, tuple):
        return (*sample, number)
    if isinstance(sample, list):
        return [*sample, number]
    return sample, number


def field_of(sample: Any, name: str) -> Any:
    """The field `name` of a mapping, a namedtuple or an object; `DataError` where there is none."""
    if isinstance(sample, Mapping):
        if name in sample:
            return sample[name]
        known = ", ".join(map(str, list(sample)[:8]))
    else:
        if isinstance(name, str) and hasattr(sample, name):
            return getattr(sample, name)
        known = ", ".join(getattr(sample, "_fields", ())) or f"none: it is a {type(sample).__name__}"
    raise DataError(f"the samples have no field {name!r} (fields: {known}): name one of them with id_field=")


def _taken(what: str) -> str:
    return (
        f"the samples have a {what} {FIELD!r} of their own: track(dataset, id_field={FIELD!r}) says that it is their id; "
        "otherwise rename it"
    )


def _index(ids: Sequence[Any] | SampleIndex | None) -> SampleIndex | None:
    return ids if ids is None or isinstance(ids, SampleIndex) else SampleIndex(ids)


def _field_of_all(dataset: Any, name: str) -> list[Any]:
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, (list, tuple)) and name in columns:
        # Hugging Face: a column, without decoding the rows, and without a format, which may leave the column out
        plain = dataset.with_format(None) if callable(getattr(dataset, "with_format", None)) else dataset
        return list(plain[name])
    return [field_of(dataset[i], name) for i in range(len(dataset))]


@lru_cache(maxsize=256)
def _with_field(base: type) -> type:
    """The namedtuple class `base` with one field more."""
    make: Any = namedtuple  # the type checker wants to see literal names
    made = make(base.__name__, (*base._fields, FIELD))  # type: ignore[attr-defined]

    # Worker processes pickle their samples, and no module holds this class: a sample says how to make it anew.
    def reduce(self: Any) -> Any:
        return _remade, (base, tuple(self))

    return type(base.__name__, (made,), {"__slots__": (), "__reduce__": reduce})


def _remade(base: type, values: tuple[Any, ...]) -> Any:
    return _with_field(base)(*values)
