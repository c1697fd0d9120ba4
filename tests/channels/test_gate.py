"""The gate: the limit form against the literal formula of the paper."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prunewise.channels.gate import GatedWeight, Gates, Shaping, constant, gate, sigmoid_slope
from prunewise.core.sites import Site


def literal(w: Tensor, shaping: Shaping, big: float) -> Tensor:
    """TGF(w; g) = b(w) + s(w)·g(w), s(w) = (M·w − ⌊M·w⌋)/M, as arXiv 1904.10921 writes it."""
    step = (w >= 0).to(w.dtype)
    saw = (big * w - torch.floor(big * w)) / big
    return step + saw * shaping(w)


WEIGHTS = st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=8)


@pytest.mark.parametrize(("shaping", "bound"), [(constant, 1.0), (sigmoid_slope, 1.0)])
@given(values=WEIGHTS, big=st.sampled_from([1e2, 1e4, 1e6]))
def test_value_is_within_the_bound_of_the_formula(
    values: list[float], big: float, shaping: Shaping, bound: float
) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    assert float((gate(w, shaping) - literal(w, shaping, big)).abs().max()) <= bound / big + 1e-12


@pytest.mark.parametrize("shaping", [constant, sigmoid_slope])
@given(values=WEIGHTS)
def test_slope_is_the_limit_of_the_formula(values: list[float], shaping: Shaping) -> None:
    """The formula's slope is g + s·g', so it differs from g by less than sup|g'| / M."""
    big = 1e6
    w = torch.tensor(values, dtype=torch.float64)
    one, other = w.clone().requires_grad_(True), w.clone().requires_grad_(True)
    gate(one, shaping).sum().backward()
    step = (other >= 0).to(w.dtype)
    saw = (big * other - torch.floor(big * other).detach()) / big  # ⌊·⌋ has slope 0
    (step + saw * shaping(other)).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=2 / big)
    torch.testing.assert_close(one.grad, shaping(w))


def test_zero_is_open_and_the_chain_rule_holds() -> None:
    w = torch.tensor([-1e-30, -0.0, 0.0, 1e-30], requires_grad=True)
    out = gate(w, sigmoid_slope)
    assert out.tolist() == [0, 1, 1, 1]
    (out * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision(dtype: torch.dtype) -> None:
    """Where the literal formula is NaN for a large M, the limit is exact."""
    w = torch.tensor([-300.0, 0.5, 300.0], dtype=dtype, requires_grad=True)
    out = gate(w)
    assert out.dtype == dtype
    assert out.tolist() == [0, 1, 1]
    out.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [1, 1, 1]
    if dtype == torch.float16:
        assert literal(w.detach(), constant, 1e5).isnan().any()


def site(units: list[int], dim: int = 1) -> Site:
    import numpy as np

    return Site("w", dim, np.array(units))


def test_gated_weight_multiplies_the_channels_it_reads() -> None:
    gates = Gates([2, 3], torch.device("cpu"), constant, 1.0)
    gated = GatedWeight(gates, [site([0, 1, 2, 3, 4, -1]), site([4, 4], 0)], [0, 2], [2, 3], 2, ["w"])
    w = torch.randn(2, 6, requires_grad=True)
    assert torch.equal(gated(w), w)
    with torch.no_grad():
        gates.values[0][1] = -1
        gates.values[1][0] = -1
    out = gated(w)
    assert torch.equal(out != 0, torch.tensor([[True, False, False, True, True, True]] * 2))
    out.sum().backward()
    first, second = (v.grad for v in gates.values)
    torch.testing.assert_close(first, w.detach()[:, :2].sum(0))
    torch.testing.assert_close(second[0], w.detach()[:, 2].sum())
    assert w.grad is not None
    assert (w.grad[:, 1] == 0).all()


def test_copies_see_the_same_gates() -> None:
    gates = Gates([2], torch.device("cpu"), constant, 1.0)
    gated = GatedWeight(gates, [site([1, 0])], [0], [2], 2, ["w"])
    copied = copy.deepcopy(gated)
    with torch.no_grad():
        gates.values[0][0] = -1
    assert copied(torch.ones(1, 2)).tolist() == [[1, 0]]
    assert not list(copied.parameters())
    assert not list(copied.buffers())
    assert not copied.state_dict()
