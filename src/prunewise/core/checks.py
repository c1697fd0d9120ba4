"""Checks of what others give."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import nn

from prunewise.core.errors import CheckpointError, PlanError


def is_count(value: Any, least: int = 0) -> bool:
    """True for an int of at least `least`; truth values are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """True for a finite int or float, NumPy's too; truth values are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def require_module(model: object) -> None:
    """Raise `PlanError` for what is no model."""
    if not isinstance(model, nn.Module):
        raise PlanError(f"the model should be an nn.Module, and is a {type(model).__name__}")


def built_by(factory: Callable[[], nn.Module], what: str) -> nn.Module:
    """What a factory builds.

    Raises:
        CheckpointError: it is no factory of modules; `what` names the model to the user.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise CheckpointError(
            f"the factory is a {type(factory).__name__}: give a function without arguments that builds the {what} model"
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the factory returned a {type(model).__name__}: it should build the {what} model")
    return model


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
