"""Which weights count, and how the weight of any layer looks as a matrix: one row an output, one column a weight of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from prunewise.core.choice import matcher
from prunewise.core.errors import NonFiniteError, NoPrunableGroupError, PlanError

Choice = str | Iterable[str] | Callable[["Layer"], bool] | None

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """One weight that counts.

    Attributes:
        name: path of the (first) module that holds it.
        module: that module: a convolution, transposed or not, or a linear layer.
        owners: all modules that hold this weight (path, module), tied ones of any kind included.
        groups, rows, columns: the weight as `groups` matrices of shape (rows, columns): one row an output channel of
            the group, one column a weight of it (input channels × kernel positions).
    """

    name: str
    module: nn.Module
    owners: tuple[tuple[str, nn.Module], ...] = field(repr=False)
    groups: int
    rows: int
    columns: int

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, whether a mask is in force on it or not."""
        found = _parameter(self.module)
        assert found is not None
        return found

    @property
    def keep_mask(self) -> Tensor | None:
        """The mask in force, as torch.nn.utils.prune leaves it, or None."""
        found = self.module._buffers.get("weight_mask")
        return found if found is None else found.detach()

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


def _parameter(module: nn.Module) -> nn.Parameter | None:
    """The weight of a module; under a mask of torch.nn.utils.prune it goes by another name."""
    found = module._parameters.get("weight_orig" if "weight_mask" in module._buffers else "weight")
    return found if isinstance(found, nn.Parameter) else None


def find_layers(model: nn.Module, include: Choice = None, exclude: Choice = None) -> list[Layer]:
    """The layers whose weights count, in the order of `named_modules`.

    These are convolutions (transposed, too) and linear layers, wherever they stand; frozen ones count like others. A
    tied weight counts once, under the first path that holds it. Biases, normalisation and embeddings do not count, nor
    does what is inside nn.MultiheadAttention: it reads its weights without calling its modules, so a mask
    would not stay in force there.

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
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    inside = {id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    for path, module in model.named_modules():
        parameter = _parameter(module)
        if parameter is not None:
            owners.setdefault(id(parameter), []).append((path, module))
    layers, seen = [], set()
    for path, module in model.named_modules():
        if not _counts(module) or id(module) in inside:
            continue
        parameter = _parameter(module)
        if parameter is None or isinstance(parameter, UninitializedParameter):
            layers.append(Layer(path, module, ((path, module),), 1, 0, 0))  # an error, unless it is excluded
        elif id(parameter) not in seen and parameter.numel():
            seen.add(id(parameter))
            layers.append(_layer(path, module, parameter, tuple(owners[id(parameter)])))
    wanted = _chosen(layers, include, exclude)
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


def warn_of_attention(model: nn.Module) -> None:
    """Warn the caller's caller where weights that one would expect to count do not: those inside nn.MultiheadAttention."""
    sizes = {
        path: sum(p.numel() for p in module.parameters() if p.dim() > 1)
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    if sizes:
        first, *others = sizes
        warnings.warn(
            f"{sum(sizes.values()):,} weights inside nn.MultiheadAttention ({first!r}{f' and {len(others)} more' * bool(others)}) "
            "do not count: they stay as they are, and the total sparsity is that of the other layers",
            stacklevel=3,
        )


def _counts(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONV, *TRANSPOSED)) or _is_conv1d_of_transformers(module)


def _layer(path: str, module: Any, parameter: nn.Parameter, owners: tuple[tuple[str, nn.Module], ...]) -> Layer:
    shape = parameter.shape
    groups = int(module.groups) if isinstance(module, CONV + TRANSPOSED) else 1
    if isinstance(module, TRANSPOSED) or _is_conv1d_of_transformers(module):
        rows = int(shape[1])
    else:
        rows = int(shape[0]) // groups
    return Layer(path, module, owners, groups, rows, math.prod(shape) // (groups * rows))


def _chosen(layers: Sequence[Layer], include: Choice, exclude: Choice) -> list[Layer]:
    def unknown(pattern: str) -> str:
        paths = sorted({path for layer in layers for path in _paths(layer)})
        near = get_close_matches(pattern, paths, 3, 0.3) or paths[:6]
        return f"no layer matches {pattern!r}; there are layers like: {', '.join(near) or 'none'}"

    wanted = matcher(layers, include, True, _paths, unknown)
    unwanted = matcher(layers, exclude, False, _paths, unknown)
    return [layer for layer in layers if wanted(layer) and not unwanted(layer)]


def _paths(layer: Layer) -> list[str]:
    return [path for path, _ in layer.owners]


def check_finite(layers: Sequence[Layer]) -> None:
    """Raise `NonFiniteError` where a weight is NaN or infinite; weights on the meta device are taken as sound."""
    for layer in layers:
        weight = layer.parameter.detach()
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"the weight of {layer.name!r} is not finite (NaN or infinite): load a sound checkpoint, or give exclude="
            )
