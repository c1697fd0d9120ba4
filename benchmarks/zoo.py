"""Every architecture at hand: traced, gated, pruned and checked, stage by stage; and the same models given to a peer.

Each model has a process of its own, with a limit of processor time. What has a record is not done again.

    python benchmarks/zoo.py [--suite timm] [--only 'timm/res*'] [--kind smallest] [--jobs 2] [--out runs/zoo]
    python benchmarks/zoo.py --peer torch-pruning
    python benchmarks/zoo.py --table [--out runs/zoo]
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import records
import torch
from bench import circumstances
from zoo_models import SUITES, Entry, entries
from zoo_stages import examine
from zoo_table import write_table

import prunewise as pw

Facts = dict[str, Any]
OURS = "prunewise"
PATIENCE = 12  # seconds on the clock for one of processor time


@dataclass
class Child:
    """A process that works on one entry, and what it has reported."""

    entry: Entry
    process: BaseProcess
    reports: Connection
    start: float
    stages: dict[str, Facts] = field(default_factory=dict)
    running: str = ""

    @classmethod
    def of(cls, entry: Entry, work: Callable[..., None], options: argparse.Namespace) -> Child:
        # Forked: the libraries are imported once, not for each of some hundreds of models.
        context = multiprocessing.get_context("fork")
        reports, end = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(entry, work, options, end), daemon=True)
        process.start()
        end.close()
        return cls(entry, process, reports, time.perf_counter())

    def over(self, limit_s: float) -> bool:
        """Take in reports; whether the child has ended, by itself or at a limit."""
        alive = self.process.is_alive()
        try:
            while self.reports.poll():
                self.running, facts = self.reports.recv()
                if facts:
                    self.stages[self.running], self.running = facts, ""
        except EOFError:
            pass
        if alive and time.perf_counter() - self.start > PATIENCE * limit_s:  # it waits for something
            self.process.kill()
            self.process.join()
            alive = False
        if self.running and not alive:
            late = self.process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            why = f"not done after {limit_s:.0f} s" if late else f"the process ended with {self.process.exitcode}"
            self.stages[self.running] = {"right": False, "error": why}
        return not alive


def _work(entry: Entry, work: Callable[..., None], options: argparse.Namespace, end: Connection) -> None:
    # Processor time, which a busy machine does not stretch.
    resource.setrlimit(resource.RLIMIT_CPU, (options.limit_s, options.limit_s + 5))
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work(entry, options, lambda stage, facts: end.send((stage, facts)))
    end.close()


def run(chosen: list[Entry], tool: str, path: Path, options: argparse.Namespace) -> None:
    """Work on all entries, some at a time, and add a record for each."""
    if tool == OURS:
        work = examine
    else:
        from zoo_peers import PEERS

        work = PEERS[tool]
    where = circumstances(options.seed)
    waiting, children = chosen[::-1], []  # type: ignore[var-annotated]
    while waiting or children:
        while waiting and len(children) < options.jobs:
            children.append(Child.of(waiting.pop(), work, options))
        time.sleep(0.05)
        for child in [c for c in children if c.over(options.limit_s)]:
            children.remove(child)
            entry = child.entry
            seconds = round(time.perf_counter() - child.start, 2)
            record = {
                "id": entry.id, "suite": entry.suite, "family": entry.family, "kind": entry.kind, "tool": tool,
                "seconds": seconds, "stages": _plain(child.stages), "skip": options.skip, "limit_s": options.limit_s, **where,
            }  # fmt: skip
            records.append(path, record)
            wrong = [f"{k}: {v.get('error', 'wrong')}" for k, v in child.stages.items() if not v["right"]]
            print(f"{entry.id}  {seconds:.0f} s  {'; '.join(wrong)[:300] or 'right'}", flush=True)


def warm_up() -> None:
    """Load in the parent what every child needs: imports, and what torch's tracing loads when it is first used."""
    for name in ("timm", "torchvision", "transformers.modeling_utils", "prunewise.recipes"):
        importlib.import_module(name)
    importlib.import_module("transformers").logging.set_verbosity_error()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    model, x = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)), torch.zeros(2, 2)
    pw.channel_groups(model, x)
    torch.export.export(model, (x,), strict=False)


def _covers(skipped: str, skip: str) -> bool:
    """Whether a record that left out some stages holds all that are wanted now."""
    return set(filter(None, skipped.split(","))) <= set(skip.split(","))


def _plain(value: Any) -> Any:
    """JSON holds no infinity, and four digits are enough."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < float("inf") else str(value)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", help=f"some of {','.join(SUITES)}, in this order")
    parser.add_argument("--only", default="*", help="entries SUITE/NAME that fit this shell pattern")
    parser.add_argument("--kind", choices=("smallest", "second"))
    parser.add_argument("--redo", action="store_true", help="also entries that have a record")
    parser.add_argument("--redo-wrong", action="store_true", help="also entries of which some stage was not right")
    parser.add_argument("--limit-s", type=int, default=120, help="processor time for one model (%(default)s)")
    parser.add_argument("--skip", default="", help="stages to leave out, with commas between")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=("torch-pruning",), help="give the models to this instead of prunewise")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--table", action="store_true", help="write results/zoo.md from the records")
    options = parser.parse_args()
    path = options.out / "zoo.jsonl"
    if options.table:
        return write_table(records.read([path]))
    tool = options.peer or OURS
    last = {r["id"]: r for r in records.read([path]) if r["tool"] == tool and _covers(r["skip"], options.skip)}
    suites = options.suite.split(",") if options.suite else SUITES
    chosen = [
        e
        for e in entries()
        if e.suite in suites and fnmatch.fnmatch(e.id, options.only) and e.kind == (options.kind or e.kind)
        if e.id not in last
        or options.redo
        or (options.redo_wrong and not all(s["right"] for s in last[e.id]["stages"].values()))
    ]
    chosen.sort(key=lambda e: (e.kind == "second", suites.index(e.suite)))
    warm_up()
    run(chosen, tool, path, options)


if __name__ == "__main__":
    main()
