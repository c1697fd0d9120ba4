"""Training on a part of the data: test accuracy at 90, 70, 50, 30 and 10 % kept, by strategy, next to random.

The scores are those of one recorded training on everything (`scores` in the records); its cost is not counted, as in the
literature. Each subset trains a new network with another seed, for as many steps as the whole data set takes (`--steps same`, as
Zheng et al. 2022), or for as many epochs (`--steps epochs`: less time, the honest control for saving it).

Prediction, written before the first run, on small data and short schedules: at 90 % and 70 % nothing differs from random by
more than the noise of the seeds (0.5 to 1 point). From 50 % down the hardest alone (`difficulty`) lose to random: by 5 points at
50 %, 20 or more at 30 and 10 %. Coverage is within a point of random down to 30 %, and at 10 % level or 1 to 2 points ahead.
With a fifth of the labels wrong (`--noise 0.2`) coverage, which drops the hardest tenth, leads random by 1 to 3 points at 90
and 70 %; `difficulty` collects the wrong labels and collapses; dropping suspects first leads everywhere.

    python benchmarks/subsets.py --task fashion --data FASHION --train-subset 6000 [--noise 0.2] [--seeds 0,1]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import records
from bench import add_table_options, circumstances, one_thread, show_table, table
from sample_tasks import TASKS, Task, flipped, load_task
from sample_training import DEFAULTS, Recipe, test_accuracy, train

import prunewise as pw

KEPT = (0.9, 0.7, 0.5, 0.3, 0.1)
STRATEGIES = ("random", "coverage", "difficulty", "easiest", "no suspects, then random")
CELL = ("task", "train_samples", "model", "epochs", "lr", "noise", "steps")


def chosen(scores: pw.SampleScores, labels: np.ndarray, strategy: str, kept: float, seed: int) -> np.ndarray:
    """Numbers of the samples to train on."""
    if strategy == "easiest":
        return pw.select_subset(scores, kept, strategy="difficulty", keep="easy", seed=seed)
    if strategy.startswith("no suspects"):
        count = round(kept * len(scores))
        order = np.random.default_rng(seed).permutation(len(scores))
        suspect = np.isin(order, pw.suspects(scores, labels).number)
        return np.sort(np.concatenate([order[~suspect], order[suspect]])[:count])  # suspects only to fill up
    return pw.select_subset(scores, kept, strategy=strategy, seed=seed)


def run(task: Task, recipe: Recipe, seed: int, args: argparse.Namespace) -> None:
    """All records of one seed that are not there yet."""
    path = args.out / "subsets.jsonl"
    labels = flipped(task.labels, args.noise, "symmetric", seed)
    key = {"task": task.name, "train_samples": len(task), "model": recipe.model, "epochs": recipe.epochs, "lr": recipe.lr,
           "noise": args.noise, "steps": args.steps, "seed": seed}  # fmt: skip
    there = {(r["strategy"], r["kept"]) for r in records.read([path]) if all(r.get(k) == v for k, v in key.items())}
    wanted = [("all", 1.0), *((s, k) for k in KEPT for s in args.strategies.split("|"))]
    if all(w in there for w in wanted):
        return
    recorder = pw.LearnabilityRecorder(len(task))
    train(task, labels, recipe, 100 + seed, observers=[recorder.update])
    scores = recorder.scores(labels)
    for strategy, kept in wanted:
        if (strategy, kept) in there:
            continue
        subset = None if strategy == "all" else chosen(scores, labels, strategy, kept, seed)
        epochs = recipe.epochs if args.steps == "epochs" else round(recipe.epochs / kept)
        model = train(task, labels, dataclasses.replace(recipe, epochs=epochs), seed, kept=subset)
        record: dict[str, Any] = {
            **key,
            "strategy": strategy,
            "kept": kept,
            "test_accuracy": round(test_accuracy(model, task), 4),
        }
        if args.noise and subset is not None:
            record["wrong_kept"] = round(float((labels != task.labels)[subset].mean()), 4)
        records.append(path, {**record, "where": circumstances(seed)})
        print(record, flush=True)


def summary(found: list[dict[str, Any]]) -> str:
    """A table a data set: strategies by share kept, mean over seeds; the difference from random of the same seed."""
    parts = []
    for cell, rows in records.grouped(found, lambda r: tuple(r[k] for k in CELL)).items():
        values = {(r["strategy"], r["kept"], r["seed"]): 100 * r["test_accuracy"] for r in rows}
        seeds = sorted({r["seed"] for r in rows})
        lines = []
        for strategy in dict.fromkeys(r["strategy"] for r in rows if r["strategy"] != "all"):
            line = [strategy]
            for kept in KEPT:
                pairs = [(values.get((strategy, kept, s)), values.get(("random", kept, s))) for s in seeds]
                both = [(a, b) for a, b in pairs if a is not None and b is not None]
                text = f"{statistics.mean(a for a, _ in both):.1f}" if both else ""
                line.append(
                    text
                    if strategy == "random" or not both
                    else f"{text} ({statistics.mean(a - b for a, b in both):+.1f})"
                )
            lines.append(line)
        whole = [values[k] for k in values if k[0] == "all"]
        title = (
            f"{cell[0]}, {cell[1]:,} images, {cell[2]}, {cell[3]} epochs, {cell[5]:.0%} of the labels wrong, --steps {cell[6]}; "
            f"all data: {statistics.mean(whole):.1f} %; {len(seeds)} seeds; test accuracy in % (against random)"
        )
        parts += [title, table(["strategy", *(f"{k:.0%}" for k in KEPT)], lines)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--train-subset", type=int, metavar="N")
    parser.add_argument("--test-subset", type=int, metavar="N")
    parser.add_argument("--noise", type=float, default=0.0, help="share of labels flipped symmetrically")
    parser.add_argument("--steps", choices=("same", "epochs"), default="same")
    parser.add_argument("--strategies", default="|".join(STRATEGIES), help="separated by | (%(default)s)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--model")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/subsets"), help="subsets.jsonl (%(default)s)")
    add_table_options(parser)
    args = parser.parse_args()
    if args.table:
        show_table(args, args.out / "subsets.jsonl", summary)
        return
    one_thread("cpu", 1)
    task = load_task(args.task, args.data, args.train_subset, args.test_subset)
    given = {k: v for k in ("model", "epochs") if (v := getattr(args, k)) is not None}
    recipe = dataclasses.replace(DEFAULTS[args.task], **given)
    for seed in [int(s) for s in args.seeds.split(",")]:
        run(task, recipe, seed, args)


if __name__ == "__main__":
    main()
