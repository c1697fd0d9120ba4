"""The slow reference for `choose_units`: every combination of widths."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from prunewise.channels.choose import Limits


def allowed_widths(size: int, min_keep: int, round_to: int) -> list[int]:
    """What a group may keep: everything, or a multiple of `round_to` that is no less than `min_keep`."""
    return [n for n in range(1, size + 1) if n == size or (n % round_to == 0 and n >= min_keep)]


def fits(limits: Limits, widths: Mapping[str, int]) -> bool:
    """Whole costs, compared with the limits as written."""
    cost = limits.costs(widths).as_dict()
    return all(cost[kind] <= limit for kind, limit in limits.absolute.items())


def feasible(limits: Limits) -> list[dict[str, int]]:
    """All choices of widths that meet the limits."""
    names = [g.name for g in limits.groups]
    options = [allowed_widths(g.size, limits.min_keep, limits.round_to) for g in limits.groups]
    every = (dict(zip(names, widths, strict=True)) for widths in itertools.product(*options))
    return [widths for widths in every if fits(limits, widths)]
