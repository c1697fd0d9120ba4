"""Plans as data: what is malformed is refused, field by field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import prunewise as pw
from prunewise.core.plan import ChannelPlan, fingerprint


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 2))


X = torch.zeros(1, 4)


@pytest.fixture
def plan() -> ChannelPlan:
    return pw.plan_channels(net(), X, budget=pw.Budget(macs=0.5))


def test_round_trip_through_json(plan: ChannelPlan) -> None:
    again = ChannelPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    again.check(net(), pw.channel_groups(net(), X))


def put(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    def with_value(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = value

        return change

    return with_value


KEEP = ("groups", "0", "keep")
MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "kind": put("kind")("something"),
    "no kind": lambda d: d.pop("kind"),
    "version": put("schema_version")(99),
    "no version": lambda d: d.pop("schema_version"),
    "version as text": put("schema_version")("1"),
    "no fingerprint": lambda d: d.pop("fingerprint"),
    "fingerprint a number": put("fingerprint")(3),
    "no groups": lambda d: d.pop("groups"),
    "groups a list": put("groups")([]),
    "group a list": put("groups", "0")([1]),
    "no size": lambda d: d["groups"]["0"].pop("size"),
    "size zero": put("groups", "0", "size")(0),
    "size negative": put("groups", "0", "size")(-8),
    "size a bool": put("groups", "0", "size")(True),
    "size a float": put("groups", "0", "size")(8.0),
    "no keep": lambda d: d["groups"]["0"].pop("keep"),
    "keep a text": put(*KEEP)("01"),
    "negative": put(*KEEP)([-1, 2]),
    "too large": put(*KEEP)([0, 8]),
    "huge": put(*KEEP)([0, 10**30]),
    "bool": put(*KEEP)([False, 1]),
    "float": put(*KEEP)([0.0, 1]),
    "null": put(*KEEP)([None]),
    "nested": put(*KEEP)([[0]]),
    "repeated": put(*KEEP)([1, 1]),
    "descending": put(*KEEP)([2, 1]),
    "cost a list": put("cost_before")([]),
    "cost negative": put("cost_after")({"macs": -1}),
    "cost a float": put("cost_after")({"macs": 0.5}),
    "notes a list": put("notes")([]),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_data_is_refused(plan: ChannelPlan, what: str) -> None:
    data = copy.deepcopy(plan.to_dict())
    MALFORMED[what](data)
    with pytest.raises(pw.PlanError):
        ChannelPlan.from_dict(json.loads(json.dumps(data)))


@pytest.mark.parametrize("data", [None, [], "plan", 3, {}])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(pw.PlanError, match="not a channel plan"):
        ChannelPlan.from_dict(data)


def test_a_plan_of_another_model_is_refused(plan: ChannelPlan) -> None:
    other = net(9)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(pw.PlanError, match="another model"):
        pw.apply_plan(other, plan, X)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("name", "size", "keep", "message"),
    [
        ("nobody", 8, (0,), "does not have"),
        ("0", 9, (0,), "8 units in the model and 9 in the plan"),
        ("4", 2, (0,), "must stay: an output"),
        ("0", 8, (), "at least one"),
        ("0", 8, (1, 0), "ascend"),
        ("0", 8, (8,), r"\[0, 8\)"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(name: str, size: int, keep: tuple[int, ...], message: str) -> None:
    model = net()
    wrong = ChannelPlan({name: keep}, {name: size}, fingerprint(model))
    with pytest.raises(pw.PlanError, match=message):
        pw.apply_plan(model, wrong, X)


def test_fingerprint_is_of_names_and_shapes_only() -> None:
    model, other = net(), net()
    nn.init.zeros_(other[0].weight)
    assert fingerprint(model) == fingerprint(other) != fingerprint(net(9))
    other[0].register_buffer("extra", torch.zeros(1))
    assert fingerprint(model) != fingerprint(other)


def test_an_empty_plan_changes_nothing() -> None:
    model = net()
    x = torch.randn(3, 4)
    small = pw.apply_plan(model, ChannelPlan({}, {}, fingerprint(model)), X)
    assert small is not model
    assert torch.equal(small(x), model(x))


def test_a_buffer_that_forward_replaces_makes_no_other_model() -> None:
    model = torch.nn.Linear(3, 2)
    model.register_buffer("table", torch.zeros(1))
    before = fingerprint(model)
    model.table = torch.zeros(5)  # as forward does once it knows the size of its input
    assert fingerprint(model) == before
