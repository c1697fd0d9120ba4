"""`prunewise score`: a training that tells how learnable each of its samples is."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from prunewise.cli.options import (
    UsageError,
    add_checkpoint_option,
    add_model_options,
    add_suspects_option,
    add_targets_option,
    count,
    make_folder,
)
from prunewise.cli.output import print_json, print_line
from prunewise.cli.report import print_summary, summary

HELP = "how learnable the samples of a training are: trains a model and saves their scores"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model_options(parser, traced=False)
    parser.add_argument("--epochs", type=count(1), default=10, help="epochs of training (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of SGD at the start (%(default)s)")
    parser.add_argument("--seed", type=count(0), default=0, help="of the training (%(default)s)")
    add_checkpoint_option(parser)
    add_targets_option(parser)
    add_suspects_option(parser)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("runs/scores.parquet"), help="the scores (%(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Train, save and print."""
    if not args.data:
        raise UsageError("scores come from a training: give --data, a loader over prunewise.track(dataset)")
    if not args.lr > 0:
        raise UsageError(f"--lr {args.lr}: expected a number above 0")
    make_folder(args.out)
    if args.out.suffix != ".parquet":
        raise UsageError(f"--out {args.out}: scores are saved as Parquet, expected a name that ends in .parquet")

    import torch

    import prunewise as pw
    from prunewise._loops import sgd
    from prunewise.cli.loading import load_data, load_model, load_targets
    from prunewise.samples.table import require_pyarrow

    require_pyarrow()
    targets = load_targets(args.targets) if args.targets else None
    torch.manual_seed(args.seed)  # the factory's weights
    model = load_model(args.model)
    scores = pw.score_samples(
        model,
        load_data(args.data)[0],
        epochs=args.epochs,
        optimizer=functools.partial(sgd, lr=args.lr),
        seed=args.seed,
        checkpoint=args.checkpoint,
    )
    scores.to_parquet(args.out)
    result = summary(scores, targets, args.suspects)
    if args.json:
        print_json({**result, "out": str(args.out)})
        return
    print_summary(args.model, result)
    print_line()
    print_line(
        f"saved in {args.out}; read it with prunewise.SampleScores.from_parquet, or show it with prunewise report"
    )
