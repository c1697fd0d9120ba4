"""`prunewise prune`: a smaller model under a budget, by trained gates or in one shot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunewise.cli.options import (
    UsageError,
    add_checkpoint_option,
    add_choice_options,
    add_model_options,
    amount,
    choice,
    count,
    require_folder,
)
from prunewise.cli.output import as_share, print_json, print_line, print_table

if TYPE_CHECKING:
    from torch import nn

    from prunewise import Budget, ChannelPlan
    from prunewise.recipes import CompressReport

HELP = "a smaller model under a budget, saved as plan.json and model.safetensors"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model_options(parser)
    budget = "budget: a share of the original (0.5) or a count"
    parser.add_argument("--macs", metavar="AMOUNT", type=amount, help=budget)
    parser.add_argument("--params", metavar="AMOUNT", type=amount, help=budget)
    parser.add_argument(
        "--method",
        choices=["gates", "magnitude", "bn_scale", "random"],
        default="gates",
        help="gates: trained together with the weights on --data; the others: one shot, no training (%(default)s)",
    )
    parser.add_argument("--epochs", type=count(1), default=10, help="epochs of training, for gates (%(default)s)")
    parser.add_argument("--seed", type=count(0), default=0, help="of everything random (%(default)s)")
    add_checkpoint_option(parser, "for gates: ")
    parser.add_argument(
        "--shrink-every",
        metavar="STEPS",
        type=count(1),
        help="for gates: remove closed channels for good every so many steps, so that training gets faster",
    )
    parser.add_argument("--drop-blocks", action="store_true", help="for gates: residual blocks may go as a whole")
    add_choice_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/prune"), help="folder (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Prune, save and print."""
    if args.macs is None and args.params is None:
        raise UsageError("no budget: give --macs or --params, as in --macs 0.5")
    if args.method == "gates" and not args.data:
        raise UsageError("--method gates trains and needs --data; --method magnitude needs none")
    if args.method != "gates" and (args.drop_blocks or args.shrink_every is not None):
        raise UsageError(f"--drop-blocks and --shrink-every go with --method gates, not with {args.method}")
    require_folder(args.out)

    import prunewise as pw
    from prunewise.cli.loading import example_inputs, load_data, load_model

    model = load_model(args.model)
    loaders = load_data(args.data) if args.data else (None, None)
    inputs = example_inputs(model, args.input, loaders[0])
    before = pw.measure(model, inputs)
    small, plan, report = _prune(args, model, inputs, loaders, pw.Budget(macs=args.macs, params=args.params))
    after = pw.measure(small, inputs)
    pw.save_pruned(args.out, small, plan)

    costs = [
        ("macs", before.macs, after.macs),
        ("params", before.params, after.params),
        ("activation_bytes", before.activation_bytes, after.activation_bytes),
    ]
    metric = _metric(report)
    if args.json:
        print_json(
            {
                "model": args.model,
                "method": args.method,
                "before": {name: old for name, old, _ in costs},
                "after": {name: new for name, _, new in costs},
                "metric": metric,
                "out": str(args.out),
            }
        )
        return
    rows = [[name, f"{old:,}", f"{new:,}", as_share(new, old)] for name, old, new in costs]
    if metric is not None:
        rows.append([metric["name"], f"{metric['original']:.4f}", f"{metric['small']:.4f}", "-"])
    print_table(f"{args.model}, {args.method}", ["", "before", "after", "share"], rows)
    if metric is not None:
        print_line(f"{metric['name']} under gates, before the cut: {metric['gated']:.4f}")
    print_line(f"saved in {args.out}; load it with prunewise.load_pruned({str(args.out)!r}, factory)")


def _prune(
    args: argparse.Namespace, model: nn.Module, inputs: Any, loaders: tuple[Any, Any], budget: Budget
) -> tuple[nn.Module, ChannelPlan, CompressReport | None]:
    import prunewise as pw

    if args.method == "gates":
        train, validation = loaders
        result = pw.compress(
            model,
            train,
            budget=budget,
            epochs=args.epochs,
            val_loader=validation,
            example_inputs=inputs,
            checkpoint=args.checkpoint,
            seed=args.seed,
            drop_blocks=args.drop_blocks,
            shrink_every=args.shrink_every,
            **choice(args),
        )
        return result.model, result.plan, result.report
    plan = pw.plan_channels(model, inputs, budget=budget, importance=args.method, seed=args.seed, **choice(args))
    return pw.apply_plan(model, plan, inputs), plan, None


def _metric(report: CompressReport | None) -> dict[str, Any] | None:
    """What was measured on the validation loader; None where there was none, and for one shot, which measures nothing."""
    if report is None or report.original is None or report.gated is None or report.small is None:
        return None
    return {
        "name": report.metric,
        "original": report.original.value,
        "gated": report.gated.value,
        "small": report.small.value,
    }
