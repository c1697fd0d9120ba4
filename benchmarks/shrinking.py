"""Time that shrinking saves: a whole gated training with `shrink_every`, without it, and without gates.

Prediction, written before the first run: the gates watch for 10 % of the steps and have met half of the MACs after 20 %.
A step at half the MACs takes 0.6 to 0.7 of a full one on a CPU (narrow layers are less efficient, and what is not a
convolution shrinks less). So 0.15 + 0.85 x 0.65 = 0.70 of the time of the plain training, the cuts themselves (two to
five, each a trace and a proof, about 2 s for ResNet-56) not counted; gates without shrinking 1.0 to 1.03.

    python benchmarks/shrinking.py [--model resnet56] [--weights FILE] [--steps 100] [--batch 128]
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from bench import one_thread, table, write
from models import build, example
from torch import nn

import prunewise as pw


class Training:
    """One training run, a step at a time, on the batches it is given; `seconds` of every step."""

    def __init__(
        self, model: nn.Module, x: torch.Tensor, steps: int, budget: float | None, every: int | None,
        include: str | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.every = every
        self.gates = None
        if budget is not None:
            self.gates = pw.attach_gates(
                model, x, budget=pw.Budget(macs=budget), total_steps=steps, shrink_every=every, include=include
            )
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        self.seconds: list[float] = []

    def step(self, x: torch.Tensor, y: torch.Tensor, clock: object) -> None:
        start = clock()  # type: ignore[operator]
        loss = F.cross_entropy(self.model(x), y)
        if self.gates is not None:
            loss = loss + self.gates.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.gates is not None:
            self.gates.step(self.optimizer)
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(clock() - start)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="of the whole training (%(default)s)")
    parser.add_argument("--every", type=int, help="shrink_every (a tenth of the steps)")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument(
        "--include", default="layer*.conv1",
        help="groups (%(default)s: inside the blocks; the padding of option A shortcuts has its streams' widths in the "
        "code, so that a model of the same class cannot lose any of their channels)",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="1 (default): processor time, which other jobs do not stretch"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="shrinking")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    clock = time.process_time if one_thread(args.device, args.threads) else time.perf_counter
    plain = build(args.model, args.weights).to(args.device).train()
    x = example(args.model, args.batch).to(args.device)
    every = args.every or max(1, args.steps // 10)
    runs = {
        "plain": Training(plain, x, args.steps, None, None),
        "gates": Training(copy.deepcopy(plain), x, args.steps, args.budget, None, args.include),
        "gates, shrinking": Training(copy.deepcopy(plain), x, args.steps, args.budget, every, args.include),
    }
    names = list(runs)
    for number in range(args.steps):  # a step of each in turn, so that what else the machine does hits all alike
        x = example(args.model, args.batch).to(args.device)
        y = torch.randint(10, (args.batch,), device=args.device)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            runs[name].step(x, y, clock)
    results, rows = {}, []
    base = sum(runs["plain"].seconds)
    for name, run in runs.items():
        kept = (
            1.0 if run.gates is None else run.gates.harden().cost_after["macs"] / run.gates.harden().cost_before["macs"]
        )
        cuts = [s for i, s in enumerate(run.seconds, 1) if run.every and i % run.every == 0]
        last = run.seconds[-max(1, args.steps // 10) :]
        results[name] = {
            "seconds": round(sum(run.seconds), 2),
            "share_of_plain": round(sum(run.seconds) / base, 4),
            "last_tenth_share_of_plain": round(sum(last) / sum(runs["plain"].seconds[-len(last) :]), 4),
            "slowest_step_seconds": round(max(cuts, default=0.0), 2),
            "macs_share": round(kept, 4),
            "step_seconds": [round(s, 4) for s in run.seconds],
        }
        r = results[name]
        rows.append(
            [name, f"{kept:.3f}", r["seconds"], f"{r['share_of_plain']:.3f}", f"{r['last_tenth_share_of_plain']:.3f}"]
        )
    head = ["training", "MACs at the end", "seconds", "time / plain", "last tenth / plain"]
    clock_name = "processor time of one thread" if clock is time.process_time else "wall time"
    title = (
        f"A training of {args.steps} steps of {args.model}, batch {args.batch}, {args.device}, {clock_name}; "
        f"`shrink_every={every}`; the time of cutting is counted\n\n"
    )
    write(args.name, results, title + table(head, rows), args.seed)


if __name__ == "__main__":
    main()
