"""`prunewise list`: the channel groups of a model."""

from __future__ import annotations

import argparse

from prunewise.cli.options import add_model_options
from prunewise.cli.output import print_json, print_table

HELP = "the channel groups of a model: which channels live or die together, and what pins the rest"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Find the groups and print them."""
    import prunewise as pw
    from prunewise.cli.loading import example_inputs, load_data, load_model

    model = load_model(args.model)
    loader = load_data(args.data)[0] if args.data else None
    groups = pw.channel_groups(model, example_inputs(model, args.input, loader))
    if args.json:
        print_json(
            [
                {"name": group.name, "size": group.size, "prunable": group.prunable, "reason": group.reason}
                for group in groups
            ]
        )
        return
    rows = [[group.name, str(group.size), "yes" if group.prunable else "no", group.reason or ""] for group in groups]
    print_table(args.model, ["group", "size", "prunable", "reason"], rows)
