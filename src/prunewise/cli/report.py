"""`prunewise report`: what the saved scores of a training say of its samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunewise.cli.options import add_suspects_option, add_targets_option, make_folder
from prunewise.cli.output import as_share, print_json, print_line, print_table

if TYPE_CHECKING:
    from prunewise import SampleScores

HELP = "how learnable the samples of a training are, and which labels are likely wrong, from saved scores"

BINS = 10  # of the histogram of learnability
BAR = 40  # characters of its longest bar


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "scores",
        metavar="SCORES",
        type=Path,
        help="the Parquet file of SampleScores.to_parquet, its manifest beside it",
    )
    add_targets_option(parser)
    add_suspects_option(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the result here, as JSON")


def run(args: argparse.Namespace) -> None:
    """Read, summarise, save and print."""
    if args.out is not None:
        make_folder(args.out)

    from prunewise import SampleScores
    from prunewise._files import write_json
    from prunewise.cli.loading import load_targets

    targets = load_targets(args.targets) if args.targets else None
    result = summary(SampleScores.from_parquet(args.scores), targets, args.suspects)
    if args.out is not None:
        write_json(args.out, result)
    if args.json:
        print_json(result)
    else:
        print_summary(str(args.scores), result)


def summary(scores: SampleScores, targets: Any, limit: int) -> dict[str, Any]:
    """The result as plain values; at most `limit` suspects are listed."""
    from dataclasses import replace

    import numpy as np

    import prunewise as pw

    labelled = targets is not None
    if not labelled:
        # Labels are only shown and checked, nothing is computed from them: any that can have been missed will do.
        scores = replace(scores, info={**scores.info, "label_hash": None})
        targets = np.where(scores.last_wrong == 0, 1, 0)
    found = pw.suspects(scores, targets)
    seen = scores.observations > 0
    counts, edges = np.histogram(scores.learnability[seen], BINS, (0, 1))
    return {
        **{key: scores.info.get(key) for key in ("model", "seed", "mode", "task", "num_classes")},
        "num_samples": len(scores),
        "observed": int(seen.sum()),
        "mean_learnability": float(scores.learnability[seen].mean()) if seen.any() else None,
        "learnability": {"edges": [round(float(edge), 10) for edge in edges], "counts": counts.tolist()},
        "triage": pw.triage(scores, targets).counts(),
        "suspects": {
            "count": len(found),
            "estimated_count": found.estimated_count,
            "threshold": found.threshold,
            "separable": found.separable,
            "first": [
                {
                    "sample_id": found.sample_id[i].item(),
                    "score": float(found.score[i]),
                    "label": found.given_label[i].tolist() if labelled else None,
                    "proposed_label": int(found.proposed_label[i]) if found.proposed_label[i] >= 0 else None,
                }
                for i in range(min(limit, len(found)))
            ],
        },
    }


def print_summary(title: str, result: dict[str, Any]) -> None:
    """What `summary` found, as tables."""
    from prunewise.samples.showing import cell

    counts, edges = result["learnability"]["counts"], result["learnability"]["edges"]
    observed, most = result["observed"], max(1, *result["learnability"]["counts"])
    rows = [
        [f"{low:.1f} to {high:.1f}", f"{count:,}", as_share(count, observed), "#" * -(-BAR * count // most)]
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    of_all = "" if observed == result["num_samples"] else f" observed of {result['num_samples']:,}"
    print_table(f"{title}: {observed:,} samples{of_all}", ["learnability", "samples", "share", ""], rows)
    print_line()
    groups = [
        [group, f"{count:,}", as_share(count, result["num_samples"])] for group, count in result["triage"].items()
    ]
    print_table("groups", ["group", "samples", "share"], groups)
    print_line()
    suspects = result["suspects"]
    print_line(
        f"{suspects['count']:,} suspects, with a score above {suspects['threshold']:.3f}; "
        + (
            f"about {suspects['estimated_count']:,} labels are wrong in all"
            if suspects["separable"]
            else "the training learned too little to tell wrong labels from hard samples"
        )
    )
    if suspects["first"]:
        # ids and labels come from a file that may be anybody's: nothing of them may move the cursor
        lines = [
            [cell(s["sample_id"]), f"{s['score']:.3f}", cell(s["label"]) or "-", cell(s["proposed_label"]) or "-"]
            for s in suspects["first"]
        ]
        print_table(f"the worst {len(lines)}", ["sample", "score", "label", "proposed"], lines)
