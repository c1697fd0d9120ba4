"""From `module:factory` to the user's model, data and example inputs. Imported by the verbs when they run."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunewise.cli.options import UsageError, nearest
from prunewise.core.batch import inputs_of, moved

_DTYPES = "float32, float64, float16, bfloat16, complex64, int64, int32, int16, int8, uint8, bool and the like"


def load_factory(spec: str, option: str) -> Callable[[], Any]:
    """The callable that `spec`, a `module:factory`, names; the working directory is searched first."""
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"{option} {spec}: expected MODULE:FACTORY, as in mypackage.models:resnet20")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there and fails to import something else
        raise UsageError(
            f"{option} {spec}: no module {error.name!r} in the working directory or the environment"
        ) from None
    for name in path.split("."):
        if not hasattr(found, name):
            public = [each for each in dir(found) if not each.startswith("_")]
            raise UsageError(f"{option} {spec}: {module_name} has no {name!r}; {nearest(name, public)}")
        found = getattr(found, name)
    if not callable(found):
        raise UsageError(f"{option} {spec}: a {type(found).__name__}, expected a callable without arguments")
    factory: Callable[[], Any] = found
    return factory


def load_model(spec: str) -> nn.Module:
    """The model that the factory `spec` returns."""
    model = load_factory(spec, "--model")()
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {spec}: returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def load_data(spec: str) -> tuple[Any, Any]:
    """The training and the validation loader of the factory `spec`; the latter is None where it gives only one.

    A pair of loaders is a tuple; a list is one loader, of batches.
    """
    data = load_factory(spec, "--data")()
    if not isinstance(data, tuple):
        return data, None
    if len(data) != 2:
        raise UsageError(f"--data {spec}: returned {len(data)} things, expected a loader or a pair of them")
    return data


def load_targets(spec: str) -> Any:
    """The labels of a .npy file, or those that the factory `spec` returns."""
    if not spec.endswith(".npy"):
        if ":" not in spec:
            raise UsageError(f"--targets {spec}: expected a .npy file, or MODULE:FACTORY as in mypackage.data:labels")
        return load_factory(spec, "--targets")()
    try:
        labels = np.load(spec, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--targets {spec}: cannot be read as an array: {error}") from None
    if not isinstance(labels, np.ndarray):  # numpy goes by what is inside, not by the name
        raise UsageError(f"--targets {spec}: an archive of several arrays, expected one array")
    return labels


def example_inputs(model: nn.Module, shapes: list[str] | None, loader: Any) -> Any:
    """Example inputs by `--input`, else the first batch of the loader without its targets, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if shapes:
        generator = torch.Generator().manual_seed(0)
        return tuple(_random_input(shape, generator).to(device) for shape in shapes)
    if loader is None:
        raise UsageError("no example input: give --input SHAPE (as in --input 1,3,224,224) or --data")
    batch = next(iter(loader), None)
    if batch is None:
        raise UsageError("--data: the loader is empty")
    return moved(inputs_of(batch), device)


def _random_input(text: str, generator: torch.Generator) -> Tensor:
    shape_text, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {text}: torch has no dtype {dtype_name!r}; there are {_DTYPES}")
    try:
        shape = [int(size) for size in shape_text.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise UsageError(f"--input {text}: expected sizes above 0 separated by commas, as in 1,3,224,224")
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(shape, generator=generator)
    else:
        values = torch.randint(0, 2, shape, generator=generator)  # valid as token ids and as a mask
    try:
        return values.to(dtype)
    except (NotImplementedError, RuntimeError):  # dtypes of less than a byte, and quantized ones
        raise UsageError(f"--input {text}: torch makes no tensors of {dtype_name} itself; take {_DTYPES}") from None
