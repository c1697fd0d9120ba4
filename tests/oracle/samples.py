"""Every score of one sample by a plain loop over its observations, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Row = Sequence[float]


def softmax(z: Row) -> list[float]:
    top = max(z)
    powers = [math.exp(v - top) for v in z]
    return [p / sum(powers) for p in powers]


def one_observation(z: Row, y: int, t: Row | None = None) -> dict[str, float]:
    """What one set of logits says of label y, or of the distribution t with its highest entry at y."""
    p = softmax(z)
    t = [float(k == y) for k in range(len(z))] if t is None else t
    others = [k for k in range(len(z)) if k != y]
    return {
        "hit": all(z[y] > z[k] for k in others),
        "aum": z[y] - max(z[k] for k in others),
        "aum_softmax": p[y] - max(p[k] for k in others),
        "confidence": p[y],
        "loss": -sum(a * math.log(b) for a, b in zip(t, p, strict=True) if a > 0),
        "el2n": math.sqrt(sum((a - b) ** 2 for a, b in zip(t, p, strict=True))),
        "predicted": y if all(z[y] > z[k] for k in others) else max(others, key=lambda k: z[k]),
    }


def scores(seen: list[dict[str, float]], window: int) -> dict[str, Any]:
    """The scores of a sample that was observed as `seen` says, in order."""
    n = len(seen)
    hits = [bool(s["hit"]) for s in seen]
    misses = [i for i, h in enumerate(hits) if not h]

    def mean(name: str, rows: list[dict[str, float]]) -> float:
        return math.fsum(r[name] for r in rows) / len(rows) if rows else math.nan

    confidence = mean("confidence", seen)
    return {
        "observations": n,
        "hits": sum(hits),
        "learnability": sum(hits) / n if n else math.nan,
        "forgetting_events": sum(1 for a, b in pairwise(hits) if a and not b),
        "first_learnt": hits.index(True) if any(hits) else -1,
        "last_missed": misses[-1] if misses else -1,
        "last_wrong": int(seen[misses[-1]]["predicted"]) if misses else -1,
        "aum": mean("aum", seen),
        "aum_softmax": mean("aum_softmax", seen),
        "confidence": confidence,
        "variability": math.sqrt(mean("v", [{"v": (s["confidence"] - confidence) ** 2} for s in seen])),
        "loss": mean("loss", seen),
        "el2n": mean("el2n", seen[:window]),
    }
