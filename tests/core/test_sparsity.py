"""Sparsity plans as data: what is malformed is refused, field by field."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

import prunewise as pw

PLAN = pw.SparsityPlan({"a": 3, "b.c": 0}, {"a": (2, 3), "b.c": (4,)}, {"importance": "mine"})


def test_round_trip_through_json() -> None:
    again = pw.SparsityPlan.from_dict(json.loads(json.dumps(PLAN.to_dict())))
    assert again == PLAN
    assert again.shapes["a"] == (2, 3)


def test_it_is_a_mapping_from_layer_to_sparsity() -> None:
    assert dict(PLAN) == {"a": 0.5, "b.c": 1.0}
    assert len(PLAN) == 2 and "a" in PLAN and "x" not in PLAN
    assert (PLAN.kept, PLAN.sizes, PLAN.sparsity) == (3, {"a": 6, "b.c": 4}, 0.7)


def put(*path: Any, to: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("kind", to="prunewise/channel-plan"), put("schema_version", to=2), put("schema_version", to=True),
        put("layers", to=[]), put("layers", to={}), put("layers", "a", to=3), put("notes", to=[]),
        put("layers", "a", "keep", to=7), put("layers", "a", "keep", to=-1), put("layers", "a", "keep", to=2.0),
        put("layers", "a", "keep", to=True), put("layers", "a", "keep", to=None), put("layers", "a", "shape", to=[]),
        put("layers", "a", "shape", to=6), put("layers", "a", "shape", to=[2, 0]), put("layers", "a", "shape", to=[2.0, 3]),
    ],
)  # fmt: skip
def test_malformed_data_is_refused(change: Any) -> None:
    data = copy.deepcopy(PLAN.to_dict())
    change(data)
    with pytest.raises(pw.PlanError):
        pw.SparsityPlan.from_dict(json.loads(json.dumps(data)))


@pytest.mark.parametrize("data", [None, [], "plan", 3, {}])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(pw.PlanError, match="not a sparsity plan"):
        pw.SparsityPlan.from_dict(data)


def test_a_plan_of_another_model_is_refused() -> None:
    PLAN.check({"a": (2, 3), "b.c": (4,), "more": (1,)})
    with pytest.raises(pw.PlanError, match=r"layer 'b.c' that the model does not have"):
        PLAN.check({"a": (2, 3)})
    with pytest.raises(pw.PlanError, match=r"'a' has shape \(3, 2\)"):
        PLAN.check({"a": (3, 2), "b.c": (4,)})
    with pytest.raises(pw.PlanError, match="keeps 9 of the 6"):
        pw.SparsityPlan({"a": 9}, {"a": (2, 3)}).check({"a": (2, 3)})
