"""Sample ids: what the user calls a sample, and the dense number that stands for it in tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prunewise.core.checks import is_count
from prunewise.core.errors import DataError

SampleId = int | str


class SampleIndex(Sequence[SampleId]):
    """The ids of a data set, in order: `index[number]` is an id, `index.number(id)` its dense number in [0, N).

    Ids are all ints or all strings, each once. Where they are 0, 1, ... N-1 nothing is stored.

    Raises:
        DataError: an id is neither an int nor a string, or stands there twice, or both kinds are mixed.

    Example:
        >>> index = SampleIndex(["cat-7", "dog-1"])
        >>> index.number("dog-1"), index[0], len(index)
        (1, 'cat-7', 2)
    """

    def __init__(self, ids: Iterable[Any] | int) -> None:
        self._ids: list[SampleId] | None = None
        self._numbers: dict[SampleId, int] | None = None
        if isinstance(ids, int):
            if not is_count(ids):
                raise DataError(f"{ids} is no number of samples")
            self._length = ids
            return
        if not isinstance(ids, Iterable):
            raise DataError(f"{ids!r:.80} is no list of sample ids: give one int or string for each sample, in order")
        found = [as_id(i) for i in ids]
        self._length = len(found)
        if len({type(i) for i in found}) > 1:
            raise DataError("sample ids are ints and strings mixed: use one kind, str(id) for example")
        for sample_id in found:
            if not _can_be_kept(sample_id):
                raise DataError(
                    f"sample id {_shown(sample_id)} cannot be kept: ints have 64 bits, strings are valid Unicode and do not end "
                    "with a zero character"
                )
        if found == list(range(len(found))):
            return
        numbers: dict[SampleId, int] = {}
        for number, sample_id in enumerate(found):
            if numbers.setdefault(sample_id, number) != number:
                raise DataError(
                    f"sample id {_shown(sample_id)} stands twice, at {numbers[sample_id]} and {number}: every sample needs an "
                    "id of its own"
                )
        self._ids, self._numbers = found, numbers

    def number(self, sample_id: Any) -> int:
        """The dense number of a sample id; `DataError` where the data set has no such sample."""
        sample_id = as_id(sample_id)
        if self._numbers is None:
            if isinstance(sample_id, int) and 0 <= sample_id < self._length:
                return sample_id
        elif sample_id in self._numbers:
            return self._numbers[sample_id]
        raise DataError(
            f"sample id {_shown(sample_id)} is none of the {self._length:,} known ones (the first is "
            f"{_shown(self[0]) if self._length else 'missing'}): give all ids when the data set is tracked"
        )

    def array(self) -> npt.NDArray[Any]:
        """All ids: int64 or a string array, shape (N,)."""
        return np.arange(self._length) if self._ids is None else np.asarray(self._ids)

    @property
    def is_dense(self) -> bool:
        """True where ids and numbers are the same."""
        return self._ids is None

    def hash(self) -> str:
        """SHA-256 of the ids in order."""
        return hash_array(self.array())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(self._length))]
        if not -self._length <= number < self._length:
            raise IndexError(number)
        number %= self._length
        return int(number) if self._ids is None else self._ids[number]

    def __iter__(self) -> Iterator[SampleId]:
        return iter(range(self._length) if self._ids is None else self._ids)

    def __repr__(self) -> str:
        return f"SampleIndex of {self._length:,} ids" + ("" if self._ids is None else f", {_shown(self._ids[0])} first")


def _can_be_kept(sample_id: SampleId) -> bool:
    """In an array, and in a file."""
    if isinstance(sample_id, int):
        return -(1 << 63) <= sample_id < 1 << 63
    if sample_id.endswith("\0"):  # NumPy would drop it
        return False
    try:
        sample_id.encode()
    except UnicodeEncodeError:  # a file name that is no UTF-8, say
        return False
    return True


def as_id(value: Any) -> SampleId:
    """An int or a string from whatever a data set keeps one in; `DataError` for anything else."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if not isinstance(value, (bool, np.bool_)):
        item = getattr(value, "item", None)  # numpy and torch scalars
        if callable(item) and getattr(value, "ndim", 0) == 0:
            value = item()
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            return value
    raise DataError(f"{str(value)[:80]!r} ({type(value).__name__}) is no sample id: ids are ints or strings")


def hash_array(values: npt.NDArray[Any]) -> str:
    """SHA-256 of an array of numbers or strings: of its values, not of the width they happen to be stored in."""
    digest = hashlib.sha256()
    if values.dtype.kind in "US":
        for value in values.tolist():
            raw = str(value).encode()
            digest.update(len(raw).to_bytes(4, "little") + raw)
    else:
        kind = np.float64 if values.dtype.kind == "f" else np.int64
        digest.update(str(values.shape).encode())
        digest.update(np.ascontiguousarray(values.astype(kind)).tobytes())
    return digest.hexdigest()


def _shown(sample_id: SampleId) -> str:
    return repr(sample_id)[:80]
