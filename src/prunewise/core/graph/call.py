"""How a model is called: its signature and containers, taken apart into tensors and put together again."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Slot:
    """Stands for tensor number `index` in a nest of containers."""

    index: int


@dataclass(frozen=True)
class _Branch:
    """A container: `kind` is its class, `how` the way to make one from `children`."""

    kind: type
    how: str
    children: dict[Any, Any]


def _open(value: Any) -> _Branch | None:
    """The contents of a container; None for a leaf."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _Branch(type(value), "fields", dict(enumerate(value)))
    if isinstance(value, (tuple, list)):
        return _Branch(type(value), "items", dict(enumerate(value)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return _Branch(type(value), "init", {n: getattr(value, n) for n in names})
    if isinstance(value, Mapping):
        return _Branch(type(value), "mapping", dict(value))
    if type(value).__module__ != "builtins" and not isinstance(value, (nn.Module, Tensor)) and vars_of(value):
        return _Branch(type(value), "object", vars_of(value))
    return None


def vars_of(value: Any) -> dict[str, Any]:
    """The attributes of a plain object; empty for a class, a function, an object with slots."""
    return {} if isinstance(value, type) or callable(value) else dict(getattr(value, "__dict__", {}))


def template(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with its tensors moved to `tensors` and slots left in their places."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    branch = _open(value)
    if branch is None:
        return int(value) if isinstance(value, torch.SymInt) else value
    return _Branch(branch.kind, branch.how, {k: template(v, tensors) for k, v in branch.children.items()})


def fill(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The reverse of `template`."""
    if isinstance(template, _Slot):
        return tensors[template.index]
    if not isinstance(template, _Branch):
        return template
    children = {k: fill(v, tensors) for k, v in template.children.items()}
    match template.how:
        case "fields":
            return template.kind(*children.values())
        case "items":
            return template.kind(children.values())
        case "mapping":
            return template.kind(children)
        case "init":
            return template.kind(**children)
    made: Any = object.__new__(template.kind)
    made.__dict__.update(children)
    return made


def match(template: Any, value: Any, name: str, found: dict[int, Tensor]) -> None:
    """Collect the tensors of `value`, which must be built like `template`."""
    if isinstance(template, _Slot):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor, as it was when the graph was exported; got {type(value).__name__}"
            )
        found[template.index] = value
        return
    branch = _open(value)
    if isinstance(template, _Branch):
        if branch is None or branch.children.keys() != template.children.keys():
            raise TypeError(f"{name} must be built as it was when the graph was exported: {template.kind.__name__}")
        for key, child in template.children.items():
            match(child, branch.children[key], f"{name}[{key!r}]", found)
    elif isinstance(value, Tensor) or (template is not value and template != value):
        raise TypeError(f"{name} is fixed to {template!r}, as it was when the graph was exported")


@dataclass
class Call:
    """How a module is called: its signature, the example's arguments without tensors, the output without tensors."""

    signature: inspect.Signature
    arguments: dict[str, Any]
    tensors: list[Tensor]
    grows: list[int | None]  # by tensor: the dimension that goes with the batch size
    outputs: dict[bool, Any]  # by training
    fixed: set[bool]  # the modes in which the batch size is fixed

    @classmethod
    def of(cls, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Read off an example of the arguments; whatever has the first tensor's first size is taken to have the batch's."""
        signature = inspect.signature(module.forward)
        tensors: list[Tensor] = []
        bound = signature.bind(*args, **kwargs).arguments
        arguments = {k: template(v, tensors) for k, v in bound.items()}
        batch = next((t.shape[0] for t in tensors if t.dim()), None)
        return cls(
            signature, arguments, tensors, [0 if t.dim() and t.shape[0] == batch else None for t in tensors], {}, set()
        )

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> list[Tensor]:
        """The tensors of a call, in the order of the example's.

        Raises:
            TypeError: an argument that is not a tensor is not what it was in the example.
            ValueError: a tensor has another shape than in the example (but for the batch size).
        """
        bound = self.signature.bind(*args, **kwargs).arguments
        found: dict[int, Tensor] = {}
        for name, parameter in self.signature.parameters.items():
            if name in self.arguments:
                match(self.arguments[name], bound.get(name, parameter.default), name, found)
            elif name in bound:
                match(parameter.default, bound[name], name, found)
        growth: tuple[int, int] | None = (1, 1) if training in self.fixed else None  # batch size now : in the example
        for i, (old, dim) in enumerate(zip(self.tensors, self.grows, strict=True)):
            want, now = list(old.shape), list(found[i].shape)
            if dim is not None and len(now) == len(want):
                growth = growth or (now[dim], want[dim])
                if now[dim] * growth[1] == want[dim] * growth[0]:
                    want[dim] = now[dim]
            if now != want:
                raise ValueError(
                    f"tensor {i} of the input has shape {tuple(now)}; the exported graph was made for {tuple(old.shape)}"
                    + ("" if training in self.fixed else ", with any batch size in common")
                )
        return [found[i] for i in range(len(found))]

    def doubled(self) -> list[Tensor]:
        """The example's tensors; twice, where a batch size is 1: export takes a size of 1 for a constant."""
        pairs = list(zip(self.tensors, self.grows, strict=True))
        if not any(dim is not None and t.shape[dim] == 1 for t, dim in pairs):
            return self.tensors
        return [t if dim is None else torch.cat([t, t], dim) for t, dim in pairs]

    @property
    def batch(self) -> int:
        """The batch size of the example; 0 where no tensor grows with it."""
        return next((t.shape[d] for t, d in zip(self.tensors, self.grows, strict=True) if d is not None), 0)

    def run(self, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Call the original with other tensors."""
        bound = self.signature.bind_partial()
        bound.arguments.update({k: fill(t, tensors) for k, t in self.arguments.items()})
        return module(*bound.args, **bound.kwargs)
