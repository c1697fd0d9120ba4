"""Results of benchmark runs: one JSON line a run, appended under a lock; and where and how a number was measured."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


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


def environment(device: torch.device) -> Record:
    """Versions, hardware, time and code state; no host names and no paths."""
    import prunewise

    found = {"python": platform.python_version(), "torch": torch.__version__, "prunewise": prunewise.__version__}
    for name in ("torch-pruning", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    hardware = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {
        "versions": found,
        "hardware": hardware,
        "commit": _commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command(folders: Iterable[str]) -> str:
    """The command line of this process, with the values of the options `folders` replaced by their names."""
    words = [f"python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}"]
    hide = set(folders)
    replace = ""
    for word in sys.argv[1:]:
        option, equals, _ = word.partition("=")
        if replace:
            word, replace = replace, ""
        elif option in hide and equals:
            word = f"{option}={option.lstrip('-').upper()}"
        elif option in hide:
            replace = option.lstrip("-").upper()
        words.append(word)
    return " ".join(words)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by key, in the order of their first appearance."""
    result: dict[Any, list[Record]] = {}
    for record in records:
        result.setdefault(key(record), []).append(record)
    return result


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "src"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
