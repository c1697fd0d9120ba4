"""What real code does, one oddity at a time: gated equals small, or it is pinned with a reason. Never silently other."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import prunewise as pw
from prunewise.core.plan import fingerprint
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from tests.oracle.models import ODD
from tests.zoo import call, cast, flat_tensors, randomize_

# Refused with an error that says what is wrong, which is right as well.
REFUSED: dict[str, str] = {
    "ReaderWritten": "NoPrunableGroupError: forward writes into the weight that reads the channels",
}

# With a single unit left, einsum multiplies element by element, which is not counted.
FEWER_AT_ONE = frozenset({"Experts"})


pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(model: nn.Module, inputs: Any, training: bool) -> list[Tensor]:
    """Of a copy: some of these models change with every call."""
    model = copy.deepcopy(model).train(training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return flat_tensors(call(model, copy.deepcopy(inputs)))


def assert_same(want: list[Tensor], got: list[Tensor], what: str) -> None:
    assert len(want) == len(got), what
    for a, b in zip(want, got, strict=True):
        assert not isinstance(b, FakeTensor), what
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * float(a.abs().nan_to_num(posinf=0).max()), msg=what,
                                   equal_nan=False)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_gated_is_small_or_pinned(name: str) -> None:
    odd = ODD[name]
    torch.manual_seed(1)
    model = randomize_(odd.build()).double().eval()
    inputs = cast(odd.inputs(), torch.float64)
    with torch.no_grad():  # hooks that make weights leave tensors that can be copied
        call(model, copy.deepcopy(inputs))
    before = outputs(model, inputs, False)
    state = copy.deepcopy(model.state_dict())
    if name in REFUSED:
        with pytest.raises(getattr(pw, REFUSED[name].partition(":")[0])):
            pw.apply_plan(model, pw.plan_channels(model, inputs, budget=pw.Budget(macs=0.7)), inputs)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) or name == "ReaderWritten"
        return
    surgeon = Surgeon.of(model, inputs)
    assert_same(before, outputs(model, inputs, False), f"{name}: changed by tracing")
    for group in surgeon.grouping.groups:
        assert group.prunable or group.reason, f"{name}: {group.name} is pinned without a reason"
    if odd.prunable is not None:
        assert bool(surgeon.costs.groups) == odd.prunable, [str(g) for g in surgeon.grouping.groups]
    if not surgeon.costs.groups:
        return
    for seed in range(3):
        rng = random.Random(seed)
        keep = {
            g.name: tuple(sorted(rng.sample(range(g.size), 1 if seed == 0 else rng.randint(1, g.size))))
            for g in surgeon.costs.groups
        }
        plan = pw.ChannelPlan(keep, {g.name: g.size for g in surgeon.costs.groups}, fingerprint(model))
        small = pw.apply_plan(model, plan, inputs)
        for training in (False, True):
            with masked(model, surgeon.grouping, keep):
                want = outputs(model, inputs, training)
            assert_same(want, outputs(small, inputs, training), f"{name}: apply_plan, {seed=}, {training=}")
        cost = surgeon.costs({n: len(k) for n, k in keep.items()})
        measured = pw.measure(small, inputs)
        assert measured.params == cost.params, name
        if name in FEWER_AT_ONE and min(map(len, keep.values())) == 1:
            assert measured.macs <= cost.macs
        else:
            assert measured.macs == cost.macs, name
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), f"{name}: {key} was changed"

    gated = copy.deepcopy(model)
    try:
        session = pw.attach_gates(gated, inputs, budget=pw.Budget(macs=1.0, params=1.0), total_steps=3)
    except pw.PrunewiseError:
        assert not any("parametrizations" in n for n, _ in gated.named_modules()) or name in (
            "WeightNormed", "SpectralNormed", "ParametrisedByAView",
        )  # fmt: skip
        return  # refused, and said why
    session.set_plan(plan)
    wanted = {t: outputs(gated, inputs, t) for t in (False, True)}
    small = session.finish()
    for training, want in wanted.items():
        assert_same(want, outputs(small, inputs, training), f"{name}: session, {training=}")
