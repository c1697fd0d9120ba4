"""The exact end of every method, against all combinations of widths on tiny networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunewise as pw
from prunewise.channels.choose import Limits, choose_units
from prunewise.core.cost import CostModel
from tests.oracle.choose import allowed_widths, feasible, fits

SIZES = (7, 5, 6)


def net() -> nn.Module:
    torch.manual_seed(0)
    a, b, c = SIZES
    return nn.Sequential(
        nn.Linear(3, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, 2)
    )


COSTS = CostModel.of(net(), torch.zeros(1, 3))
FULL = COSTS({}).as_dict()


@st.composite
def cases(draw: Any) -> tuple[dict[str, np.ndarray], Limits]:
    worth = {
        g.name: np.array(draw(st.lists(st.integers(0, 9), min_size=g.size, max_size=g.size)), dtype=np.float64)
        for g in COSTS.groups
    }
    kinds = draw(st.sets(st.sampled_from(["macs", "params", "activation_bytes"]), min_size=1))
    absolute = {kind: draw(st.floats(0.05, 1.0)) * FULL[kind] for kind in sorted(kinds)}
    return worth, Limits(COSTS, tuple(COSTS.groups), absolute, draw(st.integers(1, 4)), draw(st.integers(1, 4)))


@given(cases())
@settings(max_examples=100)
def test_never_over_and_nothing_left_out_that_fits(case: tuple[dict[str, np.ndarray], Limits]) -> None:
    worth, limits = case
    keep = choose_units(worth, limits)
    widths = {name: len(units) for name, units in keep.items()}
    for group in limits.groups:
        assert widths[group.name] in allowed_widths(group.size, limits.min_keep, limits.round_to)
        units = keep[group.name]
        assert list(units) == sorted(set(units))
        values = worth[group.name]
        gone = sorted(set(range(group.size)) - set(units))
        if gone:  # within a group the best stay, ties go to the lower index
            assert min(values[list(units)]) >= max(values[gone])
            last = min(values[list(units)])
            assert max([u for u in units if values[u] == last]) < min(
                [u for u in gone if values[u] == last], default=99
            )
    possible = feasible(limits)
    if not possible:
        assert widths == {g.name: limits.floor(g) for g in limits.groups}
        return
    assert fits(limits, widths)
    for group in limits.groups:  # the next width up of any one group does not fit
        options = allowed_widths(group.size, limits.min_keep, limits.round_to)
        wider = [n for n in options if n > widths[group.name]]
        if wider:
            assert not fits(limits, {**widths, group.name: wider[0]}), group.name


@given(cases())
@settings(max_examples=40)
def test_floors_are_the_least_that_can_be_chosen(case: tuple[dict[str, np.ndarray], Limits]) -> None:
    _, limits = case
    for group in limits.groups:
        assert limits.floor(group) == min(allowed_widths(group.size, limits.min_keep, limits.round_to))


@given(cases(), st.data())
@settings(max_examples=60)
def test_what_is_closed_stays_closed(case: tuple[dict[str, np.ndarray], Limits], data: Any) -> None:
    worth, limits = case
    limits = replace(limits, min_keep=1, round_to=1)
    start = {g.name: tuple(sorted(data.draw(st.sets(st.integers(0, g.size - 1), min_size=1)))) for g in limits.groups}
    keep = choose_units(worth, limits, start=start)
    assert all(set(keep[name]) <= set(start[name]) for name in keep)


def test_equal_worth_takes_from_every_group_alike_by_order() -> None:
    worth = {g.name: np.ones(g.size) for g in COSTS.groups}
    keep = choose_units(worth, Limits(COSTS, tuple(COSTS.groups), {"macs": 0.5 * FULL["macs"]}))
    assert all(units == tuple(range(len(units))) for units in keep.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_worth_that_is_not_finite_is_an_error(bad: float) -> None:
    worth = {g.name: np.ones(g.size) for g in COSTS.groups}
    worth["2"][3] = bad
    with pytest.raises(pw.NonFiniteError, match="'2'"):
        choose_units(worth, Limits(COSTS, tuple(COSTS.groups), {"macs": 40.0}))


@given(cases())
@settings(max_examples=40)
def test_marginal_cost_is_the_slope(case: tuple[dict[str, np.ndarray], Limits]) -> None:
    _, limits = case
    share = limits.marginal({})
    over = {k: max(0.0, FULL[k] / limits.absolute[k] - 1) for k in limits.absolute}
    for group in limits.groups:
        less = COSTS({group.name: group.size - 1}).as_dict()
        want = sum(
            (over[k] if any(over.values()) else 1.0) * (FULL[k] - less[k]) / limits.absolute[k] for k in limits.absolute
        )
        assert share[group.name] == pytest.approx(max(want, 1e-30), rel=1e-6, abs=1e-9)
