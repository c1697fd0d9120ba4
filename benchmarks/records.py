"""Results of benchmark runs: one JSON line a run, appended under a lock."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_PATHS = ("--data", "--weights", "--out", "--results", "--work", "--human")  # options that name places on this machine


def append(path: Path, record: Record) -> None:
    """Add one line to `path`: whole or not at all, also with several writers, and after a writer was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of these files; a line that a killed writer left half written is passed over."""
    records = []
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def command() -> str:
    """The command line of this process, with files and folders of this machine replaced by the options' names."""
    words = [f"python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}"]
    replace = ""
    for word in sys.argv[1:]:
        option, equals, _ = word.partition("=")
        if replace:
            word, replace = replace, ""
        elif option in _PATHS and equals:
            word = f"{option}={option.lstrip('-').upper()}"
        elif option in _PATHS:
            replace = option.lstrip("-").upper()
        words.append(word)
    return " ".join(words)


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by key, in the order of their first appearance."""
    result: dict[Any, list[Record]] = {}
    for record in records:
        result.setdefault(key(record), []).append(record)
    return result


def save(base: Path, found: Iterable[Record], text: str, without: Iterable[str] = ()) -> None:
    """`base`.jsonl, one record a line but for the fields `without`, and `base`.md, the table."""
    dropped = set(without)
    lines = [json.dumps({k: v for k, v in record.items() if k not in dropped}) for record in found]
    base.parent.mkdir(exist_ok=True)
    base.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    base.with_suffix(".md").write_text(text + "\n")
