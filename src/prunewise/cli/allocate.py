"""`prunewise allocate`: how sparse each layer should be, for one total."""

from __future__ import annotations

import argparse
from pathlib import Path

from prunewise.cli.options import UsageError, add_model_options, make_folder, nearest, share
from prunewise.cli.output import as_share, print_json, print_line, print_table

HELP = "the sparsity of each layer that one total calls for, as a plan"

# The library's own, by name, as they are here before torch is: which of them need data.
IMPORTANCES = {
    "capacity": True, "effective_rank": True, "rate": True, "stable_rank": False, "params": False, "taylor": True, "fisher": True,
    "loss_increase": True, "uniform": False, "erk": False, "lamp": False, "global_magnitude": False, "owl": True, "alpha": False,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model_options(parser, traced=False)
    parser.add_argument(
        "--sparsity", metavar="SHARE", type=share(one=False), required=True, help="share of weights to remove, as 0.9"
    )
    parser.add_argument(
        "--importance",
        type=_importance,
        default="capacity",
        help="what a layer's share goes by: erk, lamp, global_magnitude, owl, alpha, taylor, … (%(default)s)",
    )
    parser.add_argument("--floor", metavar="DENSITY", type=share(), help="least share of a layer's weights to keep")
    layers = "layers by name or pattern; repeatable"
    parser.add_argument("--include", metavar="PATTERN", action="append", help=f"only these {layers}")
    parser.add_argument("--exclude", metavar="PATTERN", action="append", help=f"leave alone these {layers}")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the plan here, as JSON")


def run(args: argparse.Namespace) -> None:
    """Allocate, save and print."""
    if IMPORTANCES[args.importance] and not args.data:
        others = ", ".join(name for name, needs_data in IMPORTANCES.items() if not needs_data)
        raise UsageError(
            f"--importance {args.importance} needs data: give --data, a loader of a few hundred samples, or an importance that "
            f"needs none ({others})"
        )

    import prunewise as pw
    from prunewise._files import write_json
    from prunewise.cli.loading import load_data, load_model

    if args.out is not None:
        make_folder(args.out)
    model = load_model(args.model)
    plan = pw.allocate(
        model,
        args.sparsity,
        args.importance,
        load_data(args.data)[0] if args.data else None,
        floor=args.floor,
        include=args.include,
        exclude=args.exclude,
    )
    if args.out is not None:
        write_json(args.out, plan.to_dict())
    if args.json:
        print_json(plan.to_dict())
        return
    sizes = plan.sizes
    rows = [[name, f"{sizes[name]:,}", f"{keep:,}", as_share(keep, sizes[name])] for name, keep in plan.keep.items()]
    rows.append(["all", f"{sum(sizes.values()):,}", f"{plan.kept:,}", as_share(plan.kept, sum(sizes.values()))])
    print_table(f"{args.model}, {args.importance}", ["layer", "weights", "kept", "share"], rows)
    if args.out is not None:
        print_line(
            f"saved in {args.out}; read it with prunewise.SparsityPlan.from_dict(json.load(open({str(args.out)!r}))), put it in "
            "force with prunewise.sparsify_(model, plan)"
        )


def _importance(name: str) -> str:
    if name not in IMPORTANCES:
        raise argparse.ArgumentTypeError(f"unknown importance {name!r}; {nearest(name, IMPORTANCES)}")
    return name
