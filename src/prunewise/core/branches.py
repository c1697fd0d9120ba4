"""A residual branch, as data; what stands in its place when it is dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.errors import PlanError, VerificationError
from prunewise.core.groups import Grouping

Keep = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Stub:
    """What stands in the place of one module: `argument` names the tensor it hands on, as zeros or as it is."""

    path: str
    argument: int | str
    output: Any  # nest of tuples, lists and dicts of Leaf
    zeros: bool


@dataclass(frozen=True)
class Leaf:
    """One value in a module's output: the carried tensor, another argument, or a plain constant."""

    kind: str  # "carried" "argument" "constant"
    value: Any = None


@dataclass(frozen=True)
class Branch:
    """A residual branch `y` of `x + y`.

    Attributes:
        name: path of the modules in it; unique in the model.
        where: file:line of the addition.
        reason: why it cannot be dropped; "" where it can.
        cuts: names of the groups each of which turns the branch off when all its units are closed.
        groups: names of all prunable groups that go with the branch.
        parameters: the parameters that the branch gate multiplies.
        stubs: what stands in the place of the modules.
        gone: parameters and buffers that go with the branch.
    """

    name: str
    where: str
    reason: str = ""
    cuts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    stubs: tuple[Stub, ...] = ()
    gone: frozenset[str] = field(default=frozenset(), repr=False)
    inside: frozenset[int] = field(default=frozenset(), repr=False)  # operations of the branch, in eval mode
    gone_ops: frozenset[int] = field(default=frozenset(), repr=False)
    carried: frozenset[int] = field(default=frozenset(), repr=False)  # operations that stay, on zeros
    entry: int = -1  # the tensor that the zeros are like
    fresh: int = 0  # how many tensors of zeros are made

    def dropped(self, keep: Keep) -> bool:
        """True where `keep` leaves nothing of the branch."""
        return bool(self.groups) and all(len(keep.get(name, (0,))) == 0 for name in self.groups)


class Dropped(nn.Module):
    """Stands where a module of a dropped branch stood: hands on its argument, or zeros like it."""

    def __init__(self, stub: Stub, original: nn.Module | None = None) -> None:
        super().__init__()
        for name, value in vars(original).items() if original is not None else ():
            if not name.startswith("_") and isinstance(value, (bool, int, float, str, type(None))):
                setattr(self, name, value)  # code around it may ask (`batch_first`, `eps`, `stride`)
        nothing = torch.empty(0)  # nn.TransformerEncoder looks at the weights in its first layer
        if isinstance(original, nn.Linear):
            self.weight = self.bias = nothing
        elif isinstance(original, nn.MultiheadAttention):
            self.in_proj_weight = self.in_proj_bias = nothing
            self.out_proj = SimpleNamespace(weight=nothing, bias=nothing)
            self._qkv_same_embed_dim = False  # no fused path for the layer around it
        self._stub = stub

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros (or the argument itself), in a nest built like the original's output."""
        at = self._stub.argument
        x = args[at] if isinstance(at, int) else kwargs[at]
        return _filled(self._stub.output, torch.zeros_like(x) if self._stub.zeros else x, args, kwargs)

    def extra_repr(self) -> str:
        """What it hands on."""
        return "zeros" if self._stub.zeros else "its argument"


def _filled(nest: Any, carried: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(nest, Leaf):
        if nest.kind == "carried":
            return carried
        if nest.kind == "argument":
            return args[nest.value] if isinstance(nest.value, int) else kwargs[nest.value]
        return nest.value
    if isinstance(nest, dict):
        return {k: _filled(v, carried, args, kwargs) for k, v in nest.items()}
    return type(nest)(_filled(v, carried, args, kwargs) for v in nest)


def drops_blocks(keep: Keep) -> bool:
    """True where a group keeps nothing: residual blocks go as a whole."""
    return any(not len(kept) for kept in keep.values())


def check_keep(keep: Keep, branches: Iterable[Branch]) -> None:
    """Raise `PlanError` where a group keeps nothing and no branch goes with it."""
    empty = {name for name, kept in keep.items() if not len(kept)}
    covered: set[str] = set()
    for branch in branches:
        if not branch.reason and branch.dropped(keep):
            covered.update(branch.groups)
    left = sorted(empty - covered)
    if not left:
        return
    for branch in branches:
        if left[0] in branch.groups:
            if branch.reason:
                raise PlanError(f"group {left[0]!r}: nothing is kept, but its block cannot be dropped: {branch.reason}")
            rest = [g for g in branch.groups if g not in empty]
            raise PlanError(
                f"group {left[0]!r}: nothing is kept, so the whole block {branch.name!r} has to go: keep nothing of "
                f"{', '.join(map(repr, rest))} either, or at least one unit"
            )
    raise PlanError(f"group {left[0]!r}: nothing is kept; at least one unit must stay, for it is in no residual block")


def translate(old: Grouping, new: Grouping, keep: Keep) -> dict[str, tuple[int, ...]]:
    """What to keep of the groups of a model with branches dropped, so that the same entries of tensors stay.

    Raises:
        VerificationError: a unit would lose a part of itself only.
    """
    gone: dict[tuple[str, int], set[int]] = {}
    for group in old.groups:
        if group.name in keep:
            removed = sorted(set(range(group.size)) - set(keep[group.name]))
            for member in group.members:
                gone.setdefault((member.name, member.dim), set()).update(member.indices[removed].reshape(-1).tolist())
    result: dict[str, tuple[int, ...]] = {}
    for group in new.groups:
        kept = []
        for unit in range(group.size):
            lost = [i in gone.get((m.name, m.dim), ()) for m in group.members for i in m.indices[unit].tolist()]
            if not any(lost):
                kept.append(unit)
            elif not all(lost) or not group.prunable:
                raise VerificationError(
                    f"with blocks dropped, unit {unit} of {group.name!r} is no longer what it was: "
                    f"{group.reason or 'its parts are tied to one another no more'}. Keep one of the blocks"
                )
        if len(kept) < group.size:
            result[group.name] = tuple(kept)
    return result


def drop(model: nn.Module, branches: Sequence[Branch]) -> None:
    """Take these branches out of `model` for good, in place; its other channels stay whole."""
    with swapped(model, branches, keep=True):
        pass


@contextmanager
def swapped(model: nn.Module, branches: Sequence[Branch], keep: bool = False) -> Iterator[None]:
    """While active (or for good), `Dropped` modules are in the places of those of the branches."""
    stubs = {stub.path: stub for branch in branches for stub in branch.stubs}
    outer = {p for p in stubs if not any(p.startswith(f"{q}.") for q in stubs)}
    modules = dict(model.named_modules())
    by_id = {id(modules[p]): Dropped(stubs[p], modules[p]).train(modules[p].training) for p in outer}
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    before: list[tuple[dict[str, Any], str, Any]] = []
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if id(child) in by_id:
                before.append((parent._modules, leaf, child))
                parent._modules[leaf] = by_id[id(child)]
                if parent in layers:  # its fused path would read the weights that are gone
                    before.append((vars(parent), "activation_relu_or_gelu", parent.activation_relu_or_gelu))
                    parent.activation_relu_or_gelu = 0
    try:
        yield
    finally:
        if not keep:
            for store, leaf, value in reversed(before):
                store[leaf] = value
