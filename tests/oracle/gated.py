"""What may be removed from a small model, after it was shown on random plans that the gated model equals the small one."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.channels.oneshot import make_plan
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from prunewise.core.untouched import copied
from tests.zoo import call, cast, flat_tensors, randomize_


def outputs(model: nn.Module, inputs: Any, *, training: bool) -> list[Tensor]:
    """Of a copy: nothing of a forward pass in train mode is left behind."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return flat_tensors(call(copied(model).train(training), inputs))


def draw(model: nn.Module, surgeon: Surgeon, seed: int, *, least: int = 1, drop: bool = False) -> ChannelPlan:
    """A random plan; seed 0 keeps the `least` units of every group. With `drop`, one of the residual branches goes."""
    rng = random.Random(seed)
    keep = {
        g.name: tuple(sorted(rng.sample(range(g.size), least if seed == 0 else rng.randint(least, g.size))))
        for g in surgeon.costs.groups
    }
    branches = [b for b in surgeon.grouping.branches if not b.reason and b.groups]
    if drop:
        keep.update(dict.fromkeys(rng.choice(branches).groups, ()))
    return make_plan(fingerprint(model), surgeon.costs, keep, {})


def assert_same(want: list[Tensor], got: list[Tensor], what: str) -> None:
    assert len(want) == len(got), what
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * float(a.abs().max()), msg=what)


def removable(
    model: nn.Module,
    inputs: Any,
    *,
    seeds: int = 3,
    least: int = 1,
    drop: bool = False,
    graph: bool = False,
    training: tuple[bool, ...] = (False, True),
) -> dict[str, int]:
    """The prunable groups and their sizes, proven to be so: masked, gated by a session and small, all compute the same.

    Args:
        model: drawn anew, in double precision; not changed after that.
        inputs: a tensor, a tuple or a dict.
        seeds: how many random plans; the first keeps as few units of each group as any.
        least: how few that is (with a single one, einsum multiplies element by element: another operation).
        drop: let a residual branch go as a whole in every plan.
        graph: a small model that is a graph module will do; else it has to be of the user's class.
        training: modes to compare in.
    """
    model, inputs = randomize_(model).double(), cast(inputs, torch.float64)
    surgeon = Surgeon.of(model, inputs, blocks=drop)
    assert all(g.prunable or g.reason for g in surgeon.grouping.groups)
    state = copy.deepcopy(model.state_dict())
    for seed in range(seeds):
        plan = draw(model, surgeon, seed, least=least, drop=drop)
        small = pw.apply_plan(model, plan, inputs)
        assert graph or type(small) is type(model)
        cost = pw.measure(small, inputs)
        assert (cost.macs, cost.params) == (plan.cost_after["macs"], plan.cost_after["params"])
        for mode in training:
            with masked(model, surgeon.grouping, plan.keep):
                want = outputs(model, inputs, training=mode)
            assert_same(want, outputs(small, inputs, training=mode), f"apply_plan, {seed=}, training={mode}")
        gated = copied(model)
        session = pw.attach_gates(gated, inputs, budget=pw.Budget(macs=1.0), total_steps=3, drop_blocks=drop)
        session.set_plan(plan)
        wanted = {mode: outputs(gated, inputs, training=mode) for mode in training}
        small = session.finish()
        for mode, tensors in wanted.items():
            assert_same(tensors, outputs(small, inputs, training=mode), f"session, {seed=}, training={mode}")
        assert list(gated.state_dict()) == list(state), "gates leave no trace"
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} was changed"
    return {g.name: g.size for g in surgeon.costs.groups}
