"""Time of a training step, gated / plain.

Prediction, written before the first run: the gates add one product of each convolution's weight with a vector (0.85 M
parameters in ResNet-56, of 125 M multiply-adds x batch 128), forward and backward, and some 60 small calls each; at batch 128
on a CPU a step takes about 3 s, so the ratio is 1.00 to 1.02. On a GPU in eager mode the step is bound by launches (about 60
layers x 10): some 6 more launches for each gated weight, 1.1 to 1.4; compiled 1.00 to 1.05. Goal: ≤ 1.03.

    python benchmarks/step_time.py [--model resnet56] [--weights cifar10-resnet56.safetensors] [--batch 128] [--compile]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench import compare, interleaved, one_thread, table, write
from models import build, example
from torch import nn

import prunewise as pw


def step_of(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, session: pw.GateSession | None, compiled: bool
) -> Callable[[], None]:
    """One training step: forward, backward, SGD with momentum; and for a gated model its three lines."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        loss = F.cross_entropy(run(x), y)
        if session is not None:
            loss = loss + session.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if session is not None:
            session.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="1 (default): processor time, which other jobs do not stretch"
    )
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--name", default="step_time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    cpu_time = one_thread(args.device, args.threads)
    plain = build(args.model, args.weights).to(args.device).train()
    x = example(args.model, args.batch).to(args.device)
    y = torch.randint(10, (args.batch,), device=args.device)
    # Two phases of a session: all gates open and watched; and closing, where they are set anew every few steps.
    kinds: dict[str, tuple[nn.Module, pw.GateSession | None]] = {"plain": (plain, None)}
    kinds["plain again"] = (copy.deepcopy(plain), None)  # the noise floor: the same thing twice
    for phase, total in (("gated, open", 10**6), ("gated, closing", 10**4)):
        model = copy.deepcopy(plain)
        session = pw.attach_gates(model, x, budget=pw.Budget(macs=args.budget), total_steps=total)
        if phase == "gated, closing":
            session.control.step = int(0.15 * total)
        kinds[phase] = (model, session)
    results = {}
    for compiled in (False, True) if args.compile else (False,):
        mode = "compiled" if compiled else "eager"
        runs = {k: step_of(m, x, y, s, compiled) for k, (m, s) in kinds.items()}
        times = interleaved(runs, rounds=args.rounds, seconds=args.seconds, warm_up=1, cpu_time=cpu_time)
        for kind in runs:
            if kind != "plain":
                results[f"{mode}: {kind}"] = compare(times[kind], times["plain"])
    rows = [
        [k, f"{r['base_ms']:.0f}", f"{r['ms']:.0f}", f"{r['ratio']:.3f}", f"{r['ratio_low']:.3f} to {r['ratio_high']:.3f}",
         f"{r['best_ratio']:.3f}", r["rounds"]]
        for k, r in results.items()
    ]  # fmt: skip
    head = ["step", "plain, ms", "this, ms", "ratio (median)", "95 % interval", "ratio of the fastest", "rounds"]
    clock = "processor time of one thread" if cpu_time else "wall time"
    title = (
        f"Training step of {args.model}, batch {args.batch}, {args.device}, {clock}: gated / plain (goal ≤ 1.03)\n\n"
    )
    write(
        args.name,
        {"batch": args.batch, "device": args.device, "clock": clock, **results},
        title + table(head, rows),
        args.seed,
    )


if __name__ == "__main__":
    main()
