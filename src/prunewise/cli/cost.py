"""`prunewise cost`: what a model costs to run."""

from __future__ import annotations

import argparse
import dataclasses

from prunewise.cli.options import add_model_options
from prunewise.cli.output import as_share, print_json, print_table

HELP = "MACs, parameters and activation memory of a model, exactly"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model_options(parser)
    parser.add_argument("--by-layer", action="store_true", help="a row for each layer")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    import prunewise as pw
    from prunewise.cli.loading import example_inputs, load_data, load_model

    model = load_model(args.model)
    loader = load_data(args.data)[0] if args.data else None
    cost = pw.measure(model, example_inputs(model, args.input, loader))
    totals = {"macs": cost.macs, "params": cost.params, "activation_bytes": cost.activation_bytes}
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    layers = sorted(cost.by_layer(), key=lambda layer: order.get(layer.name, len(order))) if args.by_layer else []
    if args.json:
        by_layer = {"by_layer": [dataclasses.asdict(layer) for layer in layers]} if args.by_layer else {}
        print_json({"model": args.model, **totals, **by_layer})
        return
    rows = [
        [layer.name, f"{layer.macs:,}", as_share(layer.macs, cost.macs), f"{layer.params:,}"]
        for layer in layers
        if layer.macs or layer.params
    ]
    if rows:
        print_table("by layer", ["layer", "MACs", "share", "parameters"], rows)
    print_table(args.model, ["cost", "total"], [[name, f"{value:,}"] for name, value in totals.items()])
