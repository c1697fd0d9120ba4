"""What recording costs: time beside a ResNet-20 training step on a CPU, and memory for ten million samples; next to aum.

Prediction, written before the first run: an update of 128 samples takes 0.1 to 0.3 ms, a step at batch 128 some 500 ms, so
recording is 0.02 to 0.1 % of a step (goal: ≤ 1 %), tracked ids included. aum makes a Python object for each sample and calls
`.item()` three times: 1 to 3 ms. Memory: 40 bytes a sample, 0.4 GB for 10⁷; aum's two dictionaries 200 to 300 bytes, seen
from 10⁶ ids.

    python benchmarks/recording.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import compare, in_child, interleaved, one_thread, table, write
from models import build, example
from torch.utils.data import TensorDataset

import prunewise as pw

UPDATES = 64  # of one measurement: batches are worked out some thirty at a time
CLASSES = 10
MEMORY_BATCH = 4096


def time_parts(batch: int, rounds: int, seconds: float, device: str, cpu_time: bool) -> dict[str, list[float]]:
    """Seconds of a training step, and of what recording adds to `UPDATES` of them. Ids come from the loader: on the CPU."""
    n = 50_000
    model = build("resnet20").to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, y = example("resnet20", batch).to(device), torch.randint(CLASSES, (batch,), device=device)
    batches = [(torch.randperm(n)[:batch], torch.randn(batch, CLASSES, device=device), y) for _ in range(UPDATES)]
    recorder = pw.LearnabilityRecorder(n)
    plain = TensorDataset(torch.zeros(n, 1), torch.zeros(n, dtype=torch.long))
    tracked = pw.track(plain)

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def record() -> None:
        for ids, logits, labels in batches:
            recorder.update(ids, logits, labels)

    def fetch(dataset: Any) -> Callable[[], None]:
        def run() -> None:
            for ids, _, _ in batches:
                torch.utils.data.default_collate([dataset[i] for i in ids.tolist()])

        return run

    runs = {"step": step, "prunewise": record, "fetch": fetch(plain), "fetch tracked": fetch(tracked)}
    try:
        from aum import AUMCalculator
    except ImportError:
        print("aum is not installed: its row is skipped")
    else:
        calculator = AUMCalculator("/tmp")

        def peer() -> None:
            for ids, logits, labels in batches:
                calculator.update(logits, labels, ids.tolist())

        runs["aum"] = peer
    return interleaved(runs, rounds=rounds, seconds=seconds, warm_up=1, cpu_time=cpu_time)


def resident_mib() -> float:
    """Resident memory of this process now; a peak from before (the ids were drawn) would hide what comes after."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(which: str, n: int) -> dict[str, Any]:
    """Resident memory that one pass over n samples adds, and the seconds that its updates take."""
    ids = torch.randperm(n)
    logits, labels = torch.randn(MEMORY_BATCH, CLASSES), torch.randint(CLASSES, (MEMORY_BATCH,))
    if which == "prunewise":
        recorder: Any = pw.LearnabilityRecorder(n)
        warm = pw.LearnabilityRecorder(MEMORY_BATCH)
        warm.update(torch.arange(MEMORY_BATCH), logits, labels)
        warm.scores()
    else:
        from aum import AUMCalculator

        recorder = AUMCalculator("/tmp")
    before = resident_mib()
    start = time.process_time()
    for part in ids.split(MEMORY_BATCH):
        given = logits[: len(part)], labels[: len(part)]
        if which == "prunewise":
            recorder.update(part, *given)
        else:
            recorder.update(*given, part.tolist())
    seconds = time.process_time() - start
    found = {"samples": n, "mib": round(resident_mib() - before, 1), "seconds": round(seconds, 1)}
    found["bytes_a_sample"] = round(found["mib"] * 2**20 / n, 1)
    if which == "prunewise":
        found["state_bytes_a_sample"] = recorder.nbytes / n
        scores = recorder.scores()
        assert len(scores) == n  # still held
        found["mib_with_scores"] = round(resident_mib() - before, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--samples", type=int, default=10_000_000, help="for the memory of prunewise (%(default)s)")
    parser.add_argument("--aum-samples", type=int, default=1_000_000, help="for that of aum (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", nargs=2, metavar=("WHICH", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    cpu_time = one_thread(args.device, 1)
    torch.manual_seed(args.seed)
    if args.memory_of:
        import json

        print(json.dumps(memory(args.memory_of[0], int(args.memory_of[1]))))
        return
    times = time_parts(args.batch, args.rounds, args.seconds, args.device, cpu_time)
    step = times.pop("step")
    tracking = [max(0.0, a - b) for a, b in zip(times.pop("fetch tracked"), times.pop("fetch"), strict=True)]
    times["prunewise, with tracked ids"] = [a + b for a, b in zip(times["prunewise"], tracking, strict=True)]
    results: dict[str, Any] = {k: compare([t / UPDATES for t in v], step) for k, v in times.items()}
    rows = [
        [k, f"{r['ms']:.3f}", f"{r['base_ms']:.0f}", f"{100 * r['ratio']:.3f} %",
         f"{100 * r['ratio_low']:.3f} to {100 * r['ratio_high']:.3f} %", r["rounds"]]
        for k, r in results.items()
    ]  # fmt: skip
    parts = [
        f"What recording adds to a training step of ResNet-20, batch {args.batch}, {args.device}, "
        + ("processor time of one thread (goal: ≤ 1 %)" if cpu_time else "time on the clock (goal: ≤ 0.1 ms)"),
        table(["recorder", "a batch, ms", "step, ms", "share of a step (median)", "95 % interval", "rounds"], rows),
    ]
    used = {}
    for which, n in (("prunewise", args.samples), ("aum", args.aum_samples)):
        if which == "prunewise" or which in times:
            used[which] = in_child(__file__, ["--memory-of", which, str(n)], timeout=1200)
    results["memory"] = used
    rows = [
        [k, f"{m['samples']:,}", m["mib"], m["bytes_a_sample"], m.get("mib_with_scores", ""), m["seconds"]]
        if "error" not in m else [k, m["error"]]
        for k, m in used.items()
    ]  # fmt: skip
    parts += [
        f"Memory that one pass over all samples adds, batches of {MEMORY_BATCH:,}, ids in random order, plain ints for aum",
        table(
            ["recorder", "samples", "MiB", "bytes a sample", "MiB with scores()", "processor s of all updates"], rows
        ),
    ]
    name = "recording" if cpu_time else "recording_gpu"
    write(name, {"batch": args.batch, "device": args.device, **results}, "\n\n".join(parts), args.seed)


if __name__ == "__main__":
    sys.exit(main())
