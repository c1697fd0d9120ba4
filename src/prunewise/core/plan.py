"""Plans: what to keep, as data that can be saved, compared, reviewed and shared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from prunewise.core import inputs as _inputs
from prunewise.core.branches import Branch, check_keep, drops_blocks
from prunewise.core.checks import check_plan, is_count
from prunewise.core.errors import PlanError
from prunewise.core.groups import ChannelGroup

SCHEMA_VERSION = 1
_KIND = "prunewise/channel-plan"


@dataclass(frozen=True)
class ChannelPlan:
    """Which units of each channel group stay.

    Attributes:
        keep: for each group that loses units, the indices of those that stay, ascending; at least one,
            or none in all groups of a residual block that is dropped as a whole.
        sizes: the original size of every group in `keep`.
        fingerprint: identifies the architecture (names and shapes of parameters and buffers).
        cost_before, cost_after: totals, as `Cost.as_dict()` gives them.
        notes: free text by key (who made the plan, how); never read by prunewise.
        inputs: structure of the example inputs that the model was traced on, as `core.inputs.describe` gives it; None
            where it is not known. Loading a pruned model traces the architecture again on inputs of that structure.
    """

    keep: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    fingerprint: str
    cost_before: Mapping[str, int] = field(default_factory=dict)
    cost_after: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    inputs: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data, with its schema version."""
        return {
            "kind": _KIND,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "groups": {n: {"size": self.sizes[n], "keep": list(k)} for n, k in self.keep.items()},
            "cost_before": dict(self.cost_before),
            "cost_after": dict(self.cost_after),
            "notes": dict(self.notes),
            "inputs": self.inputs,
        }

    @classmethod
    def from_dict(cls, data: Any) -> ChannelPlan:
        """A plan from JSON data; every field is checked.

        Raises:
            PlanError: a field is missing, of the wrong type or out of range, or the version is not this one.
        """
        data = check_plan(data, "channel plan", _KIND, SCHEMA_VERSION)
        fingerprint, groups = data.get("fingerprint"), data.get("groups")
        if not isinstance(fingerprint, str) or not isinstance(groups, dict):
            raise PlanError("channel plan without a 'fingerprint' (text) or 'groups' (object)")
        keep, sizes = {}, {}
        for name, group in groups.items():
            size = group.get("size") if isinstance(group, dict) else None
            kept = group.get("keep") if isinstance(group, dict) else None
            if not (isinstance(size, int) and is_count(size)) or size < 1 or not isinstance(kept, list):
                raise PlanError(f"channel plan, group {name!r}: needs 'size' (a count) and 'keep' (a list of indices)")
            check_kept(name, kept, size)
            keep[str(name)], sizes[str(name)] = tuple(kept), size
        costs = []
        for key in ("cost_before", "cost_after"):
            cost = data.get(key, {})
            if not isinstance(cost, dict) or not all(is_count(v) for v in cost.values()):
                raise PlanError(f"channel plan: {key!r} should hold counts")
            costs.append({str(k): int(v) for k, v in cost.items()})
        notes = data.get("notes", {})
        if not isinstance(notes, dict):
            raise PlanError("channel plan: 'notes' should be an object")
        inputs = data.get("inputs")
        _inputs.check(inputs)
        texts = {str(k): str(v) for k, v in notes.items()}
        return cls(keep, sizes, fingerprint, costs[0], costs[1], texts, inputs)

    @property
    def drops_blocks(self) -> bool:
        """True where a group keeps nothing: residual blocks go as a whole."""
        return drops_blocks(self.keep)

    def check(self, model: nn.Module, groups: Sequence[ChannelGroup], branches: Sequence[Branch] = ()) -> None:
        """Raise `PlanError` where the plan is not one for this model; `branches` are the blocks that may be dropped."""
        if self.fingerprint != fingerprint(model):
            raise PlanError(
                f"the plan is for another model than this {type(model).__name__}: names or shapes of parameters "
                "differ. Build the architecture that the plan was made for, unpruned"
            )
        known = {g.name: g for g in groups}
        for name, kept in self.keep.items():
            group = known.get(name)
            if group is None:
                raise PlanError(f"the plan keeps units of {name!r}, a channel group that the model does not have")
            size = self.sizes.get(name)
            if group.size != size:
                raise PlanError(f"{name!r} has {group.size} units in the model and {size} in the plan")
            if not group.prunable and len(kept) < group.size:
                raise PlanError(f"the plan removes units of {name!r}, which must stay: {group.reason}")
            check_kept(name, kept, group.size)
        check_keep(self.keep, branches)


def check_kept(name: str, kept: Sequence[Any], size: int) -> None:
    """Raise `PlanError` where the kept units of a group are not ascending indices into it."""
    if not all(is_count(i) and i < size for i in kept) or any(b <= a for a, b in pairwise(kept)):
        raise PlanError(f"group {name!r}: kept units should be indices in [0, {size}), ascending, without repetition")


def fingerprint(model: nn.Module) -> str:
    """Hash of the names of all parameters and buffers, and of the parameters' shapes (some forwards replace buffers)."""
    digest = hashlib.sha256()
    rows = [(n, tuple(p.shape)) for n, p in model.named_parameters(remove_duplicate=False)]
    rows += [(n, ()) for n, _ in model.named_buffers(remove_duplicate=False)]
    for name, shape in sorted(rows, key=lambda r: r[0]):
        digest.update(f"{name}:{shape};".encode())
    return digest.hexdigest()[:16]
