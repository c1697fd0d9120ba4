"""The structure of example inputs as JSON data: enough to trace a model again, without the values of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunewise.core.errors import PlanError
from prunewise.core.trace import Inputs

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_BYTES = 1 << 30
_MAX_DEPTH = 32
_MAX_DIMS = 64


def describe(example_inputs: Inputs) -> Any:
    """`example_inputs` as JSON data: shapes and dtypes of tensors, containers, Python numbers and strings.

    None where it holds something else (an object of a class of your own, say): such inputs have to be given again.

    Example:
        >>> describe((torch.zeros(2, 3), 1.5))
        {'tuple': [{'tensor': [2, 3], 'dtype': 'float32'}, 1.5]}
    """
    try:
        return _describe(dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs, 0)
    except TypeError:
        return None


def _describe(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise TypeError("too deep")
    if isinstance(value, Tensor):
        if value.dtype not in _NAMES or value.layout != torch.strided:
            raise TypeError(f"a tensor of {value.dtype}, {value.layout}")
        return {"tensor": [int(s) for s in value.shape], "dtype": _NAMES[value.dtype]}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is torch.dtype and value in _NAMES:
        return {"dtype": _NAMES[value]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_describe(v, depth + 1) for v in value]}
    if type(value) is dict and all(type(k) is str for k in value):
        return {"dict": {k: _describe(v, depth + 1) for k, v in value.items()}}
    raise TypeError(f"a {type(value).__name__}")


def blank(spec: Any, device: torch.device | str = "cpu") -> Inputs:
    """Inputs of the structure that `describe` wrote down: floating tensors are noise (always the same), others zero.

    Raises:
        PlanError: `spec` is not such a structure, or asks for more than 1 GiB.
    """
    return _blank(spec, torch.device(device), [0], 0)


def check(spec: Any) -> None:
    """Raise `PlanError` where `spec` is not what `describe` writes."""
    _blank(spec, torch.device("meta"), [0], 0)


def _blank(spec: Any, device: torch.device, total: list[int], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise PlanError(f"the plan's 'inputs' are nested deeper than {_MAX_DEPTH}")
    if spec is None or type(spec) in (bool, int, str):
        return spec
    if type(spec) is float and math.isfinite(spec):
        return spec
    if type(spec) is dict:
        match spec:
            case {"tensor": list(shape), "dtype": str(name)} if len(spec) == 2:
                return _zeros(shape, name, device, total)
            case {"dtype": str(name)} if len(spec) == 1 and name in _DTYPES:
                return _DTYPES[name]
            case {"float": "inf" | "-inf" | "nan" as text} if len(spec) == 1:
                return float(text)
            case {"tuple": list(items)} if len(spec) == 1:
                return tuple(_blank(i, device, total, depth + 1) for i in items)
            case {"list": list(items)} if len(spec) == 1:
                return [_blank(i, device, total, depth + 1) for i in items]
            case {"dict": dict(items)} if len(spec) == 1 and all(type(k) is str for k in items):
                return {k: _blank(v, device, total, depth + 1) for k, v in items.items()}
    shown = repr(spec)
    raise PlanError(f"the plan's 'inputs' hold {shown[:60]}{'...' if len(shown) > 60 else ''}, which is not known")


def _zeros(shape: list[Any], name: str, device: torch.device, total: list[int]) -> Tensor:
    if name not in _DTYPES:
        raise PlanError(f"the plan's 'inputs' hold a tensor of an unknown dtype {name[:30]!r}")
    if len(shape) > _MAX_DIMS or not all(type(s) is int and 0 <= s <= _MAX_BYTES for s in shape):
        raise PlanError(f"the plan's 'inputs' hold a tensor whose shape is not one: {str(shape)[:60]}")
    total[0] += math.prod(shape) * _DTYPES[name].itemsize
    if total[0] > _MAX_BYTES:
        raise PlanError(
            f"the plan's 'inputs' take more than {_MAX_BYTES >> 30} GiB: give example_inputs when you load it"
        )
    zeros = torch.zeros(shape, dtype=_DTYPES[name], device=device)
    if device.type == "meta" or not (zeros.is_floating_point() or zeros.is_complex()):
        return zeros
    # Zeros would hide from the comparison of models whatever multiplies them.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return zeros.copy_(noise)
