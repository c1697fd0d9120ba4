"""Checks of data that others wrote."""

from __future__ import annotations

import math
from typing import Any

from prunewise.core.errors import PlanError


def is_count(value: Any, least: int = 0) -> bool:
    """True for an int of at least `least`; truth values are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """True for a finite int or float; truth values are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_plan(data: Any, what: str, kind: str, version: int) -> dict[str, Any]:
    """`data`, if it is a plan of this kind and schema version.

    Raises:
        PlanError: it is not; `what` names the kind to the user.
    """
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise PlanError(f"this is not a {what}: its 'kind' should be {kind!r}")
    found = data.get("schema_version")
    if type(found) is not int or found != version:
        raise PlanError(
            f"{what} of schema version {found!r}; this prunewise reads version {version}: make the plan again with this version"
        )
    return data
