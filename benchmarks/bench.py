"""What every benchmark here shares: fair timing, a process of its own for memory, and results with their circumstances."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import records
import torch

RESULTS = Path(__file__).parent / "results"
STOPPED = 75  # exit status where the time limit came first: the same command goes on


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks that run in pieces and keep a record of each: the time limit, and the table of the records."""
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help=f"stop before so many seconds, with status {STOPPED}"
    )
    add_table_options(parser)


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks that make a table of their records: see `show_table`."""
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, and run nothing")
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="for --table: these files instead")
    parser.add_argument("--save", metavar="NAME", help="for --table: also into results/NAME.jsonl and .md")


def show_table(
    args: argparse.Namespace,
    path: Path,
    render: Callable[[list[records.Record]], str],
    without: Iterable[str] = (),
) -> None:
    """Print the table of the records at `path`, or of `--results`; with `--save` keep both, but for the fields `without`."""
    found = records.read(args.results or [path])
    text = render(found)
    print(text)
    if args.save:
        records.save(RESULTS / args.save, found, text, without)


class OutOfTime(Exception):
    """The next epoch would end after the time limit."""


class Clock:
    """Stops the process before its time limit."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.start = limit, time.perf_counter()

    @property
    def passed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start

    def require(self, seconds: float) -> None:
        """Raise OutOfTime where another `seconds` would be too much."""
        if self.limit is not None and self.passed + 1.15 * seconds > self.limit:
            raise OutOfTime


def fill(
    path: Path,
    key: Sequence[str],
    cells: Iterable[records.Record],
    measure: Callable[[records.Record], Mapping[str, float]],
    facts: Mapping[str, Any],
    seed: int,
    limit: float | None,
) -> int:
    """Measure the cells that the file lacks, a line each; the exit code. Cells are the same where all of `key` is."""
    done = {tuple(r[name] for name in key) for r in records.read([path]) if r["kind"] == "cell"}
    clock, run, longest, started = Clock(limit), uuid.uuid4().hex[:8], 0.0, False
    for cell in cells:
        if tuple(cell[name] for name in key) in done:
            continue
        try:
            clock.require(longest)
        except OutOfTime:
            print("out of time; the same command goes on from here", file=sys.stderr)
            return STOPPED
        begun = Clock(None)
        found = measure(cell)
        longest = max(longest, begun.passed)
        if not started:
            records.append(path, {"kind": "run", "run": run, **facts, **circumstances(seed)})
            started = True
        records.append(path, {**cell, **found, "run": run})
        print(*(cell[name] for name in key), *(f"{name} {value:.4f}" for name, value in found.items()), flush=True)
    return 0


def circumstances(seed: int) -> dict[str, Any]:
    """Where, when, how and with what this ran."""
    import prunewise

    info = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": records.command(),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "prunewise": prunewise.__version__,
        },
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_1min": round(os.getloadavg()[0], 2),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }
    if torch.cuda.is_available():
        info["hardware"]["gpu"] = torch.cuda.get_device_name()
    try:
        where = Path(__file__).parent
        info["commit"] = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return info


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def one_thread(device: str, threads: int) -> bool:
    """Set the number of threads; whether processor time is the clock to use (one thread, no GPU)."""
    torch.set_num_threads(threads)
    return threads == 1 and not device.startswith("cuda")


def write(name: str, results: Mapping[str, Any], table: str, seed: int = 0) -> None:
    """`results/<name>.json` and `results/<name>.md`; the table is printed too."""
    RESULTS.mkdir(exist_ok=True)
    where = circumstances(seed)
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, "results": results}, indent=1) + "\n")
    hardware = where["hardware"]
    foot = (
        f"`{where['command']}`, {where['date']}, torch {where['versions']['torch']}, {hardware.get('gpu', hardware['cpu'])}, "
        f"{hardware['threads']} threads, load {hardware['load_1min']} (other jobs ran: compare within a row only), seed {seed}."
    )
    (RESULTS / f"{name}.md").write_text(f"{table}\n\n{foot}\n")
    print(table, foot, sep="\n\n")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(v) for v in row) + " |" for row in rows])


def interleaved(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float = 60, warm_up: int = 2, cpu_time: bool = False
) -> dict[str, list[float]]:
    """Seconds of each run, round by round: one call of each in turn, so that what else the machine does hits all alike.

    The order turns from round to round. Stops after `rounds`, or after `seconds` once there are 5 rounds. `cpu_time`: the
    processor time of this process, which a busy machine does not stretch; means what it says with one thread only.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for run in runs.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= 5 and time.perf_counter() > end:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            sync()
            start = clock()
            runs[name]()
            sync()
            times[name].append(clock() - start)
    return times


def compare(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Medians in ms; the median of the ratios within a round, with its quartiles and a 95 % interval (bootstrap)."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    draw = torch.Generator().manual_seed(0)
    sample = torch.tensor(ratios, dtype=torch.float64)
    picks = torch.randint(len(ratios), (2000, len(ratios)), generator=draw)
    medians = sample[picks].quantile(0.5, dim=1)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "ms": statistics.median(times) * 1e3,
        "base_ms": statistics.median(base) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_low": float(medians.quantile(0.025)),
        "ratio_high": float(medians.quantile(0.975)),
        "ratio_q1": quartiles[0],
        "ratio_q3": quartiles[2],
        "best_ratio": min(times) / min(base),
        "rounds": len(ratios),
    }


def in_child(code: str, arguments: Sequence[str], *, timeout: float = 600, path: Sequence[str] = ()) -> dict[str, Any]:
    """Run a Python file in a process of its own; what it prints last is JSON."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [env.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, code, *arguments], capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    out: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return out


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def without_folders(text: str) -> str:
    """Paths of this machine in a text, down to the file and its folder."""
    return re.sub(r"/[\w./-]*/([\w.-]+/[\w.-]+\.py)", r"\1", text)
