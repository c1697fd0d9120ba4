"""Latency of the pruned network against its share of MACs: at half of the multiply-adds, how much of the time is left?

Uniform one-shot L1 plans (the same share of every group) at half of the MACs, with `round_to` 1 and 8, batch 1 and
32; random weights where none are given: the time does not depend on the values.

Prediction, written before the first run: uniform pruning to half of the MACs keeps about 71 % of the widths. Batch
norm, ReLU and residual sums shrink with the width (0.71), convolutions with the MACs, and Python and dispatch (some
10 µs a call) not at all. At batch 32 I expect 0.55 to 0.65 of the time; at batch 1 ResNet-56, whose 170 calls take 20
µs each, stays near 0.8, and ResNet-18 near 0.6; MobileNetV2, bound by memory, near 0.7. round_to=8 should gain 5 to
10 % where widths are small, as oneDNN pads them to 8 or 16.

    python benchmarks/latency.py [--models resnet56 resnet18 mobilenet_v2] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
from bench import compare, interleaved, one_thread, table, write
from models import build, example
from torch import nn

import prunewise as pw


def cut(model: nn.Module, plan: pw.ChannelPlan, x: torch.Tensor) -> nn.Module:
    """The small network; as a graph module where the user's code has widths written into it."""
    try:
        return pw.apply_plan(model, plan, x).eval()
    except pw.VerificationError:
        from prunewise.core.cost import CostModel
        from prunewise.core.graph import rebuild

        return rebuild(model, CostModel.of(model, x), plan.keep, x).eval()


def report(args: argparse.Namespace, cpu_time: bool, results: list[dict[str, Any]]) -> None:
    rows = [
        [r["model"], r["batch"], r["network"], f"{r['macs']:.3f}", f"{r['base_ms']:.2f}", f"{r['ms']:.2f}", f"{r['ratio']:.3f}",
         f"{r['ratio_low']:.3f} to {r['ratio_high']:.3f}"]
        for r in results
    ]  # fmt: skip
    head = ["model", "batch", "network", "share of MACs", "full, ms", "this, ms", "share of the time", "95 % interval"]
    clock = "processor time of one thread" if cpu_time else "wall time"
    title = f"Forward pass at half of the MACs (uniform L1), {args.device}, {clock} (goal: ≤ 0.6 of the time)\n\n"
    write(args.name, {"device": args.device, "clock": clock, "channels_last": args.channels_last, "rows": results},
          title + table(head, rows), args.seed)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet56", "resnet18", "mobilenet_v2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=15, help="for each model and batch size")
    parser.add_argument(
        "--threads", type=int, default=1, help="1 (default): processor time, which other jobs do not stretch"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--name", default="latency")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    warnings.simplefilter("ignore")
    cpu_time = one_thread(args.device, args.threads)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    results: list[dict[str, Any]] = []
    for name in args.models:
        model = build(name)
        networks: dict[str, tuple[nn.Module, float]] = {"full": (model, 1.0)}
        for multiple in args.round_to:
            x = example(name, 2)
            plan = pw.plan_channels(model, x, budget=pw.Budget(macs=args.budget), round_to=multiple)
            share = plan.cost_after["macs"] / plan.cost_before["macs"]
            networks[f"round_to={multiple}"] = (cut(copy.deepcopy(model), plan, x), share)
        networks["full again"] = (model, 1.0)  # the noise floor
        for network, _ in networks.values():
            network.to(args.device, memory_format=layout)
        for batch in args.batches:
            x = example(name, batch).to(args.device, memory_format=layout)
            with torch.inference_mode():
                times = interleaved(
                    {kind: (lambda m=m, x=x: m(x)) for kind, (m, _) in networks.items()},
                    rounds=args.rounds, seconds=args.seconds, cpu_time=cpu_time,
                )  # fmt: skip
            for kind, (_, share) in networks.items():
                if kind != "full":
                    found = compare(times[kind], times["full"])
                    results.append({"model": name, "batch": batch, "network": kind, "macs": share, **found})
            report(args, cpu_time, results)  # after each, so that an interrupted run leaves what it has


if __name__ == "__main__":
    main()
