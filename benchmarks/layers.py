"""Sparsity by layer: accuracy under each allocator, for three pruning methods, two architectures and two data sets.

One total sparsity, one pruning method; only the split between layers differs. Weights are removed at once from a dense network;
then nothing more is done ("none"), batch norm's statistics are taken anew ("norm"), or the network is trained for a short while
("tune"). See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import records
import torch
import torch.nn.functional as F
from bench import add_run_options, fill, show_table, table
from data import DATA_SETS, Images
from models import SMALL
from safetensors.torch import load_file
from torch import nn
from training import Settings, Trainer

import prunewise as pw
from prunewise.layers import importance as imp
from prunewise.layers.allocate import allocation
from prunewise.layers.allocators import Total
from prunewise.layers.ranking import among_highest, capacity_costs
from prunewise.layers.sparsify import make_permanent_
from prunewise.layers.weights import find_layers

DEFAULT = "capacity"
ALLOCATORS = (
    DEFAULT, "uniform", "erk", "lamp", "global_magnitude", "owl", "alpha", "params", "stable_rank", "effective_rank", "rate",
    "taylor", "fisher", "loss_increase",
)  # fmt: skip
METHODS = ("random", "magnitude", "channel_l1")
RECOVERIES = ("none", "norm", "tune")
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
CALIBRATION = 256  # training images that allocators see, the first ones
RENEWAL = 1024  # training images that batch norm's statistics are taken anew from, the first ones

# What makes two cells the same.
KEY = (
    "dataset", "model", "recover", "allocator", "method", "sparsity", "seed", "images", "tune_images", "tune_lr",
)  # fmt: skip

Plans = Callable[[float], pw.SparsityPlan]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--dataset", choices=DATA_SETS, default="cifar10", help="(%(default)s)")
    parser.add_argument("--model", choices=SMALL, default="resnet56", help="(%(default)s)")
    parser.add_argument(
        "--allocators",
        type=several,
        default=list(ALLOCATORS),
        help="one or several (all); also capacity:K:S:A",
    )
    parser.add_argument("--methods", type=several, default=list(METHODS), help=f"of {', '.join(METHODS)} (all)")
    parser.add_argument("--recover", type=several, default=["none", "norm"], help="of none, norm, tune (none,norm)")
    parser.add_argument("--sparsities", type=several, default=[str(s) for s in SPARSITIES], help="(0.3 … 0.98)")
    parser.add_argument("--seeds", type=several, default=["0", "1", "2"], help="where random enters (0,1,2)")
    parser.add_argument("--images", type=int, metavar="N", help="the first N test images only: a try")
    parser.add_argument(
        "--tune-images", type=int, default=12_800, help="training images of 'tune', one pass (%(default)s)"
    )
    parser.add_argument("--tune-lr", type=float, default=0.02, help="peak learning rate of 'tune' (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the data set's files")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with <data set>-<model>.safetensors")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/layers"), help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--bf16", action="store_true", help="'tune' under bfloat16 autocast")
    add_run_options(parser)
    args = parser.parse_args()
    args.sparsities, args.seeds = [float(s) for s in args.sparsities], [int(s) for s in args.seeds]
    for chosen, known in ((args.methods, METHODS), (args.recover, RECOVERIES)):
        for name in chosen:
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    if not args.table and (args.data is None or args.weights is None):
        parser.error("--data and --weights are needed")
    return args


def main() -> int:
    args = parse()
    results = args.out / "layers.jsonl"
    if args.table:
        show_table(args, results, render)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    bed = Bed(args)
    plans = functools.lru_cache(1)(bed.plans)  # cells come allocator by allocator

    def measure(cell: records.Record) -> dict[str, float]:
        return bed.measure(plans(cell["allocator"])(cell["sparsity"]), cell)

    cells = (cell for allocator in args.allocators for cell in wanted(args, allocator))
    return fill(results, KEY, cells, measure, bed.facts, args.seeds[0], args.time_limit)


def wanted(args: argparse.Namespace, allocator: str) -> Iterator[records.Record]:
    """The cells of one allocator; several seeds where masks or batches are drawn."""
    for recover, method, sparsity in itertools.product(args.recover, args.methods, args.sparsities):
        drawn, tuned = method == "random" or recover == "tune", recover == "tune"
        for seed in args.seeds if drawn else args.seeds[:1]:
            yield {
                "kind": "cell", "dataset": args.dataset, "model": args.model, "recover": recover, "allocator": allocator,
                "method": method, "sparsity": sparsity, "seed": seed, "images": args.images,
                "tune_images": args.tune_images if tuned else None, "tune_lr": args.tune_lr if tuned else None,
            }  # fmt: skip


class Bed:
    """One dense network with its data, and what becomes of it under a plan."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        data = DATA_SETS[args.dataset](args.data, self.device, channels_last=True)
        model = SMALL[args.model](data.channels)
        # Weights published from torch before 0.4.1 know no num_batches_tracked.
        model.load_state_dict(load_file(str(args.weights / f"{args.dataset}-{args.model}.safetensors")), strict=False)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.layers = find_layers(self.model)
        self.test = data.test(args.images)
        self.calibration = list(data.train(subset=CALIBRATION).plain(64))
        self.renewal = [images for images, _ in data.train(subset=RENEWAL).plain(128)]
        self.data, self.bf16 = data, args.bf16
        self._known: dict[tuple[Any, ...], dict[str, float]] = {}
        score, loss = scores(self.model, self.test)
        self.facts = {
            "dataset": args.dataset, "model": args.model, "base_accuracy": score, "base_loss": loss, "images": args.images,
            "weights": sum(layer.size for layer in self.layers), "calibration": CALIBRATION, "renewal": RENEWAL,
        }  # fmt: skip

    def plans(self, allocator: str | Any) -> Plans:
        """Plans for any total, from one look at the calibration images.

        "capacity:K:S:A" is the default's family: masses k^K·s^S, a share A of removals anywhere (0:0:0 is LAMP, 1:0:1 ERK).
        """
        if isinstance(allocator, str) and allocator.startswith("capacity:"):
            return self._family(*(float(v) for v in allocator.split(":")[1:]))
        return allocation(self.model, self.layers, allocator, self.calibration)

    def _family(self, of_directions: float, of_sensitivity: float, anywhere: float) -> Plans:
        moved = imp.sensitivity(self.model, self.layers, self.calibration)
        costs = {
            x.name: capacity_costs(
                x.weight, imp.directions(x) ** of_directions * moved[x.name] ** of_sensitivity, anywhere
            )
            for x in self.layers
        }
        shapes = {x.name: x.shape for x in self.layers}
        return lambda sparsity: pw.SparsityPlan(among_highest(costs, Total(shapes, sparsity)), shapes)

    def measure(self, plan: pw.SparsityPlan, cell: records.Record) -> dict[str, float]:
        """Accuracy and loss of one cell. The same plan by another name is not measured again."""
        settings = tuple(cell[name] for name in KEY if name not in ("allocator", "sparsity"))
        key = (tuple(plan.keep.values()), *settings)
        if key not in self._known:
            self._known[key] = self._measured(plan, cell)
        return self._known[key]

    def _measured(self, plan: pw.SparsityPlan, cell: records.Record) -> dict[str, float]:
        model = copy.deepcopy(self.model)
        pw.sparsify_(model, plan, cell["method"], seed=cell["seed"], progress=False)
        if cell["recover"] == "norm":
            make_permanent_(model)
            renew_(model, self.renewal)
        elif cell["recover"] == "tune":
            settings = Settings(1, cell["tune_lr"], cell["seed"], 128, 5e-4, self.bf16, True)
            trainer = Trainer(settings, self.data.train(subset=cell["tune_images"]))
            trainer.adopt(model)
            try:
                trainer.epoch(0, (0, 1))
            except FloatingPointError:  # counted as it is: no better than chance
                return {"accuracy": 0.1, "loss": 1e9}
        accuracy, loss = scores(model, self.test)
        return {"accuracy": accuracy, "loss": min(loss, 1e9) if loss == loss else 1e9}


@torch.no_grad()
def renew_(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """Batch norm's statistics taken anew, as the plain mean over these batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def scores(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy and mean cross-entropy, in eval mode."""
    model.eval()
    right, loss = 0, 0.0
    for batch, labels in images.plain(250):
        logits = model(batch)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
    return right / len(images), loss / len(images)


def render(found: list[records.Record]) -> str:
    """Per network and recovery: the mean over the grid for each allocator, and the default's gain over it."""
    runs = {r["run"]: r for r in found if r["kind"] == "run"}
    cells = [r for r in found if r["kind"] == "cell"]
    texts, every = [], []

    def table_of(cell: records.Record) -> tuple[Any, ...]:
        dense = runs[cell["run"]]["base_accuracy"]  # two dense networks of one architecture are two tables
        return cell["dataset"], cell["model"], cell["images"], dense, cell["recover"], cell["tune_images"]

    for (dataset, model, images, _, recover, tuned), members in records.grouped(cells, table_of).items():
        grid = whole(members)
        every.append(grid)
        base = runs[members[0]["run"]]
        how = {"none": "nothing more", "norm": "batch norm's statistics anew", "tune": f"one pass over {tuned} images"}
        texts.append(
            f"**{model}, {dataset}**, {base['weights']:,} weights, dense {100 * base['base_accuracy']:.2f} %; "
            f"{f'the first {images}' if images else 'all'} test images; after pruning: {how[recover]}"
        )
        texts.append(section(grid))
    if len(every) > 1:
        texts.append("**All of it** (each table above counts the same)")
        names = [name for name in every[0] if all(name in grid for grid in every)]
        means = {n: statistics.fmean(mean(grid[n]) for grid in every) for n in names}
        ranked = sorted(names, key=lambda n: -means[n])
        rows = [[n, f"{means[n]:.2f}", *(f"{mean(grid[n]):.2f}" for grid in every)] for n in ranked]
        texts.append(table(["allocator", "mean", *(str(i + 1) for i in range(len(every)))], rows))
    return "\n\n".join(texts) or "no results"


Grid = dict[str, dict[tuple[str, float], float]]  # allocator → (method, sparsity) → accuracy in %, mean of seeds


def whole(members: list[records.Record]) -> Grid:
    """Means over seeds, of the cells that every allocator has."""
    grid: Grid = {}
    for (allocator, method, sparsity), runs in records.grouped(
        members, lambda r: (r["allocator"], r["method"], r["sparsity"])
    ).items():
        grid.setdefault(allocator, {})[method, sparsity] = 100 * statistics.fmean(r["accuracy"] for r in runs)
    shared = set.intersection(*(set(row) for row in grid.values()))
    return {name: {cell: row[cell] for cell in sorted(shared)} for name, row in grid.items()}


def mean(row: dict[tuple[str, float], float]) -> float:
    return statistics.fmean(row.values())


def section(grid: Grid) -> str:
    """One line an allocator, the best first: means by method and by sparsity, and how far from uniform."""
    first = next(iter(grid.values()))
    methods = [m for m in METHODS if any(m == cell[0] for cell in first)]
    sparsities = sorted({cell[1] for cell in first})
    best = {cell: max(row[cell] for row in grid.values()) for cell in first}
    rows = []
    for name, row in sorted(grid.items(), key=lambda item: -mean(item[1])):
        gain = (
            {cell: row[cell] - grid["uniform"][cell] for cell in row} if "uniform" in grid else dict.fromkeys(row, 0.0)
        )
        rows.append([
            f"**{name}**" if name == DEFAULT else name,
            f"{mean(row):.2f}", f"{mean(gain):+.2f}", f"{max(gain.values()):+.1f}", f"{min(gain.values()):+.1f}",
            sum(row[cell] > best[cell] - 0.5 for cell in row),
            *(f"{statistics.fmean(v for c, v in row.items() if c[0] == m):.1f}" for m in methods),
            *(f"{statistics.fmean(v for c, v in row.items() if c[1] == s):.1f}" for s in sparsities),
        ])  # fmt: skip
    head = ["allocator", "mean", "over uniform", "most", "least", f"within 0.5 of the best, of {len(first)}", *methods]
    return table([*head, *(f"{s:g}" for s in sparsities)], rows)


if __name__ == "__main__":
    sys.exit(main())
