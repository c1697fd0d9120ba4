"""The dense networks that sparsity by layer starts from: trained once, to be used by layers.py.

Writes OUT/<data set>-<model>.safetensors and one line in OUT/dense.jsonl. A run that is stopped goes on from its last whole
epoch; one that is done is not made again. The test set is read once, after the last epoch. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import records
import torch
from bench import STOPPED, Clock, OutOfTime, circumstances
from data import DATA_SETS
from models import SMALL
from safetensors.torch import save_file
from training import Settings, Trainer, accuracy, load, save


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATA_SETS, required=True)
    parser.add_argument("--model", choices=SMALL, required=True)
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="folder with the data set's files")
    parser.add_argument("--epochs", type=int, default=30, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--train-subset", type=int, metavar="N", help="the first N training images: a try")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/dense"), help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="train under torch.compile")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help=f"stop before so many seconds, with status {STOPPED}"
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    name = f"{args.dataset}-{args.model}"
    weights, unfinished = args.out / f"{name}.safetensors", args.out / "work" / f"{name}.pt"
    if weights.exists():
        print(f"{weights}: done before")
        return 0
    device, clock = torch.device(args.device), Clock(args.time_limit)
    data = DATA_SETS[args.dataset](args.data, device, channels_last=True)
    torch.manual_seed(args.seed)
    model = SMALL[args.model](data.channels).to(device)
    settings = Settings(
        args.epochs, args.lr, args.seed, args.batch_size, args.weight_decay, args.bf16, True, args.compile
    )
    trainer = Trainer(settings, data.train(subset=args.train_subset))
    trainer.adopt(model)
    curve: list[dict[str, Any]] = []
    recipe = {
        key: getattr(args, key)
        for key in ("dataset", "model", "epochs", "lr", "batch_size", "weight_decay", "train_subset")
    }
    saved = load(unfinished, device)
    if saved is not None:
        if saved["recipe"] != {**recipe, "seed": args.seed}:
            raise SystemExit(f"{unfinished} is of another recipe: {saved['recipe']}; delete it to start anew")
        model.load_state_dict(saved["tensors"])
        trainer.load_momenta(saved["momenta"])
        curve = saved["curve"]
    for epoch in range(len(curve), args.epochs):
        try:
            clock.require(curve[-1]["seconds"] if curve else 0)
        except OutOfTime:
            print("out of time; the same command goes on from here", file=sys.stderr)
            return STOPPED
        curve.append(trainer.epoch(epoch, (0, args.epochs)))
        print(f"{name}: {curve[-1]}", flush=True)
        state = {
            "recipe": {**recipe, "seed": args.seed}, "tensors": model.state_dict(), "momenta": trainer.momenta(), "curve": curve,
        }  # fmt: skip
        save(unfinished, state)
    started = time.perf_counter()
    score = accuracy(model, data.test())
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    part = weights.with_suffix(".part")
    save_file(tensors, str(part))
    record = {
        **recipe, "accuracy": score, "curve": curve, "train_s": round(sum(row["seconds"] for row in curve), 1),
        "test_s": round(time.perf_counter() - started, 1), "resumed": saved is not None, **circumstances(args.seed),
    }  # fmt: skip
    records.append(args.out / "dense.jsonl", record)
    part.rename(weights)
    unfinished.unlink(missing_ok=True)
    print(f"{name}: {100 * score:.2f} % after {args.epochs} epochs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
