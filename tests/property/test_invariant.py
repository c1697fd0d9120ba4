"""Gated is pruned: for every model of the zoo and every setting of the gates, both compute the same function.

Both ways to a small model are taken: a gate session that is set to a plan and finished, and `apply_plan`. With it go
the costs: what is predicted is what the small model has.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import prunewise as pw
from prunewise.channels.oneshot import make_plan
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from tests.zoo import ZOO, build, call, flat_tensors

# With a single unit left, einsum multiplies element by element, which torch's counter does not count.
FEWER_AT_ONE = frozenset({"einsum_mlp", "einsum_attention", "moe"})

TOLERANCE = 1e-9
NAMES = sorted(ZOO)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(fast)


def outputs(model: nn.Module, inputs: Any, *, training: bool) -> list[Tensor]:
    """What the model gives in one mode, always with the same random numbers."""
    model.train(training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = flat_tensors(call(model, inputs))
    assert found
    return found


def assert_same(want: list[Tensor], got: list[Tensor], what: str) -> None:
    assert len(want) == len(got), what
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape, what
        if not a.is_floating_point():
            assert torch.equal(a, b), what
            continue
        finite = a.isfinite()
        assert torch.equal(finite, b.isfinite()), what
        assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()), what
        scale = float(a[finite].abs().max()) if finite.any() else 0.0
        worst = float((a[finite] - b[finite]).abs().max()) if finite.any() else 0.0
        assert worst <= TOLERANCE * max(scale, 1e-300), f"{what}: {worst:.1e} of {scale:.1e}"


def draw_plan(model: nn.Module, surgeon: Surgeon, seed: int) -> ChannelPlan:
    """A random plan; seed 0 is the narrowest one: a single unit in every group."""
    rng = random.Random(seed)
    keep = {}
    for group in surgeon.costs.groups:
        n = 1 if seed == 0 else max(1, round(group.size * rng.uniform(0.0, 1.0)))
        keep[group.name] = tuple(sorted(rng.sample(range(group.size), n)))
    return make_plan(fingerprint(model), surgeon.costs, keep, {"seed": str(seed)})


def counted_macs(model: nn.Module, inputs: Any) -> int:
    """What torch's own counter says, with attention computed in the open (it misses the fused kernel on the CPU)."""
    model.eval()
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        call(model, inputs)
    return int(counter.get_total_flops()) // 2


def modes(name: str) -> tuple[bool, ...]:
    """Random numbers are drawn for each channel, so a smaller model draws other ones: those models in eval mode only."""
    return (False,) if "dropout" in ZOO[name].tags else (False, True)


@pytest.mark.parametrize("name", NAMES)
def test_gated_is_pruned(name: str) -> None:
    model, inputs = build(name)
    surgeon = Surgeon.of(model, inputs)
    cost = surgeon.costs({})
    assert cost.macs == counted_macs(model, inputs)
    assert cost.params == sum(p.numel() for p in model.parameters())
    if not surgeon.costs.groups:
        pytest.skip("nothing can be removed")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    for seed in (0, random.Random(name).randrange(1, 1000)):
        plan = draw_plan(model, surgeon, seed)
        # `apply_plan` traces the model again, which takes longest: once is enough.
        small = pw.apply_plan(model, plan, inputs) if seed == 0 else surgeon.cut(model, plan.keep)
        if seed or name not in FEWER_AT_ONE:
            check_cost(small, plan, inputs)
        for training in modes(name):
            what = f"{name}, seed {seed}, {'train' if training else 'eval'} mode"
            trained = copy.deepcopy(model)
            with masked(trained, surgeon.grouping, plan.keep):
                want = outputs(trained, inputs, training=training)
            assert_same(want, outputs(copy.deepcopy(small), inputs, training=training), what)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{name}: {key} was changed"


@pytest.mark.parametrize("name", NAMES)
def test_gate_session_is_pruned(name: str) -> None:
    model, inputs = build(name)
    plain = copy.deepcopy(model)
    try:
        session = pw.attach_gates(model, inputs, budget=pw.Budget(macs=1.0), total_steps=10)
    except pw.NoPrunableGroupError:
        pytest.skip("nothing can be removed")
    what = f"{name}, all gates open"
    assert_same(outputs(copy.deepcopy(plain), inputs, training=False), outputs(model, inputs, training=False), what)
    plan = draw_plan(plain, session._surgeon, random.Random(name + "!").randrange(1, 1000))
    session.set_plan(plan)
    assert session.cost().as_dict() == plan.cost_after
    want = {t: outputs(copy.deepcopy(model), inputs, training=t) for t in modes(name)}
    model.eval()
    small = session.finish()
    assert session.plan.keep == plan.keep
    assert session.plan.cost_after == plan.cost_after
    for training, tensors in want.items():
        what = f"{name}, {'train' if training else 'eval'} mode, session"
        assert_same(tensors, outputs(copy.deepcopy(small), inputs, training=training), what)
    for (key, value), (other, same) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, same), f"{name}: {key} was changed"


def check_cost(small: nn.Module, plan: ChannelPlan, inputs: Any) -> None:
    measured = pw.measure(small, inputs)
    assert plan.cost_after["macs"] == measured.macs == counted_macs(small, inputs)
    assert plan.cost_after["params"] == measured.params == sum(p.numel() for p in small.parameters())
    # A dimension of size 1 may be reshaped without a copy, so that the small model writes a little less than predicted.
    assert measured.activation_bytes <= plan.cost_after["activation_bytes"]
