"""What the options of the gates change: control, slope of the gate function, initial value, schedule.

A small residual network on scikit-learn's digits (embedded, real), trained once a seed, then pruned to a tenth of its MACs in
a few epochs by every variant, from the same weights and with the same batches. Digits are easy: the budget is harsh so that
the variants differ. Accuracy is the last epoch's, over all seeds; the test loss tells more than the accuracy does.

Prediction, written before the first run: slope and initial value change nothing under the default control, which uses the
gates' gradients relative to each other (a common factor cancels): the same plans. Under "descent" they matter: a sigmoid's
slope holds far gates back, a large initial value delays. Default against descent: + 1 point. One-shot "hybrid" is within
0.3 of the default. Closing over 60 % of the steps loses 0.5 against 20 %.

    python benchmarks/ablation.py [--seeds 0,1,2,3,4] [--macs 0.1] [--epochs 6]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench import table, write
from torch import nn

import prunewise as pw
from prunewise.channels import importance
from prunewise.channels.control import Schedule
from prunewise.channels.gate import sigmoid_slope
from prunewise.cli.digits import Digits, DigitsResNet, load_digits

BATCH = 64
ONE_SHOT: dict[str, dict[str, Any]] = {
    "one shot: random, uniform": {"importance": "random"},
    "one shot: magnitude, uniform": {"importance": "magnitude"},
    "one shot: taylor, global": {"importance": "taylor"},
    "one shot: hybrid, global": {"importance": "hybrid"},
}
POWERS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the diminishing returns; 0.5 is "hybrid"
GATES: dict[str, dict[str, Any]] = {
    "default": {},
    "default, slope of a sigmoid": {"shaping": sigmoid_slope},
    "default, initial 0.1": {"initial": 0.1},
    "default, initial 3": {"initial": 3.0},
    "default, closes at 10 %": {"schedule": Schedule(observe=0.05, close=0.1)},
    "default, closes at 40 %": {"schedule": Schedule(close=0.4)},
    "default, closes at 60 %": {"schedule": Schedule(close=0.6)},
    "descent": {"control": "descent"},
    "descent, slope of a sigmoid": {"control": "descent", "shaping": sigmoid_slope},
    "descent, initial 0.1": {"control": "descent", "initial": 0.1},
    "descent, initial 3": {"control": "descent", "initial": 3.0},
    "descent, closes at 40 %": {"control": "descent", "schedule": Schedule(close=0.4)},
    "descent, closes at 60 %": {"control": "descent", "schedule": Schedule(close=0.6)},
}


def train(
    model: nn.Module, data: Digits, epochs: int, lr: float, seed: int,
    extra: Callable[[], torch.Tensor] | None = None, after: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """SGD with a cosine; the batches depend on the seed alone."""
    draw = torch.Generator().manual_seed(seed)
    steps = -(-len(data.train_targets) // BATCH) * epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_targets), generator=draw).split(BATCH):
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_targets[batch])
            optimizer.zero_grad()
            (loss if extra is None else loss + extra()).backward()
            optimizer.step()
            schedule.step()
            if after is not None:
                after()


@torch.no_grad()
def score(model: nn.Module, data: Digits) -> dict[str, float]:
    """Accuracy in percent and mean loss on the test set."""
    logits = model.eval()(data.test_images)
    return {
        "accuracy": 100 * float((logits.argmax(1) == data.test_targets).double().mean()),
        "loss": float(F.cross_entropy(logits, data.test_targets)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--macs", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(s) for s in args.seeds.split(",")]
    budget = pw.Budget(macs=args.macs)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        data = load_digits(seed)
        example = data.test_images[:1]
        trained = DigitsResNet()
        train(trained, data, 10, 0.05, seed)
        batches = list(zip(data.train_images.split(BATCH), data.train_targets.split(BATCH), strict=True))
        runs.setdefault("not pruned, the same epochs more", [])
        runs["not pruned, the same epochs more"].append(_dense(trained, data, args, seed))
        for name, options in ONE_SHOT.items():
            plan = pw.plan_channels(trained, example, budget=budget, seed=seed, data=batches, **options)
            small = pw.apply_plan(trained, plan, example)
            train(small, data, args.epochs, args.lr, seed)
            runs.setdefault(name, []).append({**score(small, data), "keep": _widths(plan)})
        for power in POWERS:
            plan = pw.plan_channels(
                trained, example, budget=budget, importance=_diminishing(power, batches), allocation="global"
            )
            small = pw.apply_plan(trained, plan, example)
            train(small, data, args.epochs, args.lr, seed)
            name = f"one shot: taylor in the order of magnitude, (size / k)^{power:g}"
            runs.setdefault(name, []).append({**score(small, data), "keep": _widths(plan)})
        for name, options in GATES.items():
            model = copy.deepcopy(trained)
            steps = -(-len(data.train_targets) // BATCH) * args.epochs
            gates = pw.attach_gates(model, example, budget=budget, total_steps=steps, **options)
            train(model, data, args.epochs, args.lr, seed, gates.penalty, gates.step)
            plan = gates.harden()
            runs.setdefault(name, []).append({**score(gates.finish(), data), "keep": _widths(plan)})
        print(f"seed {seed} done", flush=True)
    rows, results = [], {}
    for name, each in runs.items():
        row: dict[str, Any] = {"runs": each}
        for key in ("accuracy", "loss"):
            values = [r[key] for r in each]
            row[f"{key}_mean"] = statistics.fmean(values)
            row[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
        same = sum(r["keep"] == d["keep"] for r, d in zip(each, runs["default"], strict=True))
        results[name] = row
        rows.append(
            [name, f"{row['accuracy_mean']:.2f} ± {row['accuracy_deviation']:.2f}",
             f"{row['loss_mean']:.4f} ± {row['loss_deviation']:.4f}", f"{same} of {len(each)}"]
        )  # fmt: skip
    title = f"Digits, a small ResNet, {args.macs:g} of the MACs, {args.epochs} epochs, {len(seeds)} seeds (mean ± deviation)\n\n"
    head = ["variant", "test accuracy, %", "test loss", "plans equal to the default's"]
    write("ablation", results, title + table(head, rows), seeds[0])


def _dense(trained: nn.Module, data: Digits, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    model = copy.deepcopy(trained)
    train(model, data, args.epochs, args.lr, seed)
    return {**score(model, data), "keep": {}}


def _diminishing(power: float, batches: list[Any]) -> Callable[..., dict[str, Any]]:
    """Taylor masses in the order of magnitude, the k-th highest times (size / k)^power."""

    def scored(model: nn.Module, groups: Any) -> dict[str, Any]:
        masses, ranks = importance.taylor(model, groups, data=batches), importance.magnitude(model, groups)
        return {g.name: importance.in_order_of(masses[g.name], ranks[g.name], g.size, power) for g in groups}

    return scored


def _widths(plan: pw.ChannelPlan) -> dict[str, list[int]]:
    return {name: list(kept) for name, kept in plan.keep.items()}


if __name__ == "__main__":
    main()
