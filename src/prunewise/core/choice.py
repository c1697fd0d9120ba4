"""Choosing by name: `include=` and `exclude=`, for whatever has names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from prunewise.core.errors import PlanError

T = TypeVar("T")


def matcher(
    things: Sequence[T],
    choice: str | Iterable[str] | Callable[[T], bool] | None,
    default: bool,
    names: Callable[[T], Collection[str]],
    unknown: Callable[[str], str],
) -> Callable[[T], bool]:
    """Whether a thing is chosen: by a name, a shell pattern, several of these, or a callable; None: `default`.

    Args:
        things: all there are.
        choice: what the user gave.
        default: for all, where the user gave nothing.
        names: of a thing; a pattern fits it when it fits one of them.
        unknown: the message for a pattern that fits nothing.

    Raises:
        PlanError: a name or pattern fits nothing at all.
    """
    if choice is None:
        return lambda thing: default
    if callable(choice):
        return choice
    patterns = [choice] if isinstance(choice, str) else list(choice)
    known = {name for thing in things for name in names(thing)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise PlanError(unknown(pattern))
    return lambda thing: any(fnmatchcase(name, p) for name in names(thing) for p in patterns)
