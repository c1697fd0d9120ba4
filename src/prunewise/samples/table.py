"""Scores on disk: a Parquet table, one row a sample, and a JSON manifest that says whose it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunewise._files import is_sha256, opened, read_json, replacing, write_json
from prunewise.core.errors import CheckpointError, PrunewiseError
from prunewise.samples.ids import SampleIndex

if TYPE_CHECKING:
    from prunewise.samples.scores import SampleScores

_KIND, _VERSION = "prunewise/sample-scores", 1
_INTEGERS = ("observations", "hits", "forgetting_events", "first_learnt", "last_missed", "last_wrong")
_DERIVED = ("learnability", "forgetting")  # for readers other than prunewise; computed anew when loaded
_INFO = {
    "mode": str, "task": str, "num_classes": int, "el2n_window": int, "not_counted": dict, "model": str, "seed": int,
    "label_hash": str, "ids": str, "total": int,
}  # fmt: skip


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Where the manifest of a table lies: beside it."""
    return Path(f"{os.fspath(path)}.json")


def write_table(scores: SampleScores, path: str | os.PathLike[str]) -> None:
    """See `SampleScores.to_parquet`."""
    from prunewise.samples.scores import COLUMNS

    arrow, parquet = require_pyarrow()
    for key, kind in _INFO.items():
        value = scores.info.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CheckpointError(f"the scores' info {key}={value!r} is a {type(value).__name__}, not {kind.__name__}")
    columns = {name: getattr(scores, name) for name in (*COLUMNS, *_DERIVED)}
    ids = columns["sample_id"]
    index = SampleIndex(ids.tolist())  # as it will be read
    columns["sample_id"] = list(index) if ids.dtype.kind in "US" else ids
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            parquet.write_table(arrow.table(columns), str(temporary))
            digest = _digest(temporary)
        manifest = {
            "kind": _KIND,
            "version": _VERSION,
            "num_samples": len(scores),
            "sha256": digest,
            "id_hash": index.hash(),
            **{key: scores.info.get(key) for key in _INFO},
        }
        write_json(manifest_path(target), manifest)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def read_table(path: str | os.PathLike[str]) -> SampleScores:
    """See `SampleScores.from_parquet`."""
    from prunewise.samples.scores import COLUMNS, SampleScores

    arrow, parquet = require_pyarrow()
    target = Path(path)
    for file in (target, manifest_path(target)):
        if not file.exists():
            raise CheckpointError(
                f"{file} is missing: name the Parquet file that to_parquet wrote, its manifest beside it"
            )
    manifest = read_json(manifest_path(target))
    where = f"{manifest_path(target)}"
    if manifest.get("kind") != _KIND:
        raise CheckpointError(f"{where} is no manifest of sample scores")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(
            f"{where} is of version {str(manifest.get('version'))[:20]}; this prunewise reads version {_VERSION}"
        )
    for key, kind in _INFO.items():
        value = manifest.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CheckpointError(f"{where} is damaged: {key!r} is no {kind.__name__}")
    if not is_sha256(manifest.get("sha256")) or not is_sha256(manifest.get("id_hash")):
        raise CheckpointError(f"{where} is damaged: its hashes are not valid")
    with opened(target) as stream:
        raw = stream.read()
    if hashlib.sha256(raw).hexdigest() != manifest["sha256"]:
        raise CheckpointError(
            f"{target} is not the table that was saved (its SHA-256 differs from the manifest's): it is truncated, was changed, "
            "or stands beside another table's manifest. Save the scores again, or copy both files again"
        )
    try:
        # without threads: those that still run when a short program ends have been seen to abort it
        table = parquet.read_table(arrow.BufferReader(raw), use_threads=False, pre_buffer=False)
        ids = table.column("sample_id").to_pylist()
        columns = {
            name: table.column(name).to_numpy().astype(np.int64 if name in _INTEGERS else np.float64)
            for name in COLUMNS
            if name != "sample_id"
        }
    except (arrow.ArrowException, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{target} is no table of sample scores: {str(error)[:200]}") from error
    index = SampleIndex(ids)
    if len(index) != manifest.get("num_samples") or index.hash() != manifest["id_hash"]:
        raise CheckpointError(f"{target} does not hold the samples that its manifest names")
    return SampleScores(sample_id=index.array(), info={key: manifest.get(key) for key in _INFO}, **columns)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        PrunewiseError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PrunewiseError(
            "scores are saved as Parquet, which needs pyarrow: pip install 'prunewise[samples]'"
        ) from error
    return pyarrow, pyarrow.parquet
