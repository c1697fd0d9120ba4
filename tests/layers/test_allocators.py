"""Allocators: exact to one weight, within the limits, whatever the importances are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prunewise as pw
from prunewise.layers.allocators import Total, alpha_pruning, erk, owl, proportional, uniform
from prunewise.layers.ranking import (
    _highest,
    by_capacity,
    by_score,
    capacity_costs,
    global_magnitude,
    lamp,
    lamp_scores,
)

Shape = tuple[int, ...]
shapes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8).map(
    lambda found: {f"l{i}": shape for i, shape in enumerate(found)}
)
sparsities = st.one_of(st.sampled_from([0.0, 0.5, 0.999999, math.nextafter(1, 0)]), st.floats(0, 1, exclude_max=True))
numbers = st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0, 1e-300, 1e300]), st.floats(1e-6, 1e6))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Total, dict[str, float], int]:
    found = draw(shapes)
    sparsity = draw(sparsities)
    size = sum(math.prod(s) for s in found.values())
    keep = max(1, math.floor((1 - sparsity) * size + 0.5))
    floor = draw(st.one_of(st.just(0.0), st.floats(0, 1)))
    if sum(math.ceil(floor * math.prod(s) - 1e-9) for s in found.values()) > keep:
        floor = 0.0
    return Total(found, sparsity, floor), {name: draw(numbers) for name in found}, draw(st.integers(0, 1000))


@given(problems())
def test_every_allocator_is_exact_and_within_its_limits(problem: tuple[Total, dict[str, float], int]) -> None:
    total, values, seed = problem
    rng = torch.Generator().manual_seed(seed)
    weights = {n: torch.randint(-3, 4, s, generator=rng).float() for n, s in total.shapes.items()}  # many ties
    size = sum(math.prod(s) for s in total.shapes.values())
    for counts in (
        proportional(values, total), uniform(total), erk(total), owl(values, total), alpha_pruning(values, total),
        global_magnitude(weights, total), lamp(weights, total),
    ):  # fmt: skip
        assert list(counts) == list(total.shapes)
        assert abs(sum(counts.values()) - (1 - total.sparsity) * size) <= (0.5 + 1e-6 if total.keep > 1 else 1)
        for name, count in counts.items():
            n = math.prod(total.shapes[name])
            assert math.ceil(total.floor * n - 1e-9) <= count <= n


@given(problems(), st.floats(1e-9, 1e9))
def test_the_unit_of_importances_does_not_matter(problem: tuple[Total, dict[str, float], int], scale: float) -> None:
    total, values, _ = problem
    values = {n: v for n, v in values.items() if 1e-200 < v < 1e200 or v == 0}
    values = {n: values.get(n, 1.0) for n in total.shapes}
    scaled = {n: v * scale for n, v in values.items()}
    assert proportional(scaled, total) == proportional(values, total)
    assert owl(scaled, total) == owl(values, total)
    assert alpha_pruning(scaled, total) == alpha_pruning(values, total)


@given(problems())
def test_more_important_layers_are_not_sparser(problem: tuple[Total, dict[str, float], int]) -> None:
    total, values, _ = problem
    counts = proportional(values, total)
    size = {n: math.prod(s) for n, s in total.shapes.items()}
    for a in counts:
        for b in counts:
            if values[a] > values[b]:  # one weight of rounding each, and the floor's own rounding
                slack = 1 / size[a] + 1 / size[b] + 1e-6
                assert counts[a] / size[a] >= counts[b] / size[b] - slack


@given(problems())
def test_densities_are_proportional_by_a_slow_solver(problem: tuple[Total, dict[str, float], int]) -> None:
    """Bisection on κ in place of the exact solution; every layer within one weight of it, and a bit for rounding."""
    total, values, _ = problem
    top = max(values.values())
    values = {n: v / top for n, v in values.items() if top > 0}
    if not values or min(values.values()) < 1e-6:
        return
    size = {n: math.prod(s) for n, s in total.shapes.items()}
    low = {n: math.ceil(total.floor * k - 1e-9) / k for n, k in size.items()}

    def densities(kappa: float) -> dict[str, float]:
        return {n: min(1.0, max(low[n], kappa * v)) for n, v in values.items()}

    left, right = 0.0, 1e8
    for _ in range(200):
        middle = (left + right) / 2
        if sum(size[n] * d for n, d in densities(middle).items()) < total.keep:
            left = middle
        else:
            right = middle
    for name, count in proportional(values, total).items():
        assert abs(count - size[name] * densities(right)[name]) <= 1 + 1e-3


def test_known_allocations() -> None:
    total = Total({"a": (10, 10), "b": (100, 10), "c": (10,)}, 0.9)
    assert uniform(total) == {"a": 10, "b": 100, "c": 1}
    # ERK by hand: ratios 0.2, 0.11, 1; 111 = κ (100·0.2 + 1000·0.11 + 10·1)
    assert erk(total) == {"a": 16, "b": 87, "c": 8}
    # At twice that "c" is full, and 212 = κ (100·0.2 + 1000·0.11)
    assert erk(Total(total.shapes, 0.8)) == {"a": 33, "b": 179, "c": 10}
    assert proportional({"a": 0, "b": 1, "c": 0}, total) == {"a": 0, "b": 111, "c": 0}
    full = Total(total.shapes, 0.05)
    assert proportional({"a": 0, "b": 1, "c": 0}, full) == {"a": 50, "b": 1000, "c": 5}  # 55 left for 110
    assert proportional({"a": 0, "b": 0, "c": 0}, total) == uniform(total)
    assert proportional({"a": 1, "b": 1, "c": 1}, Total(total.shapes, 0)) == {"a": 100, "b": 1000, "c": 10}


def test_owl_without_clipping_is_the_published_one_up_to_its_shift() -> None:
    total = Total(dict.fromkeys("abcd", (100, 100)), 0.5)
    ratios = {"a": 0.01, "b": 0.03, "c": 0.05, "d": 0.02}
    counts = owl(ratios, total, spread=0.1)
    scaled = (np.array(list(ratios.values())) - 0.01) / 0.04 * 0.2
    published = scaled - scaled.mean() + 0.5  # equal sizes: its mean is the total
    np.testing.assert_allclose(np.array(list(counts.values())) / 1e4, published, atol=1e-4)
    assert len(set(owl(dict.fromkeys("abcd", 0.2), total).values())) == 1


def test_alpha_pruning_without_clipping_is_the_published_one() -> None:
    total = Total({"a": (100, 100), "b": (200, 100), "c": (50, 100)}, 0.5)
    counts = alpha_pruning({"a": 2.0, "b": 4.0, "c": 3.0}, total, spread=0.2)
    slope = np.array([0.8, 1.2, 1.0])
    size = np.array([10000, 20000, 5000])
    published = slope * (0.5 * size.sum() / (slope @ size))
    np.testing.assert_allclose(1 - np.array(list(counts.values())) / size, published, atol=2e-4)
    neutral = alpha_pruning({"a": 2.0, "b": 4.0, "c": math.nan}, total, spread=0.2)
    assert neutral == counts  # undefined counts as the mean, which is 3


def test_lamp_by_its_definition() -> None:
    weight = torch.tensor([[0.5, -2.0], [1.0, 0.25]])
    scores = lamp_scores(weight)
    for index in np.ndindex(2, 2):
        own = float(weight[index]) ** 2
        behind = sum(float(v) ** 2 for v in weight.flatten() if abs(float(v)) >= abs(float(weight[index])))
        assert float(scores[index]) == pytest.approx(own / behind, rel=1e-12)
    counts = lamp({"a": weight, "b": weight * 1000}, Total({"a": (2, 2), "b": (2, 2)}, 0.5))
    assert counts == {"a": 2, "b": 2}  # a layer's scale does not matter to LAMP
    assert global_magnitude({"a": weight, "b": weight * 1000}, Total({"a": (2, 2), "b": (2, 2)}, 0.5)) == {
        "a": 0,
        "b": 4,
    }
    assert lamp({"a": torch.zeros(4), "b": torch.ones(4)}, Total({"a": (4,), "b": (4,)}, 0.5)) == {"a": 0, "b": 4}


def test_ties_are_shared_whatever_the_order() -> None:
    weights = {"a": torch.ones(30), "b": torch.ones(10)}
    assert by_score(weights, Total({"a": (30,), "b": (10,)}, 0.5)) == {"a": 15, "b": 5}
    assert by_score(weights, Total({"b": (10,), "a": (30,)}, 0.5)) == {"b": 5, "a": 15}
    assert by_score({"a": torch.ones(30), "b": torch.zeros(10)}, Total({"a": (30,), "b": (10,)}, 0.5, 0.4)) == {
        "a": 16, "b": 4,
    }  # fmt: skip


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, math.nan, math.inf, "0.5", None])
def test_totals_out_of_range(sparsity: float) -> None:
    with pytest.raises(pw.SparsityError, match=r"in \[0, 1\)"):
        Total({"a": (3,)}, sparsity)


def test_what_cannot_be_met_is_said() -> None:
    with pytest.raises(pw.SparsityError, match="lower one of them"):
        Total({"a": (30,)}, 0.9, floor=0.2)
    with pytest.raises(pw.SparsityError, match="floor"):
        Total({"a": (30,)}, 0.9, floor=math.nan)
    total = Total({"a": (3,), "b": (3,)}, 0.5)
    with pytest.raises(pw.SparsityError, match="'b' has no importance"):
        proportional({"a": 1}, total)
    with pytest.raises(pw.SparsityError, match="'b' is negative"):
        proportional({"a": 1, "b": -1}, total)
    with pytest.raises(pw.NonFiniteError, match="'a' is nan"):
        proportional({"a": math.nan, "b": 1}, total)
    with pytest.raises(pw.NonFiniteError, match="weight of 'a'"):
        lamp({"a": torch.tensor([1, math.nan, 2]), "b": torch.ones(3)}, total)


def test_by_capacity_between_lamp_and_erk() -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(20, 10), "b": 3 * torch.randn(40, 20).pow(3), "c": torch.randn(10, 8, 3, 3)}
    total = Total({n: tuple(w.shape) for n, w in weights.items()}, sparsity=0.8)
    alike = dict.fromkeys(weights, 1.0)
    assert by_capacity(weights, alike, total, anywhere=0.0) == lamp(weights, total)
    directions = {n: float(sum(w.shape)) for n, w in weights.items()}
    difference = [abs(by_capacity(weights, directions, total, anywhere=1.0)[n] - k) for n, k in erk(total).items()]
    assert max(difference) <= 1


def test_by_capacity_is_the_least_loss_there_is() -> None:
    """Against every other split of a small network, by the loss that it says it makes least."""
    torch.manual_seed(1)
    weights = {"a": torch.randn(6), "b": 5 * torch.randn(5), "c": torch.randn(4)}
    masses = {"a": 1.0, "b": 0.3, "c": 2.5}
    total = Total({n: tuple(w.shape) for n, w in weights.items()}, sparsity=0.6)

    def lost(keep: dict[str, int]) -> float:
        # Σ of the cost of each weight that goes, smallest first: the discrete form of Σ −m·log(1 − r).
        return sum(float(capacity_costs(w, masses[n])[: w.numel() - keep[n]].sum()) for n, w in weights.items())

    splits = [
        dict(zip(weights, counts, strict=True))
        for counts in itertools.product(range(7), range(6), range(5))
        if sum(counts) == total.keep
    ]
    assert lost(by_capacity(weights, masses, total)) == pytest.approx(min(lost(s) for s in splits))


def test_by_capacity_scale_zeros_and_masses() -> None:
    torch.manual_seed(2)
    weights = {"a": torch.randn(30, 10), "b": torch.randn(20, 10)}
    masses = {"a": 2.0, "b": 1.0}
    total = Total({n: tuple(w.shape) for n, w in weights.items()}, sparsity=0.7)
    counts = by_capacity(weights, masses, total)
    scaled = {"a": weights["a"] * 1e-6, "b": weights["b"] * 1e6}
    assert by_capacity(scaled, {n: 7 * m for n, m in masses.items()}, total) == counts
    assert by_capacity(weights, {"a": 4.0, "b": 1.0}, total)["a"] > counts["a"]
    dead = {**weights, "c": torch.zeros(50)}
    total = Total({n: tuple(w.shape) for n, w in dead.items()}, sparsity=0.7)
    assert by_capacity(dead, {**masses, "c": 9.0}, total)["c"] == 0
    with pytest.raises(pw.NonFiniteError):
        by_capacity({"a": torch.tensor([1.0, math.nan])}, {"a": 1.0}, Total({"a": (2,)}, 0.5))


@given(
    st.lists(
        st.lists(st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0]), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_the_number_that_is_so_many_from_the_top(lists: list[list[float]], data: st.DataObject) -> None:
    arrays = [np.sort(np.array(values)) for values in lists]
    everything = np.sort(np.concatenate(arrays))[::-1]
    number = data.draw(st.integers(1, len(everything)))
    assert _highest(arrays, number) == everything[number - 1]
