"""The sparsity of each layer, as data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from prunewise.core.checks import check_plan
from prunewise.core.errors import PlanError

SCHEMA_VERSION = 1
_KIND = "prunewise/sparsity-plan"


@dataclass(frozen=True)
class SparsityPlan(Mapping[str, float]):
    """How many weights of each layer stay. As a mapping: {layer: sparsity}, in the order of the model.

    Attributes:
        keep: for each layer, by module path, the number of weights that stay.
        shapes: the shape of each layer's weight.
        notes: free text by key (importance, total asked for); never read by prunewise.

    Example:
        >>> plan = SparsityPlan({"0": 3, "2": 4}, {"0": (3, 4), "2": (2, 2)})
        >>> dict(plan), plan.sparsity
        ({'0': 0.75, '2': 0.0}, 0.5625)
    """

    keep: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    notes: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return 1.0 - self.keep[name] / math.prod(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keep)

    def __len__(self) -> int:
        return len(self.keep)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of weights of each layer."""
        return {name: math.prod(self.shapes[name]) for name in self.keep}

    @property
    def kept(self) -> int:
        """The number of weights that stay, over all layers of the plan."""
        return sum(self.keep.values())

    @property
    def sparsity(self) -> float:
        """The share of weights removed, over all layers of the plan."""
        return 1.0 - self.kept / sum(self.sizes.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data, with its schema version."""
        return {
            "kind": _KIND,
            "schema_version": SCHEMA_VERSION,
            "layers": {n: {"shape": list(self.shapes[n]), "keep": k} for n, k in self.keep.items()},
            "notes": dict(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Any) -> SparsityPlan:
        """A plan from JSON data; every field is checked.

        Raises:
            PlanError: a field is missing, of the wrong type or out of range, or the version is not this one.
        """
        data = check_plan(data, "sparsity plan", _KIND, SCHEMA_VERSION)
        layers, notes = data.get("layers"), data.get("notes", {})
        if not isinstance(layers, dict) or not layers or not isinstance(notes, dict):
            raise PlanError("sparsity plan without 'layers' (an object, not empty), or with 'notes' that are no object")
        keep, shapes = {}, {}
        for name, layer in layers.items():
            shape = layer.get("shape") if isinstance(layer, dict) else None
            kept = layer.get("keep") if isinstance(layer, dict) else None
            if not isinstance(shape, list) or not shape or not all(type(s) is int and s > 0 for s in shape):
                raise PlanError(f"sparsity plan, layer {name!r}: needs 'shape', a list of sizes")
            if type(kept) is not int or not 0 <= kept <= math.prod(shape):
                raise PlanError(
                    f"sparsity plan, layer {name!r}: needs 'keep', a count of at most {math.prod(shape)} weights"
                )
            keep[str(name)], shapes[str(name)] = kept, tuple(shape)
        return cls(keep, shapes, {str(k): str(v) for k, v in notes.items()})

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `PlanError` where the plan is not one for a model whose layers have these shapes."""
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise PlanError(
                    f"the plan has a layer {name!r} that the model does not have, or whose weights do not count: use the "
                    "model that the plan was made for, or make it again"
                )
            if tuple(shapes[name]) != tuple(shape):
                raise PlanError(
                    f"the weight of {name!r} has shape {tuple(shapes[name])}, and in the plan {tuple(shape)}"
                )
            kept: object = self.keep.get(name)
            if not isinstance(kept, Integral) or not 0 <= int(kept) <= math.prod(shape):
                raise PlanError(f"the plan keeps {self.keep.get(name)} of the {math.prod(shape)} weights of {name!r}")
        if set(self.keep) != set(self.shapes):
            raise PlanError("the plan names different layers in 'keep' and in 'shapes'")
