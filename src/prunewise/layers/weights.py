"""Which weights count, and how the weight of any layer looks as a matrix: one row an output, one column a weight of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import prune

from prunewise.core.checks import require_module
from prunewise.core.choice import matcher
from prunewise.core.errors import NonFiniteError, NoPrunableGroupError, PlanError

Choice = str | Iterable[str] | Callable[["Layer"], bool] | None

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# What nn.MultiheadAttention makes queries, keys and values with: all three of one weight, or one each.
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Owner(NamedTuple):
    """A module that holds a weight: its path, the module, and what the weight is called there."""

    path: str
    module: nn.Module
    tensor: str

    @property
    def parameter_name(self) -> str:
        """The name of the weight among the model's parameters, which is another one where a mask is in force."""
        name = f"{self.tensor}_orig" if is_masked(self.module, self.tensor) else self.tensor
        return f"{self.path}.{name}" if self.path else name

    @property
    def layer_name(self) -> str:
        """The module's path; with the weight's name where the module holds several."""
        return self.path if self.tensor == "weight" else f"{self.path}.{self.tensor}" if self.path else self.tensor

    @property
    def keep_mask(self) -> Tensor | None:
        """The mask in force, as torch.nn.utils.prune leaves it, or None. Detached."""
        found = self.module._buffers[f"{self.tensor}_mask"] if is_masked(self.module, self.tensor) else None
        return None if found is None else found.detach()


@dataclass(frozen=True)
class Layer:
    """One weight that counts.

    Attributes:
        name: path of the (first) module that holds it, and of attention the weight's name after it ("attn.in_proj_weight").
        module: that module: a convolution, transposed or not, a linear layer, or an nn.MultiheadAttention.
        tensor: what the weight is called in it: "weight", or one of `PROJECTIONS`.
        owners: all modules that hold this weight, tied ones of any kind included.
        groups, rows, columns: the weight as `groups` matrices of shape (rows, columns): one row an output channel of
            the group, one column a weight of it (input channels × kernel positions). An `in_proj_weight` is three groups.
    """

    name: str
    module: nn.Module
    tensor: str
    owners: tuple[Owner, ...] = field(repr=False)
    groups: int
    rows: int
    columns: int

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, whether a mask is in force on it or not."""
        found = _parameter(self.module, self.tensor)
        assert found is not None
        return found

    @property
    def keep_mask(self) -> Tensor | None:
        """The mask in force, as torch.nn.utils.prune leaves it, or None. Detached."""
        return Owner("", self.module, self.tensor).keep_mask

    @property
    def weight(self) -> Tensor:
        """The weight as it acts: the parameter, times the mask in force. Detached."""
        mask = self.keep_mask
        weight = self.parameter.detach()
        return weight if mask is None else weight * mask.to(weight.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.parameter.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def positions(self) -> int:
        """Kernel positions of a convolution; 1 for a linear layer."""
        return math.prod(self.shape[2:]) if isinstance(self.module, CONV + TRANSPOSED) else 1

    @property
    def input_dim(self) -> int:
        """The weight's dimension that goes along the input channels."""
        return 0 if isinstance(self.module, TRANSPOSED) or _is_conv1d_of_transformers(self.module) else 1

    def at(self, owner: Owner) -> Layer:
        """The same weight as this one of its owners has it.

        Raises:
            PlanError: it is another matrix there, of other rows or groups.
        """
        own = _layer(owner, self.parameter, self.owners)
        if (own.groups, own.rows, own.columns) != (self.groups, self.rows, self.columns):
            raise PlanError(
                f"the weight of {self.name!r} is tied to {own.name!r}, which groups its channels in another way: give "
                f"exclude={self.name!r}"
            )
        return own

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, rows, columns)."""
        if isinstance(self.module, TRANSPOSED):  # (inputs, outputs of a group, kernel)
            weight = weight.reshape(self.groups, -1, self.rows, self.positions).transpose(1, 2)
        elif _is_conv1d_of_transformers(self.module):
            weight = weight.t()
        return weight.reshape(self.groups, self.rows, self.columns)

    def by_position(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as one matrix a group and kernel position, (groups · positions, rows, inputs)."""
        matrix = self.as_matrix(weight).reshape(self.groups, self.rows, -1, self.positions)
        return matrix.permute(0, 3, 1, 2).reshape(self.groups * self.positions, self.rows, -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`: a tensor of the weight's shape, contiguous."""
        if isinstance(self.module, TRANSPOSED):
            matrix = matrix.reshape(self.groups, self.rows, -1, self.positions).transpose(1, 2)
        elif _is_conv1d_of_transformers(self.module):
            matrix = matrix.reshape(self.rows, self.columns).t()
        return matrix.reshape(self.shape).contiguous()


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """GPT-2's linear layers keep their weight as (inputs, outputs); known by name, so as not to import transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def masked_tensors(module: nn.Module) -> list[str]:
    """What masks of torch.nn.utils.prune are in force on: names of tensors of a module."""
    hooks = module._forward_pre_hooks.values()
    return [str(hook._tensor_name) for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def is_masked(module: nn.Module, tensor: str) -> bool:
    """True where a mask of torch.nn.utils.prune is in force on a tensor of a module."""
    return tensor in masked_tensors(module)


def _parameter(module: nn.Module, tensor: str) -> nn.Parameter | None:
    """A weight of a module; under a mask of torch.nn.utils.prune it goes by another name."""
    found = module._parameters.get(f"{tensor}_orig" if is_masked(module, tensor) else tensor)
    return found if isinstance(found, nn.Parameter) else None


def find_layers(model: nn.Module, include: Choice = None, exclude: Choice = None) -> list[Layer]:
    """The layers whose weights count, in the order of `named_modules`.

    These are convolutions (transposed, too) and linear layers, wherever they stand, the projections of nn.MultiheadAttention
    among them; frozen ones count like others. A tied weight counts once, under the first path that holds it. Biases,
    normalisation and embeddings do not count.

    Args:
        model: any module, on any device (the meta device too).
        include, exclude: a path, a shell pattern ("encoder.*"), several of these, or a callable from `Layer` to bool.

    Raises:
        PlanError: a name fits no layer, or a weight is not a plain parameter (parametrized, or lazy).
        NoPrunableGroupError: no layer is left.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(layer.name, layer.shape) for layer in find_layers(model)]
        [('0', (8, 3, 3, 3)), ('3', (2, 8))]
        >>> [(layer.name, layer.shape) for layer in find_layers(nn.MultiheadAttention(8, 2))]
        [('in_proj_weight', (24, 8)), ('out_proj', (8, 8))]
    """
    require_module(model)
    owners: dict[int, list[Owner]] = {}
    for path, module in model.named_modules():
        masked = masked_tensors(module)
        for name, parameter in module._parameters.items():
            tensor = name.removesuffix("_orig")
            if parameter is not None:
                owner = Owner(path, module, tensor if tensor in masked else name)
                owners.setdefault(id(parameter), []).append(owner)
    layers, seen = [], set()
    for path, module in model.named_modules():
        for tensor in counted(module):
            owner, parameter = Owner(path, module, tensor), _parameter(module, tensor)
            if parameter is None or isinstance(parameter, UninitializedParameter):
                layers.append(
                    Layer(owner.layer_name, module, tensor, (owner,), 1, 0, 0)
                )  # an error, unless it is excluded
            elif id(parameter) not in seen and parameter.numel():
                seen.add(id(parameter))
                layers.append(_layer(owner, parameter, tuple(owners[id(parameter)])))
    wanted = _chosen(model, layers, include, exclude)
    for layer in wanted:
        if not layer.columns:
            raise PlanError(
                f"the weight of {layer.name!r} is no plain parameter: remove its parametrization (or run the model once, if "
                "it is lazy), or give exclude="
            )
    if not wanted:
        raise NoPrunableGroupError(
            f"no convolution or linear layer of this {type(model).__name__} counts: all excluded, or there is none"
        )
    return wanted


def counted(module: nn.Module) -> tuple[str, ...]:
    """The weights of a module that count, by name."""
    if isinstance(module, (nn.Linear, *CONV, *TRANSPOSED)) or _is_conv1d_of_transformers(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        # Those that it has no use for are registered, as None.
        return tuple(n for n in PROJECTIONS if n not in module._parameters or module._parameters[n] is not None)
    return ()


def _layer(owner: Owner, parameter: nn.Parameter, owners: tuple[Owner, ...]) -> Layer:
    shape, module = parameter.shape, owner.module
    groups = 1
    if isinstance(module, CONV + TRANSPOSED):
        groups = int(module.groups)
    elif owner.tensor == "in_proj_weight":
        groups = 3
    if isinstance(module, TRANSPOSED) or _is_conv1d_of_transformers(module):
        rows = int(shape[1])
    else:
        rows = int(shape[0]) // groups
    columns = math.prod(shape) // (groups * rows)
    return Layer(owner.layer_name, module, owner.tensor, owners, groups, rows, columns)


def _chosen(model: nn.Module, layers: Sequence[Layer], include: Choice, exclude: Choice) -> list[Layer]:
    paths: dict[nn.Module, list[str]] = {}  # a module may stand in several places
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)

    def names(layer: Layer) -> list[str]:
        return [owner._replace(path=path).layer_name for owner in layer.owners for path in paths[owner.module]]

    def unknown(pattern: str) -> str:
        known = sorted({name for layer in layers for name in names(layer)})
        near = get_close_matches(pattern, known, 3, 0.3) or known[:6]
        return f"no layer matches {pattern!r}; there are layers like: {', '.join(near) or 'none'}"

    wanted = matcher(layers, include, True, names, unknown)
    unwanted = matcher(layers, exclude, False, names, unknown)
    return [layer for layer in layers if wanted(layer) and not unwanted(layer)]


def check_finite(layers: Sequence[Layer]) -> None:
    """Raise `NonFiniteError` where a weight is NaN or infinite; weights on the meta device are taken as sound.

    Raises:
        PlanError: a weight was made under torch.inference_mode, so that it can neither change nor have gradients.
    """
    for layer in layers:
        weight = layer.parameter.detach()
        if weight.is_inference():
            raise PlanError(
                f"the weight of {layer.name!r} was made under torch.inference_mode: build the model outside of it"
            )
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"the weight of {layer.name!r} is not finite (NaN or infinite): load a sound checkpoint, or give exclude="
            )
