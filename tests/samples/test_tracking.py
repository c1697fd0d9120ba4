"""Identity: the number that a sample carries is its own, whatever loads it."""

from __future__ import annotations

import pickle
from collections import UserDict, namedtuple
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

import prunewise as pw
from prunewise.samples.ids import SampleIndex
from prunewise.samples.tracking import TrackedIterable
from tests.samples.test_suspects import scores_of

N = 23
VALUES = torch.arange(N) * 10  # the content tells which sample it is


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


Loose = namedtuple("Loose", "x y")


class Forms(Dataset):
    def __init__(self, form: str) -> None:
        self.form = form

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        x, y = VALUES[i], int(VALUES[i]) + 1
        return {
            "tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}, "namedtuple": Pair(x, y), "loose": Loose(x, y),
            "bare": x, "userdict": UserDict(x=x, y=y),
        }[self.form]  # fmt: skip


def read(form: str, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if form == "bare":
        return batch[0], batch[1]
    if form in ("dict", "userdict"):
        return batch["x"], batch["sample_id"]
    assert len(batch) == 3
    if form in ("namedtuple", "loose"):
        assert batch._fields == ("x", "y", "sample_id")
        assert torch.equal(batch.sample_id, batch[-1])
    return batch[0], batch[-1]


def check(form: str, loader: DataLoader, expected: int = N) -> None:
    seen = []
    for batch in loader:
        x, ids = read(form, batch)
        assert ids.dtype == torch.int64
        assert torch.equal(x, VALUES[ids])
        seen += ids.tolist()
    assert sorted(seen) == list(range(expected))


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "namedtuple", "loose", "bare", "userdict"])
@pytest.mark.parametrize("batch_size", [1, 7, N])
def test_every_form_shuffled(form: str, batch_size: int) -> None:
    torch.manual_seed(0)
    check(form, DataLoader(pw.track(Forms(form)), batch_size=batch_size, shuffle=True))


@pytest.mark.parametrize("form", ["tuple", "dict", "namedtuple"])
def test_workers_and_prefetch(form: str) -> None:
    loader = DataLoader(
        pw.track(Forms(form)), batch_size=4, shuffle=True, num_workers=2, prefetch_factor=3, persistent_workers=True
    )
    for _ in range(2):
        check(form, loader)


def test_samplers_and_collate_of_ones_own() -> None:
    tracked = pw.track(Forms("tuple"))
    batches = BatchSampler(RandomSampler(range(N)), 5, drop_last=False)
    check("tuple", DataLoader(tracked, batch_sampler=batches))
    check("tuple", DataLoader(tracked, sampler=SequentialSampler(range(N)), batch_size=None, collate_fn=one))
    rows = list(DataLoader(tracked, batch_size=6, collate_fn=list))
    assert [i for batch in rows for *_, i in batch] == list(range(N))


def one(sample: Any) -> Any:
    return sample[0][None], torch.tensor([sample[1]]), torch.tensor([sample[2]])


def test_subsets_and_concatenations() -> None:
    subset = pw.track(Subset(Forms("tuple"), [5, 3, 8]))
    assert [s[-1] for s in subset] == [0, 1, 2] and [int(s[0]) for s in subset] == [50, 30, 80]
    of_tracked = Subset(pw.track(Forms("tuple")), [5, 3, 8])
    assert [s[-1] for s in of_tracked] == [5, 3, 8]
    both = pw.track(ConcatDataset([Forms("tuple"), Forms("tuple")]))
    assert len(both) == 2 * N and both[N + 2][-1] == N + 2


def test_keys_of_every_kind() -> None:
    tracked = pw.track(Forms("tuple"))
    for key in (3, np.int64(3), torch.tensor(3), 3 - N):
        assert tracked[key][-1] == 3 and int(tracked[key][0]) == 30
    assert [s[-1] for s in tracked[4:7]] == [4, 5, 6]
    for key in (N, -N - 1):
        with pytest.raises(IndexError):
            tracked[key]


def test_the_sample_itself_is_not_changed() -> None:
    rows = [{"x": 1}, {"x": 2}]
    tracked = pw.track(rows)
    assert tracked[1] == {"x": 2, "sample_id": 1}
    assert rows == [{"x": 1}, {"x": 2}]
    lists = [[1, 2]]
    assert pw.track(lists)[0] == [1, 2, 0] and lists == [[1, 2]]


def test_string_ids() -> None:
    names = [f"img-{i * 7 % N}" for i in range(N)]
    tracked = pw.track(Forms("tuple"), ids=names)
    assert tracked[4][-1] == 4 and tracked.index[4] == names[4] and tracked.index.number(names[9]) == 9
    assert tracked.index.array().tolist() == names
    with pytest.raises(pw.DataError, match="'img-99'.*none of the 23"):
        tracked.index.number("img-99")


def test_an_id_field_by_name() -> None:
    rows = [{"uid": f"u{i}", "x": i} for i in (4, 2, 9)]
    tracked = pw.track(rows, id_field="uid")
    assert list(tracked.index) == ["u4", "u2", "u9"]
    assert tracked[2] == {"uid": "u9", "x": 9, "sample_id": 2}
    own = pw.track([{"sample_id": 70}, {"sample_id": 50}], id_field="sample_id")
    assert own[1]["sample_id"] == 1 and own.index[1] == 50
    named = pw.track([Loose("k", 0), Loose("j", 1)], id_field="x")
    assert named.index[1] == "j" and named[1].sample_id == 1


class Columns:
    """Rows as Hugging Face data sets give them: by number, by column, by batch."""

    column_names = ("uid", "x")

    def __init__(self) -> None:
        self.rows_read = 0

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: Any) -> Any:
        if key == "uid":
            return [f"u{i}" for i in range(5)]
        self.rows_read += 1
        return {"uid": f"u{key}", "x": key}

    def __getitems__(self, keys: list[int]) -> list[Any]:
        assert isinstance(keys, list)
        return [{"uid": f"u{k}", "x": k} for k in keys]


def test_hugging_face_rows() -> None:
    rows = Columns()
    tracked = pw.track(rows, id_field="uid")
    assert rows.rows_read == 0  # ids come from the column
    batches = list(DataLoader(tracked, batch_size=2, shuffle=True))
    assert rows.rows_read == 0  # batches come whole
    for batch in batches:
        assert batch["sample_id"].tolist() == batch["x"].tolist()


class Formatted(Columns):
    """The same with `set_format`, as Hugging Face has it: rows and columns as tensors, and of the chosen columns only."""

    def __init__(self, chosen: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.chosen = chosen

    def set_format(self, kind: str | None, columns: list[str] | None = None) -> None:
        self.chosen = tuple(columns or self.column_names) if kind else None

    def with_format(self, kind: str | None) -> Formatted:
        return Formatted(self.column_names if kind else None)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if self.chosen is not None and key not in self.chosen:
                raise KeyError(key)
            return [row[key] for row in self.__getitems__(list(range(len(self))))]
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[Any]:
        rows = [{"uid": f"u{k}", "x": k} for k in keys]
        if self.chosen is None:
            return rows
        return [{c: torch.tensor(r[c]) if c == "x" else r[c] for c in self.chosen} for r in rows]


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"uid": [f"u{i}" for i in range(5)], "x": list(range(5))})


@pytest.mark.parametrize("make", [Formatted, hugging_face], ids=["stand-in", "datasets"])
@pytest.mark.parametrize("columns", [None, ["x"], ["uid", "x"]])
def test_hugging_face_formats(make: Any, columns: list[str] | None) -> None:
    """Rows are tensors, perhaps without the column that identifies them: the ids are known all the same."""
    rows = make()
    rows.set_format("torch", columns=columns)
    tracked = pw.track(rows, id_field="uid")
    assert list(tracked.index) == [f"u{i}" for i in range(5)]
    one = tracked[3]
    assert set(one) == {*(columns or ("uid", "x")), "sample_id"}
    assert isinstance(one["x"], torch.Tensor) and (int(one["x"]), one["sample_id"]) == (3, 3)
    for workers in (0, 1):
        seen = []
        for batch in DataLoader(tracked, batch_size=2, shuffle=True, num_workers=workers):
            assert batch["sample_id"].dtype == torch.int64 and torch.equal(batch["sample_id"], batch["x"])
            seen += batch["sample_id"].tolist()
        assert sorted(seen) == list(range(5))
    rows.set_format(None)
    assert pw.track(rows)[4] == {"uid": "u4", "x": 4, "sample_id": 4}
    assert list(pw.track(rows, id_field="x").index) == list(range(5))


def test_hugging_face_shuffled_selected_and_streamed() -> None:
    rows = hugging_face()
    assert list(pw.track(rows.shuffle(seed=0).select([2, 0]), id_field="uid").index) == [
        rows.shuffle(seed=0)[2]["uid"],
        rows.shuffle(seed=0)[0]["uid"],
    ]
    streamed = pw.track(rows.to_iterable_dataset(), id_field="uid", ids=rows["uid"])
    assert [(row["uid"], row["sample_id"]) for row in streamed] == [(f"u{i}", i) for i in range(5)]
    scores = scores_of(np.linspace(1, 0, 5), sample_id=np.array(rows["uid"]))
    shown = pw.gallery(scores, pw.track(rows.shuffle(seed=0), id_field="uid"), count=2, content="uid")
    assert [e.content for e in shown.exhibits] == ["u4", "u3"]


def test_a_mapping_by_its_keys() -> None:
    tracked = pw.track({"a": (1,), "b": (2,)}, ids=["b", "a"])
    assert tracked["a"] == (1, 1) and tracked["b"] == (2, 0)
    assert [row[-1] for row in tracked] == [0, 1] and tracked[-1] == (1, 1), "an int is a number"
    numbered = pw.track({5: ("five",), 0: ("zero",), 1: ("one",)}, ids=[5, 0, 1])
    assert [numbered[i] for i in range(3)] == [("five", 0), ("zero", 1), ("one", 2)]
    assert [tuple(row) for batch in DataLoader(numbered, batch_size=3, collate_fn=list) for row in batch] == [
        ("five", 0),
        ("zero", 1),
        ("one", 2),
    ]


class Stream(IterableDataset):
    """Numbers 0 to N-1; sharded by itself in one of two ways, or not at all."""

    def __init__(self, sharding: str) -> None:
        self.sharding = sharding

    def __iter__(self) -> Any:
        info = get_worker_info()
        w, total = (0, 1) if info is None else (info.id, info.num_workers)
        if self.sharding == "stride":
            yield from ((VALUES[i], i) for i in range(w, N, total))
        elif self.sharding == "parts":
            size = -(-N // total)
            yield from ((VALUES[i], i) for i in range(w * size, min(N, (w + 1) * size)))
        else:
            yield from ((VALUES[i], i) for i in range(N))


@pytest.mark.parametrize("sharding", ["none", "stride", "parts"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_streams_whatever_shards_them(sharding: str, workers: int) -> None:
    check("tuple", DataLoader(pw.track(Stream(sharding)), batch_size=4, num_workers=workers))


class Named(IterableDataset):
    def __iter__(self) -> Any:
        order = torch.randperm(N).tolist()  # another order each time: places tell nothing
        yield from ({"x": VALUES[i], "uid": f"u{i}"} for i in order)


def test_streams_with_an_id_field() -> None:
    tracked = pw.track(Named(), id_field="uid", ids=[f"u{i}" for i in range(N)])
    for _ in range(2):
        check("dict", DataLoader(tracked, batch_size=4))
    with pytest.raises(pw.DataError, match="'uid' holds 'u.*ids="):
        next(iter(pw.track(Named(), id_field="uid")))
    with pytest.raises(pw.DataError, match="no field 'id' .fields: x, uid"):
        next(iter(pw.track(Named(), id_field="id")))
    with pytest.raises(pw.DataError, match="longer than the 2 ids"):
        list(pw.track(Stream("none"), ids=["a", "b"]))


class ShuffledStream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ({"x": i, "uid": i} for i in torch.randperm(40).tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_that_shuffle_themselves_come_whole(workers: int) -> None:
    """Each worker has an order of its own: only the samples' ids tell the shares."""
    loader = DataLoader(pw.track(ShuffledStream(), id_field="uid"), batch_size=4, num_workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert sorted(torch.cat([b["sample_id"] for b in batches]).tolist()) == list(range(40))
        assert all(torch.equal(b["sample_id"], b["x"]) for b in batches)


class ByName(Dataset[Any]):
    """Map-style, but its keys are its ids, as the docstring of `track` has it."""

    rows: ClassVar = {"x": (1.0, 0), "y": (2.0, 1)}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: str) -> tuple[float, int]:
        return self.rows[key]


def test_a_data_set_whose_keys_are_its_ids() -> None:
    data = pw.track(ByName(), ids=["x", "y"])
    assert [data[0], data["y"]] == [(1.0, 0, 0), (2.0, 1, 1)]
    assert [b[-1].tolist() for b in DataLoader(data, batch_size=2)] == [[0, 1]]
    assert pw.track([("a", 0), ("b", 1)], ids=["x17", "x4"])["x4"] == ("b", 1, 1)
    with pytest.raises(KeyError):
        pw.track(ByName(), ids=["x", "z"])[1]


def test_only_streams_of_known_length_have_one() -> None:
    with pytest.raises(TypeError):
        len(pw.track(Stream("none")))

    class Sized(Stream):
        def __len__(self) -> int:
            return N

    assert len(pw.track(Sized("none"))) == N
    assert isinstance(pw.track(x for x in "ab"), TrackedIterable)


def test_pickles() -> None:
    tracked = pw.track(Forms("namedtuple"), ids=[f"i{k}" for k in range(N)])
    again = pickle.loads(pickle.dumps(tracked))
    assert again[3].sample_id == 3 and again.index[3] == "i3"
    sample = pickle.loads(pickle.dumps(tracked[3]))
    assert sample._fields == ("x", "y", "sample_id") and sample.y == 31
    assert type(sample) is type(tracked[4])


def test_attributes_of_the_wrapped_data_set() -> None:
    assert pw.track(Forms("tuple")).form == "tuple"
    with pytest.raises(AttributeError):
        pw.track(Forms("tuple")).classes  # noqa: B018


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pw.track(3), "^an int is no data set"),
        (lambda: pw.track("abc"), "str is no data set"),
        (lambda: pw.track(Forms), "Forms is a class"),
        (lambda: pw.track({"a": 1}), "dict is no data set"),
        (lambda: pw.track(pw.track([1, 2])), "tracked already"),
        (lambda: pw.track(DataLoader([1, 2])), "track the data set, then make the loader of it"),
        (lambda: pw.track([1, 2], ids=["a"]), "1 ids for 2 samples"),
        (lambda: pw.track([1, 2], ids=["a", "a"]), "'a' stands twice, at 0 and 1"),
        (lambda: pw.track([1, 2], ids=[5, "a"]), "mixed"),
        (lambda: pw.track([1, 2], ids=[0.5, 1.5]), "no sample id"),
        (lambda: pw.track([{"sample_id": 4}])[0], "id_field='sample_id'"),
        (lambda: pw.track([{"x": 4}], id_field="uid"), "no field 'uid'"),
        (lambda: pw.track(TensorDataset(VALUES), id_field="uid"), "no field 'uid'"),
    ],
)
def test_what_cannot_be_tracked(make: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        make()


def test_dense_ids_store_nothing() -> None:
    index = SampleIndex(range(5))
    assert index.is_dense and index[-1] == 4 and index.number(3) == 3 and list(index) == [0, 1, 2, 3, 4]
    with pytest.raises(pw.DataError):
        index.number(5)
    assert index.hash() == SampleIndex(5).hash() != SampleIndex(6).hash()
    assert SampleIndex(["1"]).hash() != SampleIndex([1]).hash()
