"""Scores as a table: what comes back, and what is refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunewise as pw
from prunewise.samples.scores import COLUMNS

pytest.importorskip("pyarrow")
N = 12
LABELS = torch.arange(N) % 3


def made(ids: Any = None, labels: Any = LABELS, seed: int = 0) -> pw.SampleScores:
    rec = pw.LearnabilityRecorder(N, ids=ids)
    z = torch.randn(3, N, 3, generator=torch.Generator().manual_seed(seed))
    for epoch in range(3):
        rec.update(torch.arange(1, N), z[epoch, 1:], LABELS[1:])
    return rec.scores(labels, model="mlp", seed=seed)


@pytest.mark.parametrize("ids", [None, [f"ä-{i}" for i in range(N)], [i * 100 for i in range(N)]])
def test_what_was_saved_comes_back(tmp_path: Path, ids: Any) -> None:
    s = made(ids)
    s.to_parquet(tmp_path / "deep" / "s.parquet")
    own = np.int64(N) if ids is None else ids
    back = pw.SampleScores.from_parquet(tmp_path / "deep" / "s.parquet", targets=LABELS, sample_ids=own)
    for name in (*COLUMNS, "learnability", "forgetting"):
        np.testing.assert_array_equal(getattr(back, name), getattr(s, name), err_msg=name)
    assert dict(back.info) == dict(s.info)
    assert back.info["model"] == "mlp" and back.info["mode"] == "train" and back.info["label_hash"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["s.parquet", "s.parquet.json"]


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    for ids in (None, [f"a{i}" for i in range(N)]):
        made(ids).take([]).to_parquet(path)
        assert len(pw.SampleScores.from_parquet(path, sample_ids=0)) == 0
    path.unlink()
    with pytest.raises(pw.DataError, match="sample id 3 stands twice"):
        made().take([3, 3]).to_parquet(path)
    assert not path.exists()


def test_other_readers_find_one_row_a_sample(tmp_path: Path) -> None:
    import pyarrow.parquet

    s = made()
    s.to_parquet(tmp_path / "s.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "s.parquet")
    assert table.num_rows == N and set(COLUMNS) | {"learnability", "forgetting"} == set(table.column_names)
    np.testing.assert_array_equal(table.column("learnability").to_numpy(), s.learnability)


def test_saving_again_replaces(tmp_path: Path) -> None:
    made(seed=1).to_parquet(tmp_path / "s.parquet")
    made(seed=2).to_parquet(tmp_path / "s.parquet")
    back = pw.SampleScores.from_parquet(tmp_path / "s.parquet")
    np.testing.assert_array_equal(back.aum, made(seed=2).aum)
    assert back.info["seed"] == 2


def test_another_data_set_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    made(ids=[f"a{i}" for i in range(N)]).to_parquet(path)
    flipped = LABELS.clone()
    flipped[3] = 0 if flipped[3] else 1
    for given, message in (
        ({"targets": flipped}, "not the labels that the scores were recorded with"),
        ({"targets": LABELS[:-1]}, "11 labels for the scores of 12"),
        ({"sample_ids": [f"b{i}" for i in range(N)]}, "scores of another data set"),
        ({"sample_ids": N}, "scores of another data set"),
        ({"sample_ids": 2.5}, "sample_ids=2.5 should be the ids"),
        ({"sample_ids": True}, "sample_ids=True should be the ids"),
        ({"sample_ids": -1}, "sample_ids=-1 should be the ids"),
    ):
        with pytest.raises(pw.DataError, match=message):
            pw.SampleScores.from_parquet(path, **given)  # type: ignore[arg-type]
    assert len(pw.SampleScores.from_parquet(path, targets=LABELS.tolist())) == N  # the same labels in another container
    assert len(pw.SampleScores.from_parquet(path, targets=LABELS.float().numpy())) == N


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_tables(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s.parquet"
    made().to_parquet(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(pw.CheckpointError, match="truncated"):
        pw.SampleScores.from_parquet(path)


def test_damaged_manifests(tmp_path: Path) -> None:
    path, manifest = tmp_path / "s.parquet", tmp_path / "s.parquet.json"
    made().to_parquet(path)
    good = json.loads(manifest.read_text())
    for change, message in (
        ({"kind": "other"}, "no manifest"), ({"version": 7}, "version 7"), ({"sha256": "x"}, "hashes"),
        ({"num_samples": 3}, "does not hold the samples"), ({"mode": 3}, "'mode' is no str"), ({"seed": True}, "'seed'"),
    ):  # fmt: skip
        manifest.write_text(json.dumps({**good, **change}))
        with pytest.raises(pw.CheckpointError, match=message):
            pw.SampleScores.from_parquet(path)
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(pw.CheckpointError, match="damaged"):
        pw.SampleScores.from_parquet(path)
    manifest.unlink()
    with pytest.raises(pw.CheckpointError, match="json is missing"):
        pw.SampleScores.from_parquet(path)
    with pytest.raises(pw.CheckpointError, match="other.parquet is missing"):
        pw.SampleScores.from_parquet(tmp_path / "other.parquet")


def test_a_parquet_file_of_something_else(tmp_path: Path) -> None:
    import hashlib

    import pyarrow
    import pyarrow.parquet

    path, manifest = tmp_path / "s.parquet", tmp_path / "s.parquet.json"
    made().to_parquet(path)
    pyarrow.parquet.write_table(pyarrow.table({"sample_id": [1, 2]}), path)
    good = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**good, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    with pytest.raises(pw.CheckpointError, match="no table of sample scores"):
        pw.SampleScores.from_parquet(path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pw.CheckpointError, match="cannot be written"):
        made().to_parquet(tmp_path / "file" / "s.parquet")


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(pw.PrunewiseError, match="pip install 'prunewise.samples.'"):
        made().to_parquet(tmp_path / "s.parquet")
    assert list(tmp_path.iterdir()) == []


def test_labels_of_the_wrong_number_are_an_error_of_scores() -> None:
    with pytest.raises(pw.DataError, match="11 labels for 12 samples"):
        made(labels=LABELS[1:])


def test_difficulty_is_higher_for_harder() -> None:
    s = made()
    np.testing.assert_array_equal(s.difficulty("aum"), -s.aum)
    np.testing.assert_array_equal(s.difficulty("loss"), s.loss)
    with pytest.raises(pw.DataError, match="'size' is no score of difficulty"):
        s.difficulty("size")


def test_some_by_number_or_by_mask() -> None:
    scores = made(ids=[i * 100 for i in range(N)])
    mask = np.zeros(N, bool)
    mask[[3, 4]] = True
    assert scores.take(mask).sample_id.tolist() == scores.take([3, 4]).sample_id.tolist() == [300, 400]
    assert len(scores.take([])) == 0
    for wrong in ([1.7], [N], [-1], [True], [[1]], ["a"], [[1], [2, 3]]):
        with pytest.raises(pw.DataError, match=f"numbers of samples, from 0 to {N - 1}"):
            scores.take(wrong)


@pytest.mark.parametrize("ids", [[-1, 1 << 63], ["a", "a\0"], ["a", "\udc80"]])
def test_ids_that_no_file_keeps(ids: Any) -> None:
    with pytest.raises(pw.DataError, match="cannot be kept"):
        pw.LearnabilityRecorder(2, ids=ids)


def test_labels_of_any_kind() -> None:
    assert made(labels=LABELS.bfloat16()).info["label_hash"] == made().info["label_hash"]
    assert made(labels=LABELS.to(torch.float8_e4m3fn)).info["label_hash"] == made().info["label_hash"]
    for none in ([[1], [2, 3]] * (N // 2), LABELS.to_sparse(), LABELS.to("meta")):
        with pytest.raises(pw.DataError, match="no array"):
            made(labels=none)
