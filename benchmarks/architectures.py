"""Do architectures agree on which samples are hard? The paper's table (arXiv 1901.02347): ResNet-20, VGG-16, MobileNet on CIFAR-10.

The paper reports 0.796 (0.867) for VGG-16 and ResNet-20, 0.713 (0.792) for VGG-16 and MobileNet, 0.774 (0.782) for ResNet-20
and MobileNet. Goal here: at least 0.80 for every pair, next to the ceiling: the same architecture with another seed.

Two definitions, never mixed: hits of the augmented training passes, and hits of a clean pass over the training images after every
epoch. Pearson and Spearman both.

Prediction, written before the first run, for short schedules on a subset (3,000 images, 12 epochs, two of the networks at a
fraction of their width): the networks reach 45 to 55 % and rank samples by what little they have learned; ceilings 0.75 to 0.85,
pairs 0.70 to 0.80, clean passes 0.03 to 0.05 above training passes; Spearman 0.02 below Pearson. With 50,000 images and 100
epochs most samples are nearly always right, a few never: Pearson above 0.8 for all pairs in the clean pass, Spearman below it.

Those short schedules came out at 0.65 to 0.76 (ceilings 0.74 to 0.85). Prediction for 5,000 images, 30 epochs, a rate for each of
the networks: every image is seen twice as often by networks that know more, so ceilings 0.83 to 0.90, pairs 0.72 to 0.82; the
goal is met by ResNet-20 and VGG-16 alone. One seed gave 0.85, 0.80, 0.79. Prediction for 40 epochs: 0.01 to 0.02 more, which meets
the goal for all pairs in the training passes; clean passes 0.05 below them. Wrong: 0.85, 0.78, 0.78. ResNet-20 and VGG-16 know
the training images by heart by then, MobileNet does not.

    python benchmarks/architectures.py --data CIFAR --train-subset 5000 --epochs 30 --lr 0.05,0.02,0.05 --bf16
    python benchmarks/architectures.py --data CIFAR --epochs 100 --models resnet20,vgg16,mobilenet      # the paper's size
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import records
import torch
from bench import RESULTS, circumstances, one_thread, table
from sample_tasks import Task, load_task
from sample_training import Recipe, test_accuracy, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunewise as pw

MODES = ("train", "clean")


def run(task: Task, recipe: Recipe, seed: int, folder: Path) -> dict[str, Any]:
    """The record of one training; both score tables lie beside it. It is not trained again where they are there."""
    size = f"{len(task)}_{recipe.epochs}_{recipe.batch_size}_{recipe.lr:g}"
    name = f"{recipe.model}_{size}{'_bf16' * recipe.bf16}_{seed}"
    done = folder / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text())
    recorder = {mode: pw.LearnabilityRecorder(len(task), mode=mode) for mode in MODES}
    labels = torch.as_tensor(task.labels, device=task.images.device)
    loader = DataLoader(pw.track(TensorDataset(task.images, labels)), batch_size=500)

    def clean_pass(model: nn.Module) -> None:
        recorder["clean"].clean_pass(model, loader)

    start = time.process_time()
    model = train(task, task.labels, recipe, seed, observers=[recorder["train"].update], after_epoch=clean_pass)
    seconds = time.process_time() - start
    folder.mkdir(parents=True, exist_ok=True)
    for mode in MODES:
        scores = recorder[mode].scores(task.labels, model=recipe.model, seed=seed)
        scores.to_parquet(folder / f"{name}_{mode}.parquet")
    record = {
        "train_samples": len(task), **dataclasses.asdict(recipe), "seed": seed, "name": name, "seconds": round(seconds, 1),
        "test_accuracy": round(test_accuracy(model, task), 4), "mean_learnability": round(float(scores.learnability.mean()), 4),
        "where": circumstances(seed),
    }  # fmt: skip
    done.write_text(json.dumps(record) + "\n")
    print({k: v for k, v in record.items() if k != "where"}, flush=True)
    return record


def compared(folder: Path, found: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Every pair of runs, in both modes."""
    pairs = []
    for mode in MODES:
        tables = [
            pw.SampleScores.from_parquet(folder / f"{r['name']}_{mode}.parquet", targets=task.labels) for r in found
        ]
        for i, j in combinations(range(len(found)), 2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # noisy rankings are what is measured
                agreed = pw.agreement([tables[i], tables[j]], bootstrap=100)
            pairs.append({
                "models": sorted((found[i]["model"], found[j]["model"])), "seeds": [found[i]["seed"], found[j]["seed"]],
                "mode": mode, "pearson": round(float(agreed.pearson[0, 1]), 4), "spearman": round(float(agreed.spearman[0, 1]), 4),
                "pearson_interval": str(agreed.pearson_intervals[0, 1]), "spearman_interval": str(agreed.spearman_intervals[0, 1]),
            })  # fmt: skip
    return pairs


def summary(pairs: list[dict[str, Any]]) -> str:
    """A row a pair of architectures: the mean over all pairs of seeds, and beneath the ceilings.

    The last column is Pearson over the geometric mean of the two ceilings: what would be left without the noise of single runs
    (Spearman's correction for attenuation, 1904).
    """

    def cell(rows: list[dict[str, Any]], mode: str, kind: str) -> str:
        values = [r[kind] for r in rows if r["mode"] == mode]
        return f"{sum(values) / len(values):.3f}" if values else ""

    groups = records.grouped(pairs, lambda p: tuple(p["models"]))
    ceilings = {a: float(cell(group, MODES[0], "pearson")) for (a, b), group in groups.items() if a == b}
    rows = []
    for (a, b), group in sorted(groups.items(), key=lambda item: item[0][0] == item[0][1]):
        title = f"{a}, other seed (ceiling)" if a == b else f"{a}, {b}"
        values = [cell(group, mode, kind) for mode in MODES for kind in ("pearson", "spearman")]
        corrected = ""
        if a != b and a in ceilings and b in ceilings and ceilings[a] > 0 < ceilings[b]:
            corrected = f"{float(values[0]) / math.sqrt(ceilings[a] * ceilings[b]):.2f}"
        rows.append([title, sum(p["mode"] == MODES[0] for p in group), *values, corrected])
    head = [
        "architectures",
        "pairs of runs",
        *(f"{kind}, {mode} pass" for mode in MODES for kind in ("Pearson", "Spearman")),
        "Pearson, train pass, over the ceilings",
    ]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's binary version")
    parser.add_argument("--models", default="resnet20,vgg16@0.25,mobilenet@0.25", help="(%(default)s)")
    parser.add_argument("--seeds", default="0,1", help="(%(default)s)")
    parser.add_argument("--train-subset", type=int, metavar="N")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", default="0.05", help="one for all, or one for each of the models (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="train under autocast, channels last")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/architectures"), help="score tables (%(default)s)")
    parser.add_argument("--name", default="architectures", help="of the results")
    args = parser.parse_args()
    one_thread(args.device, 1)
    task = load_task("cifar10", args.data, args.train_subset).to(args.device)
    models, rates = args.models.split(","), [float(lr) for lr in args.lr.split(",")]
    if len(rates) not in (1, len(models)):
        parser.error(f"--lr has {len(rates)} rates for {len(models)} models")
    wanted = [
        (Recipe(model, args.epochs, lr, args.batch_size, args.bf16), int(seed))
        for seed in args.seeds.split(",")
        for model, lr in zip(models, rates * len(models), strict=False)
    ]
    found = [run(task, recipe, seed, args.out) for recipe, seed in wanted]
    pairs = compared(args.out, found, task)
    runs = [
        [r["model"], f"{r['lr']:g}", r["seed"], f"{100 * r['test_accuracy']:.1f}", f"{r['seconds']:.0f}"] for r in found
    ]
    text = "\n\n".join([
        f"Learnability of {len(task):,} training images of CIFAR-10, {args.epochs} epochs", summary(pairs),
        table(["run", "lr", "seed", "test accuracy, %", "processor s"], runs),
    ])  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    where = circumstances(0)
    runs_only = [{k: v for k, v in r.items() if k != "where"} for r in found]
    (RESULTS / f"{args.name}.json").write_text(
        json.dumps({**where, "runs": runs_only, "pairs": pairs}, indent=1) + "\n"
    )
    foot = f"`{where['command']}`, torch {where['versions']['torch']}, {where['date']}."
    (RESULTS / f"{args.name}.md").write_text(f"{text}\n\n{foot}\n")
    print(text)


if __name__ == "__main__":
    main()
