"""The zoo's records as tables: a summary of each suite, one row a model, and what pins channels."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import RESULTS, table, without_folders
from records import grouped

Record = dict[str, Any]
OURS, PEER = "prunewise", "torch-pruning"


def write_table(found: Sequence[Record]) -> None:
    """`results/zoo.md` from the last record of every entry."""
    latest: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in found:
        latest[record["tool"]][record["id"]] = record
    ours, peer = latest[OURS], latest[PEER]
    parts = ["# The zoo", summary(ours.values())]
    if peer:
        parts += [f"## {PEER}, its documented generic set-up, ratio 0.5", peer_summary(peer.values())]
    parts += ["## What is not right, by cause", causes(ours.values()), "## What pins", pins(ours.values())]
    for suite, rows in grouped(ours.values(), lambda r: r["suite"]).items():
        parts += [f"## {suite}", models(rows, peer)]
    if found:
        last = found[-1]
        parts.append(
            f"`{last['command']}`, {last['date']}, torch {last['versions']['torch']}, {last['hardware']['cpu']}, one thread "
            f"and at most {last['limit_s']} s of processor time a model, seed {last['seed']}. Models by state of the code: "
            f"{commits(ours.values())}."
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "zoo.md").write_text(without_folders("\n\n".join(parts)) + "\n")
    print(parts[1])


def commits(found: Iterable[Record]) -> str:
    """How many records of each suite are of which commit."""
    counts = Counter((r["suite"], r["commit"]) for r in found)
    return ", ".join(f"{suite} {number} at {commit}" for (suite, commit), number in counts.most_common())


def right(record: Record, *stages: str) -> bool:
    """Whether these stages (none named: all that ran) are as they should be."""
    ran = record["stages"]
    return all(s in ran and ran[s]["right"] for s in stages) if stages else all(s["right"] for s in ran.values())


def seconds(record: Record) -> float:
    """Processor time of all stages; the clock's would tell what else the machine did."""
    stages = record["stages"].values()
    return float(record["limit_s"] if any("seconds" not in s for s in stages) else sum(s["seconds"] for s in stages))


def mismatch(record: Record) -> bool:
    """Gated is not small, or a saved model is not what was saved: what must never happen silently."""
    return any(stage in record["stages"] and "error" not in facts and not facts["right"]
               for stage in ("equal", "save", "export") for facts in [record["stages"].get(stage, {})])  # fmt: skip


def summary(found: Iterable[Record]) -> str:
    def row(name: str, group: Sequence[Record]) -> list[Any]:
        traced = [r for r in group if right(r, "trace")]
        wide = [r for r in traced if r["stages"]["trace"]["macs_share"] >= 0.6]
        half = [r for r in traced if "share" in r["stages"].get("oneshot", {}) and right(r, "oneshot")]
        low = [r for r in traced if r["stages"].get("oneshot", {"floor": 0}).get("floor", 0) > 0.5]
        kept = [r["stages"]["finish"] for r in group if r["stages"].get("finish", {}).get("class_kept")]
        return [
            name, len(group), len(traced), sum(right(r, "equal") for r in group), sum(map(mismatch, group)),
            len(kept), sum(f.get("graphs", 0) > 0 for f in kept),
            len(half), len(low), len(wide), sum(right(r) and not r["skip"] for r in group),
            f"{sum(map(seconds, group)) / 60:.0f}",
        ]  # fmt: skip

    found = list(found)
    rows = [row(name, group) for name, group in grouped(found, lambda r: f"{r['suite']}, {r['kind']}").items()]
    head = ["suite", "models", "traced", "gated = small", "mismatches", "class kept", "with graphs in it",
            "half of the MACs", "floor above half",
            "≥ 60 % of MACs prunable", "all stages right", "processor, min"]  # fmt: skip
    return table(head, [*rows, row("all", found)])


def peer_summary(found: Iterable[Record]) -> str:
    rows = []
    for name, group in grouped(found, lambda r: f"{r['suite']}, {r['kind']}").items():
        prunes = [r["stages"]["prune"] for r in group if right(r, "prune")]
        smaller = [p for p in prunes if p["share"] < 1]
        rows.append([name, len(group), len(prunes), len(smaller), len(group) - len(prunes)])
    return table(["suite", "models", "runs", "runs with its cost down", "fails"], rows)


def causes(found: Iterable[Record]) -> str:
    """Stages that are not right: the error without what belongs to one model, and the place in the code."""
    models: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for record in found:
        for stage, facts in record["stages"].items():
            if not facts["right"]:
                error = re.sub(r"'[^']*'|\"[^\"]*\"|\b[\d.,]+\b", "…", facts.get("cause", facts.get("error", "wrong")))
                place = (facts.get("in_prunewise") or facts.get("at") or [""])[0]
                models[stage, error.replace("|", "\\|")[:160], place].append(record["id"])
    ranked = sorted(models.items(), key=lambda item: (item[0][1] != "wrong", -len(item[1])))
    rows = [[len(ids), *key, ", ".join(ids[:4]) + (", …" if len(ids) > 4 else "")] for key, ids in ranked]
    return table(["models", "stage", "error", "at", "which"], rows) if rows else "Nothing."


def pins(found: Iterable[Record]) -> str:
    """Over all models: which operation holds parameters and MACs that no prunable group reaches."""
    held: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for record in found:
        trace = record["stages"].get("trace", {})
        build = record["stages"].get("build", {})
        for cause, pin in trace.get("pins", {}).items():
            held[cause]["models"] += 1
            held[cause]["groups"] += pin["groups"]
            held[cause]["params"] += pin["params"] / max(build["params"], 1)
            held[cause]["macs"] += pin["macs"] / max(trace["macs"], 1)
    ranked = sorted(held.items(), key=lambda item: -item[1]["macs"])
    rows = [
        [f"`{cause}`", int(h["models"]), int(h["groups"]), f"{h['params']:.2f}", f"{h['macs']:.2f}"]
        for cause, h in ranked
    ]
    return table(
        ["pinned because", "models", "groups", "parameters held (whole models)", "MACs held (whole models)"], rows
    )


def models(found: Iterable[Record], peer: dict[str, Record]) -> str:
    rows = []
    for record in found:
        stages = record["stages"]
        trace, finish, oneshot = (stages.get(s, {}) for s in ("trace", "finish", "oneshot"))
        wrong = [f"{name}: {facts.get('error', 'wrong')}" for name, facts in stages.items() if not facts["right"]]
        rows.append([
            record["id"].partition("/")[2],
            _said(stages.get("build", {}).get("params"), lambda n: f"{n / 1e6:.2f}"),
            _share(trace.get("params_share")), _share(trace.get("macs_share")), _share(trace.get("macs_floor")),
            _said(trace.get("seconds_analysis"), lambda s: f"{s:.1f}"),
            _class(finish),
            _said(stages.get("gates", {}).get("effect"), lambda e: f"{e:.2g}"),
            _said(stages.get("equal", {}).get("float32"), str),
            _said(oneshot.get("share"), lambda s: f"{s:.3f}"),
            f"{seconds(record):.0f}",
            _said(max((s.get("peak_mib", 0) for s in stages.values()), default=None), lambda m: f"{m:.0f}"),
            "; ".join(wrong).replace("|", "\\|")[:200] or "right",
            *([_peer(peer.get(record["id"]))] if peer else []),
        ])  # fmt: skip
    head = [
        "model", "parameters, M", "parameters prunable", "MACs prunable", "floor of MACs", "analysis, s", "class",
        "gates change", "difference", "half", "all, s", "peak, MiB", "stages", *([PEER] if peer else []),
    ]  # fmt: skip
    return table(head, rows)


def _class(finish: dict[str, Any]) -> str:
    """Whose class the small model is of, and how many of its modules are graphs."""
    if "class_kept" not in finish:
        return ""
    inside = finish.get("graphs", 0)
    return "graph" if not finish["class_kept"] else f"own, {inside} graphs in it" if inside else "own"


def _peer(record: Record | None) -> str:
    if record is None:
        return ""
    facts = record["stages"].get("prune", {"error": "not built"})
    return f"{facts['share']:.3f}" if "share" in facts and facts["right"] else "fails"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _said(value: Any, text: Callable[[Any], str]) -> str:
    return "" if value is None else text(value)
