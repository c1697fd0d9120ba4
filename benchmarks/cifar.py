"""Accuracy at a share of the MACs: ResNet-20 and ResNet-56 on CIFAR-10, trained gates next to one-shot pruning and Torch-Pruning.

Every method starts from the same given weights and gets the same epochs, batches, augmentation, schedule and optimizer.
Reported is the last epoch's accuracy on the test set, which is read once, at the end of a run. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peers
import records
import torch
from bench import STOPPED, Clock, OutOfTime, add_run_options, circumstances, show_table, table
from data import Cifar10
from methods import METHODS, Job
from models import build
from training import Settings, Trainer, accuracy, load, save

import prunewise as pw

MODELS = ("resnet20", "resnet56")
FAILED = 1

# What makes two runs the same experiment, but for the seed.
SETTINGS = (
    "kind", "model", "method", "epochs", "lr", "budget", "inner_only", "batch_size", "weight_decay", "train_subset", "bf16",
    "tp_reg",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument(
        "--model", default="resnet20,resnet56", help="one or several of resnet20, resnet56 (%(default)s)"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help=f"one or several of {names} (all)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of a run, all phases together (%(default)s)")
    parser.add_argument(
        "--lr", default="0.02", help="peak learning rate, or 'auto': the sweep's choice per method (%(default)s)"
    )
    parser.add_argument(
        "--lr-sweep", metavar="LR,LR,…", help="instead of the runs: try these on the held-out training images"
    )
    parser.add_argument("--sweep-epochs", type=int, metavar="N", help="epochs of the sweep's runs (as --epochs)")
    parser.add_argument("--seeds", default="0", help="for example 0,1,2 (%(default)s); a sweep uses the first")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the MACs to keep at most (%(default)s)")
    parser.add_argument(
        "--inner-only", action="store_true", help="prune inside the blocks only, not the residual streams"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    parser.add_argument(
        "--tp-reg", type=float, default=5e-4, help="strength of tp_group_norm's regulariser (%(default)s)"
    )
    parser.add_argument(
        "--keep-gates", action="store_true", help="remove closed channels at the end only (slower, same function)"
    )
    parser.add_argument(
        "--train-subset", type=int, metavar="N", help="the first N training images (and at most N others): a try"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with CIFAR-10's binary version")
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="folder with cifar10-resnet20.safetensors, …56.safetensors"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/cifar"), help="results, cifar.jsonl (%(default)s)"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="checkpoints of unfinished runs (OUT/work)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--bf16", action="store_true", help="train under bfloat16 autocast (evaluation stays in float32)"
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="train under torch.compile")
    parser.add_argument("--compile-mode", default="default", help="(%(default)s)")
    add_run_options(parser)
    args = parser.parse_args()
    args.model, args.methods = args.model.split(","), args.methods.split(",")
    args.seeds = [int(s) for s in args.seeds.split(",")]
    for name, known in [*((m, MODELS) for m in args.model), *((m, METHODS) for m in args.methods)]:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    if not args.table and (args.data is None or args.weights is None):
        parser.error("--data and --weights are needed")
    return args


def main() -> int:
    args = parse()
    results = args.out / "cifar.jsonl"
    if args.table:
        show_table(args, results, render)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # accuracies, and the check of removal, are in true float32
    device = torch.device(args.device)
    data = Cifar10(args.data, device, args.channels_last)
    clock = Clock(args.time_limit)
    failed = False
    for model, method in itertools.product(args.model, args.methods):
        if METHODS[method].needs_torch_pruning and peers.torch_pruning() is None:
            print(f"{model} {method}: skipped, torch-pruning is not installed", file=sys.stderr)
            continue
        done = records.read([results])
        try:
            for settings in wanted(args, model, method, done):
                if any(same(settings, record) for record in done):
                    print(f"{label(settings)}: done before", flush=True)
                    continue
                try:
                    record = run(args, settings, data, device, clock)
                except (FloatingPointError, pw.NonFiniteError) as error:
                    print(f"{label(settings)}: {error}", file=sys.stderr)
                    if settings["kind"] == "test":
                        failed = True
                        continue
                    record = {**settings, "accuracy": 0.0, "diverged": str(error)}
                records.append(results, record)
                share = record.get("macs_share", math.nan)
                print(f"{label(settings)}: {100 * record['accuracy']:.2f} % at {share:.4f} of the MACs", flush=True)
        except OutOfTime:
            print("out of time; the same command goes on from here", file=sys.stderr)
            return STOPPED
    if args.lr_sweep:
        for model, method in itertools.product(args.model, args.methods):
            choice = chosen_rate(args, model, method, records.read([results]))
            print(f"{model} {method}: learning rate {choice}")
    return FAILED if failed else 0


def wanted(args: argparse.Namespace, model: str, method: str, done: list[records.Record]) -> list[dict[str, Any]]:
    """The settings of the runs to make of one method."""
    common = settings_of(args, model, method)
    if args.lr_sweep:
        rates = [float(r) for r in args.lr_sweep.split(",")]
        common["epochs"] = args.sweep_epochs or args.epochs
        return [{**common, "kind": "sweep", "lr": r, "seed": args.seeds[0]} for r in rates]
    if args.lr == "auto":
        lr = chosen_rate(args, model, method, done)
        if lr is None:
            raise SystemExit(
                f"--lr auto: no sweep of {method} on {model} with these settings; run it with --lr-sweep first"
            )
    else:
        lr = float(args.lr)
    return [{**common, "kind": "test", "lr": lr, "seed": seed} for seed in args.seeds]


def settings_of(args: argparse.Namespace, model: str, method: str) -> dict[str, Any]:
    return {
        "model": model,
        "method": method,
        "epochs": args.epochs,
        "budget": 1.0 if method == "dense" else args.budget,
        "inner_only": (args.inner_only and method != "dense") or METHODS[method].needs_torch_pruning,
        "batch_size": args.batch_size,
        "weight_decay": args.weight_decay,
        "train_subset": args.train_subset,
        "bf16": args.bf16,
        "tp_reg": args.tp_reg if method == "tp_group_norm" else None,
    }


def same(settings: dict[str, Any], record: records.Record) -> bool:
    return all(settings[name] == record[name] for name in (*SETTINGS, "seed"))


def chosen_rate(args: argparse.Namespace, model: str, method: str, done: list[records.Record]) -> float | None:
    """The learning rate with the best held-out accuracy, of the sweep with these settings; the lower one of equals."""
    want = {**settings_of(args, model, method), "kind": "sweep", "epochs": args.sweep_epochs or args.epochs}
    found = [r for r in done if all(r[name] == want[name] for name in want)]
    if not found:
        return None
    return float(min(found, key=lambda r: (-r["accuracy"], r["lr"]))["lr"])


def label(settings: dict[str, Any]) -> str:
    scope = "" if settings["method"] == "dense" else "-inner" if settings["inner_only"] else "-all"
    name = f"{settings['model']}-{settings['method']}{scope}-b{settings['budget']}-e{settings['epochs']}"
    return f"{name}-lr{settings['lr']}-s{settings['seed']}" + ("-sweep" if settings["kind"] == "sweep" else "")


def run(
    args: argparse.Namespace, settings: dict[str, Any], data: Cifar10, device: torch.device, clock: Clock
) -> records.Record:
    """One run, from the beginning or from its checkpoint, to its record."""
    sweep = settings["kind"] == "sweep"
    images = data.train(hold_out=sweep, subset=args.train_subset)
    weights = str(args.weights / f"cifar10-{settings['model']}.safetensors")
    original = build(settings["model"], weights).to(device)
    example = torch.zeros(1, 3, 32, 32, device=device)
    shared = Settings(
        settings["epochs"], settings["lr"], settings["seed"], settings["batch_size"], settings["weight_decay"],
        settings["bf16"], args.channels_last, args.compile, args.compile_mode,
    )  # fmt: skip
    trainer = Trainer(shared, images)
    job = Job(
        build(settings["model"], weights).to(device), example, images, trainer, settings["budget"], settings["inner_only"],
        settings["seed"], args.keep_gates, args.tp_reg,
    )  # fmt: skip
    method = METHODS[settings["method"]](job)

    path = (args.work or args.out / "work") / f"{label(settings)}-{digest(settings)}.pt"
    curve: list[dict[str, Any]] = []
    spent, begun = 0.0, time.perf_counter()
    saved = load(path, device)
    torch.manual_seed(settings["seed"])
    if saved is None:
        clock.require(0)
        method.start()
    else:
        job.notes.update(saved["notes"])
        method.restore(saved["method"], saved["tensors"])
        trainer.model.load_state_dict(saved["tensors"])
        trainer.load_momenta(saved["momenta"])
        curve, spent = saved["curve"], saved["spent"]
        print(f"{label(settings)}: goes on after epoch {len(curve)}", flush=True)

    for phase in method.phases(shared.epochs):
        for epoch in range(max(phase[0], len(curve)), phase[1]):
            clock.require((curve[-1]["seconds"] if curve else 0) + method.surgery_s)
            curve.append(method.train(epoch, phase))
            state = {
                "notes": job.notes, "method": method.state(), "tensors": trainer.model.state_dict(), "momenta": trainer.momenta(),
                "curve": curve, "spent": spent + time.perf_counter() - begun,
            }  # fmt: skip
            save(path, state)
            print(f"{label(settings)}: {curve[-1]}", flush=True)

    small = method.finish().eval()
    wall = spent + time.perf_counter() - begun
    final = data.held_out(args.train_subset) if sweep else data.test(args.train_subset)
    before, after = pw.measure(original, example), pw.measure(small, example)
    record = {
        **settings,
        "accuracy": accuracy(small, final),
        "base_accuracy": accuracy(original, final),
        "evaluated_on": f"{'held-out training' if sweep else 'test'} images, {len(final)}",
        "macs": after.macs,
        "macs_share": after.macs / before.macs,
        "macs_share_flop_counter": peers.counted_macs(small, example) / peers.counted_macs(original, example),
        "params": after.params,
        "params_share": after.params / before.params,
        "widths": {n.removesuffix(".weight"): len(p) for n, p in small.named_parameters() if p.dim() == 4},
        "wall_s": round(wall, 1),
        "train_s": round(sum(row["seconds"] for row in curve), 1),
        "notes": job.notes,
        "curve": curve,
        "device": device.type,
        "channels_last": args.channels_last,
        "compile": args.compile_mode if args.compile else None,
        "resumed": saved is not None,
        **circumstances(settings["seed"]),
    }
    if method.needs_torch_pruning:
        record["versions"]["torch-pruning"] = version("torch-pruning")
    path.unlink(missing_ok=True)
    return record


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]


def render(found: list[records.Record]) -> str:
    """Mean ± standard deviation over seeds; one table a model and schedule."""
    texts = []
    tests = [r for r in found if r["kind"] == "test"]

    def section(r: records.Record) -> tuple[Any, ...]:
        return (
            r["model"],
            r["epochs"],
            r["batch_size"],
            r["weight_decay"],
            r["train_subset"],
            r["bf16"],
            r["evaluated_on"],
        )

    for (model, epochs, batch, decay, subset, bf16, images), members in records.grouped(tests, section).items():
        base = members[0]["base_accuracy"]
        rows = []
        for runs in records.grouped(members, lambda r: tuple(r[name] for name in SETTINGS)).values():
            first = runs[0]
            scope = "–" if first["method"] == "dense" else "inner" if first["inner_only"] else "all"
            values = [100 * r["accuracy"] for r in runs]
            mean = statistics.fmean(values)
            cells = [
                first["method"], scope, str(len(runs)), f"{first['lr']:g}", spread(values), f"{mean - 100 * base:+.2f}",
                spread([r["macs_share"] for r in runs], 4), spread([r["params_share"] for r in runs], 3),
                f"{statistics.fmean([r['train_s'] for r in runs]) / 60:.1f}",
            ]  # fmt: skip
            rows.append((-mean, cells))
        rows.sort(key=lambda row: row[0])
        where = sorted({r["hardware"].get("gpu", r["hardware"]["cpu"]) for r in members})
        texts.append(
            f"**{model}**, {epochs} epochs, batch {batch}, weight decay {decay:g}{', bfloat16' if bf16 else ''}"
            f"{f', first {subset} training images only' if subset else ''}; {images}; given weights {100 * base:.2f} %; "
            f"{', '.join(where)}"
        )
        header = [
            "method", "channels", "runs", "learning rate", "accuracy, %", "change", "MACs share", "parameters share",
            "training, min",
        ]  # fmt: skip
        texts.append(table(header, [cells for _, cells in rows]))
    sweeps = [r for r in found if r["kind"] == "sweep"]
    if sweeps:
        texts.append(
            "Learning rates tried (accuracy on the last 5,000 training images, left out of these runs; the given weights "
            "have seen them; 0: diverged):"
        )
        by = records.grouped(
            sweeps, lambda r: (r["model"], r["method"], "inner" if r["inner_only"] else "all", r["epochs"])
        )
        rates = sorted({r["lr"] for r in sweeps})
        lines = []
        for (model, method, scope, epochs), runs in by.items():
            at = {r["lr"]: 100 * r["accuracy"] for r in runs}
            best = max(at.values())
            cells = [f"**{at[r]:.2f}**" if at.get(r) == best else f"{at[r]:.2f}" if r in at else "–" for r in rates]
            lines.append([f"{model} {method}", scope, str(epochs), *cells])
        texts.append(table(["run", "channels", "epochs", *(f"{r:g}" for r in rates)], lines))
    return "\n\n".join(texts) or "no results"


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation (of the sample); the value alone where there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
