"""Nodes of an exported graph: names, lines of code, and arguments by the names of the operator's schema."""

from __future__ import annotations

import re
from typing import Any

from torch import fx


def node_name(node: fx.Node) -> str:
    """The operator's name without namespace, overload and in-place mark; other functions by their own name."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def node_line(node: fx.Node) -> str:
    """How an operation is named to the user: operator, file and line."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{node.target}" + (f" at {lines[-1][0]}:{lines[-1][1]}" if lines else "")


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(dict(zip((a.name for a in schema.arguments), node.args, strict=False)))
    return {**bound, **node.kwargs}


def put_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of an ATen call."""
    at = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)
