"""How a model is called: its signature and containers, taken apart into tensors and put together again."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.trace import Inputs, as_call


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
    """How the model is called: its signature, the example's arguments without tensors, the output without tensors."""

    signature: inspect.Signature
    arguments: dict[str, Any]
    tensors: list[Tensor]
    outputs: dict[bool, Any]  # by training
    fixed: set[bool]  # the modes in which the batch size is fixed

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs) -> Call:
        """Read off the example."""
        args, kwargs = as_call(example_inputs)
        signature = inspect.signature(model.forward)
        tensors: list[Tensor] = []
        bound = signature.bind(*args, **kwargs).arguments
        return cls(signature, {k: template(v, tensors) for k, v in bound.items()}, tensors, {}, set())

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
        batch = next((t.shape[0] for t in self.tensors if t.dim()), 0)
        sizes = [batch] if training in self.fixed else []
        for i, old in enumerate(self.tensors):
            first = 1 if old.dim() and old.shape[0] == batch else 0
            sizes += found[i].shape[:first]
            if found[i].shape[first:] != old.shape[first:] or (first and sizes[-1] != sizes[0]):
                raise ValueError(
                    f"tensor {i} of the input has shape {tuple(found[i].shape)}; the exported graph was made for "
                    f"{tuple(old.shape)}" + ("" if training in self.fixed else ", with any batch size in common")
                )
        return [found[i] for i in range(len(found))]

    def doubled(self) -> list[Tensor]:
        """The example's tensors; twice, where the batch size is 1: export takes a size of 1 for a constant."""
        if next((t.shape[0] for t in self.tensors if t.dim()), 0) != 1:
            return self.tensors
        return [torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t for t in self.tensors]

    def run(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Call the original with other tensors."""
        bound = self.signature.bind_partial()
        bound.arguments.update({k: fill(t, tensors) for k, t in self.arguments.items()})
        return model(*bound.args, **bound.kwargs)
