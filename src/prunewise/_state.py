"""The state of a run on disk: nested Python data with tensors in it, as JSON and safetensors, written at one stroke."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunewise._files import TensorFile, is_sha256, opened, read_json, stage_tensors, write_json
from prunewise.core.errors import CheckpointError

_KIND = "prunewise/run-state"
_FORMAT = 2


def save_state(directory: Path, name: str, state: Any) -> None:
    """Save `state` as `name.json` and `name-HASH.safetensors`. A reader finds the state before or this one, never a mix.

    Args:
        directory: made if it is not there.
        name: of the files.
        state: dicts (keys are strings or ints), lists, tuples, tensors, numbers, strings, truth values, None.

    Raises:
        CheckpointError: something else is in there; the message says where.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    data = _pack(state, tensors, "state")
    path, digest = stage_tensors(directory, tensors, lambda sha256: f"{name}-{sha256[:32]}.safetensors")
    write_json(directory / f"{name}.json", {"kind": _KIND, "format": _FORMAT, "sha256": digest, "state": data})
    for old in directory.glob(f"{name}-*.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)


def load_state(directory: Path, name: str) -> Any:
    """What `save_state` saved last; None if there is nothing. Tensors are on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged or of another version.
    """
    path = directory / f"{name}.json"
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: name a folder, which the run keeps its state in")
    if not path.exists() and not path.is_symlink():
        return None
    data = read_json(path)
    if data.get("kind") != _KIND or data.get("format") != _FORMAT or not is_sha256(data.get("sha256")):
        raise CheckpointError(f"{path} is not the state of a run of this version of prunewise: use another folder")
    weights = directory / f"{name}-{data['sha256'][:32]}.safetensors"
    with opened(weights) as file:
        tensors = TensorFile(file, str(weights)).read(data["sha256"])
    try:
        state = _unpack(data.get("state"), tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete the folder to start anew") from error
    return state


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": len(tensors) - 1}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) in (list, tuple):
        items = [_pack(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, dict) and all(type(k) in (str, int) for k in value):
        return {"dict": [[k, _pack(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()]}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint without pickle cannot hold: tensors, numbers, strings, "
        "lists, tuples and dicts can be resumed from"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tensor": int(index)}:
            return tensors[str(index)]
        case {"float": str(text)}:
            return float(text)
        case {"tuple": list(items)}:
            return tuple(_unpack(v, tensors) for v in items)
        case {"dict": list(pairs)}:
            return {k: _unpack(v, tensors) for k, v in pairs}
    raise ValueError(f"an unknown mark {list(value)[:3]}")


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the random generators of torch (CPU and `device`), NumPy and Python."""
    import random

    import numpy as np

    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from `rng_state`."""
    import random

    import numpy as np

    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
