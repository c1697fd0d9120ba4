"""Sparse models on disk, each tensor in the smallest of three forms, and how large that is. Safetensors, no pickle.

A tensor is kept dense, as a bitmask with the values that stay, or as compressed sparse rows (CSR): whatever takes the fewest
bytes. The file's metadata say which.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prunewise._files import TensorFile, opened, parse_json, require_plain, stage_tensors
from prunewise.core.checks import built_by
from prunewise.core.errors import CheckpointError
from prunewise.layers.attention import keep_in_force_
from prunewise.layers.masks import put_mask_
from prunewise.layers.weights import masked_tensors

_FORMAT = "prunewise-sparse-1"
# What an index may be held in, and the first number too large for it
_INDICES = {torch.uint8: 1 << 8, torch.int16: 1 << 15, torch.int32: 1 << 31, torch.int64: 1 << 63}
_BITS = {dtype.itemsize: dtype for dtype in _INDICES}


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor is stored.

    Attributes:
        name: its name in the state_dict of the model without masks.
        shape: its shape.
        density: share of its elements that stay, in [0, 1].
        form: "dense", "bitmask" or "csr".
        dense_bytes: what it takes dense.
        size_bytes: what it takes as stored.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    form: str
    dense_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class SparseSize:
    """What a sparse model takes on disk, the file's header (some 100 bytes a tensor) not counted.

    Attributes:
        tensors: each tensor once, tied ones under their first name.
    """

    tensors: tuple[StoredTensor, ...]

    @property
    def dense_bytes(self) -> int:
        """All tensors dense."""
        return sum(t.dense_bytes for t in self.tensors)

    @property
    def size_bytes(self) -> int:
        """All tensors as stored."""
        return sum(t.size_bytes for t in self.tensors)

    def table(self) -> str:
        """A line for each tensor, and the total."""
        width = max(len("tensor"), *(len(t.name) for t in self.tensors), 0)
        lines = [f"{'tensor':<{width}}  {'density':>7}  {'form':<7}  {'dense, bytes':>14}  {'stored, bytes':>14}"]
        lines += [
            f"{t.name:<{width}}  {t.density:>7.2%}  {t.form:<7}  {t.dense_bytes:>14,}  {t.size_bytes:>14,}"
            for t in self.tensors
        ]
        lines.append(f"{'all':<{width}}  {'':>7}  {'':<7}  {self.dense_bytes:>14,}  {self.size_bytes:>14,}")
        return "\n".join(lines)

    __str__ = table


def sparse_size(model: nn.Module) -> SparseSize:
    """What `save_sparse` would write for this model, tensor by tensor.

    Args:
        model: with masks of torch.nn.utils.prune in force, or with plain zeros.

    Raises:
        CheckpointError: a tensor is of a kind that safetensors cannot hold, or a mask has values other than 0 and 1.

    Example:
        >>> model = nn.Linear(64, 64, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight[:, 8:].zero_()
        >>> size = sparse_size(model)
        >>> size.dense_bytes, size.size_bytes, size.tensors[0].form
        (16384, 2560, 'bitmask')
    """
    return SparseSize(tuple(_stored(held, *_smallest(held)) for held in _held(model)))


def save_sparse(path: str | os.PathLike[str], model: nn.Module) -> SparseSize:
    """Write the `state_dict` of a sparse model to one file, each tensor in its smallest form; the model stays as it is.

    A removed weight is read back as +0.0, as a -0.0 may be; everything else bit for bit. The file has the names of the model
    without masks; which weights had a mask in force is kept as well. An older file is replaced at one stroke.

    Args:
        path: of the file, conventionally ending in `.safetensors`; its folder must be there.
        model: with masks of torch.nn.utils.prune in force, or with plain zeros.

    Returns:
        What each tensor takes.

    Raises:
        CheckpointError: a tensor is of a kind that safetensors cannot hold (on the meta device, say), a mask has values other
            than 0 and 1, the folder is missing, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> from prunewise import allocate, make_permanent_, sparsify_
        >>> model = sparsify_(nn.Linear(64, 64), allocate(nn.Linear(64, 64), 0.9, "uniform"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save_sparse(f"{folder}/model.safetensors", model)
        ...     loaded = load_sparse(f"{folder}/model.safetensors", lambda: nn.Linear(64, 64))
        >>> x = torch.randn(2, 64)
        >>> torch.equal(loaded(x), model(x)), round(size.dense_bytes / size.size_bytes, 1)
        (True, 6.9)
    """
    target = Path(path)
    if not os.path.isdir(target.parent):
        raise CheckpointError(f"the folder {target.parent} is missing: make it first")
    if os.path.isdir(target):
        raise CheckpointError(f"{target} is a folder: name a file in it")
    tensors: dict[str, Tensor] = {}
    described, stored = [], []
    for number, held in enumerate(_held(model)):
        form, parts = _smallest(held)
        tensors |= {f"{number}.{part}": tensor for part, tensor in parts.items()}
        stored.append(_stored(held, form, parts))
        described.append({"names": held.names, "shape": list(held.value.shape), "form": form, "masked": held.masked})
    metadata = {"prunewise": json.dumps({"format": _FORMAT, "tensors": described})}
    try:
        stage_tensors(target.parent, tensors, lambda digest: target.name, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    return SparseSize(tuple(stored))


def load_sparse(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """The sparse model that `save_sparse` wrote, with its masks in force again.

    Args:
        path: of the file. It is checked whole before anything is filled in; nothing in it is executed.
        factory: called without arguments; builds the same architecture, dense.

    Raises:
        CheckpointError: the file is missing, damaged, hostile or not of `save_sparse`, or holds another architecture.
    """
    path = Path(path)
    with opened(path) as file:
        saved = TensorFile(file, str(path))
        described = _checked(saved, path)
        model = built_by(factory, "dense")
        _require_fit(saved, described, model, path)  # before any memory is taken for what the file claims
        parts = saved.read(None)
    decoded = [(entry, *_decoded(entry, number, parts, path)) for number, entry in enumerate(described)]
    state = model.state_dict()  # for what it says of versions; the file has values for all of it
    state.update((name, value) for entry, value, _ in decoded for name in entry["names"])
    try:
        model.load_state_dict(state)
        for entry, _, support in decoded:
            for name in entry["masked"]:
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                put_mask_(module, leaf, support.to(getattr(module, leaf).device))
    except Exception as error:  # modules may have code of their own for it
        kind = type(model).__name__
        raise CheckpointError(f"{path} cannot be loaded into this {kind}: {str(error)[:500]}") from error
    keep_in_force_(model)
    return model


# -- what a model holds -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A tensor as it acts (times its mask), all its names, those of them with a mask, and which elements stay."""

    names: list[str]
    masked: list[str]
    value: Tensor
    support: Tensor


def _held(model: nn.Module) -> Iterator[_Held]:
    """Every tensor of the state_dict, as it would be without masks, once."""
    masks = {
        f"{path}.{leaf}" if path else leaf: module.get_buffer(f"{leaf}_mask")
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in masked_tensors(module)
    }
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{key!r} is a {type(tensor).__name__} and no tensor: keep such a state in buffers")
        if key.removesuffix("_mask") in masks:
            continue
        plain = key.removesuffix("_orig")
        names.setdefault(id(tensor), []).append(plain if plain in masks else key)
        tensors[id(tensor)] = tensor
    for tensor_id, together in names.items():
        require_plain(together[0], tensors[tensor_id])
        value = tensors[tensor_id].detach().cpu()
        masked = [name for name in together if name in masks]
        keeps = [_keep(name, masks[name]) for name in masked]
        if any(not torch.equal(keeps[0], keep) for keep in keeps) or 0 < len(masked) < len(together):
            raise CheckpointError(
                f"tensors {together[0]!r} and {together[1]!r} are one, with different masks: untie them"
            )
        yield _Held(together, masked, value, keeps[0] if keeps else _nonzero(value))


def _keep(name: str, mask: Tensor) -> Tensor:
    keep = mask != 0
    if not torch.equal(keep.to(mask), mask):
        raise CheckpointError(
            f"the mask on {name!r} has values other than 0 and 1, which would be lost: multiply them in first, by "
            "make_permanent_ or torch.nn.utils.prune.remove"
        )
    return keep.cpu()


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which can be chosen from and compared whatever the dtype is."""
    return tensor.view(_BITS[tensor.element_size()])


def _nonzero(value: Tensor) -> Tensor:
    bits = _bits(value)
    return (bits << 1 if value.is_floating_point() else bits) != 0  # the first bit of -0.0 is its sign


def _require_fit(saved: TensorFile, described: list[dict[str, Any]], model: nn.Module, path: Path) -> None:
    """Raise where the file's tensors are not those of the model."""
    held = list(_held(model))
    masked = next((name for tensor in held for name in tensor.masked), None)
    if masked is not None:
        raise CheckpointError(f"the factory builds a model with a mask on {masked!r}: it should build the dense one")
    own = {name: tensor.value for tensor in held for name in tensor.names}
    claimed = {name: (number, entry) for number, entry in enumerate(described) for name in entry["names"]}
    missing, extra = sorted(own.keys() - claimed.keys()), sorted(claimed.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} was saved for another architecture than this {type(model).__name__}: {', '.join(missing[:3]) or 'none'} "
            f"missing, {', '.join(n[:80] for n in extra[:3]) or 'none'} too many. The factory should build the same, dense model"
        )
    for tensor in held:
        first, *others = tensor.names
        apart = next((name for name in others if claimed[name][0] != claimed[first][0]), None)
        if apart is not None:
            raise CheckpointError(
                f"{path}: {first!r} and {apart!r} were saved as two tensors, and are one in this {type(model).__name__}. The "
                "factory should not tie them"
            )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, (number, entry) in claimed.items():
        shape, dtype = tuple(entry["shape"]), saved.entries[f"{number}.values"].dtype
        if shape != own[name].shape or dtype != own[name].dtype:
            raise CheckpointError(
                f"{path}: {name!r} was saved as {dtype} of shape {shape}; the architecture has {own[name].dtype} of shape "
                f"{tuple(own[name].shape)}"
            )
        if name in entry["masked"] and name not in parameters:
            raise CheckpointError(f"{path}: {name!r} has a mask, and is no parameter without one in the architecture")


# -- the three forms ----------------------------------------------------------------------------------------------


def _smallest(held: _Held) -> tuple[str, dict[str, Tensor]]:
    """The form that takes the fewest bytes, and its tensors; dense where it is a tie. A mask is kept whole."""
    value, support = held.value, held.support
    kept = int(support.sum())
    rows, columns = _matrix(value.shape)
    item = value.element_size()
    sizes = {
        "dense": value.nbytes,
        "bitmask": -(-value.numel() // 8) + kept * item,
        "csr": (rows + 1) * _index(kept).itemsize + kept * (_index(columns).itemsize + item),
    }
    if held.masked and kept < support.numel():
        del sizes["dense"]  # which of the zeros are removed would be lost
    form = min(sizes, key=lambda f: sizes[f])
    if form == "dense":
        return form, {"values": value}
    values = _bits(value)[support].view(value.dtype)
    if form == "bitmask":
        bits = np.packbits(support.flatten().numpy(), bitorder="little")
        return form, {"bits": torch.from_numpy(bits), "values": values}
    matrix = support.reshape(rows, columns)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), matrix.sum(1).cumsum(0)])
    places = matrix.nonzero()[:, 1]
    return form, {"offsets": offsets.to(_index(kept)), "columns": places.to(_index(columns)), "values": values}


def _stored(held: _Held, form: str, parts: Mapping[str, Tensor]) -> StoredTensor:
    density = int(held.support.sum()) / max(1, held.support.numel())
    size = sum(t.nbytes for t in parts.values())
    return StoredTensor(held.names[0], tuple(held.value.shape), density, form, held.value.nbytes, size)


def _matrix(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor's CSR form."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _index(largest: int) -> torch.dtype:
    return next(dtype for dtype, limit in _INDICES.items() if largest < limit)


def _checked(saved: TensorFile, path: Path) -> list[dict[str, Any]]:
    """What the metadata say of each tensor; the entries of the file agree with it."""

    def wrong(problem: str) -> CheckpointError:
        return CheckpointError(f"{path} is no sound file of save_sparse: {problem}. Save the model again")

    if "prunewise" not in saved.metadata:
        raise wrong("its metadata lack the section 'prunewise'")
    data = parse_json(saved.metadata["prunewise"].encode(), f"{path}, metadata")
    if data.get("format") != _FORMAT:
        raise wrong(f"its format is {str(data.get('format'))[:40]}, and this prunewise reads {_FORMAT}")
    tensors = data.get("tensors")
    if not isinstance(tensors, list):
        raise wrong("it lists no tensors")
    seen: set[str] = set()
    expected = set()
    for number, entry in enumerate(tensors):
        match entry:
            case {
                "names": list(names),
                "shape": list(shape),
                "form": "dense" | "bitmask" | "csr" as form,
                "masked": list(masked),
            }:
                pass
            case _:
                raise wrong(f"tensor {number} lacks names, a shape, a form or masks")
        strings = all(isinstance(n, str) for n in [*names, *masked])
        if not names or not strings or seen & set(names) or len(set(names)) < len(names) or masked not in ([], names):
            raise wrong(f"the names of tensor {number} are not valid")
        if (
            len(shape) > 64
            or not all(type(s) is int and 0 <= s < 1 << 40 for s in shape)
            or math.prod(max(1, s) for s in shape) >= 1 << 48
        ):
            raise wrong(f"tensor {number} has the shape {str(shape)[:80]}")
        seen |= set(names)
        parts = {"dense": ("values",), "bitmask": ("bits", "values"), "csr": ("offsets", "columns", "values")}[form]
        expected |= {f"{number}.{part}" for part in parts}
        if expected - saved.entries.keys():
            raise wrong(f"parts of tensor {number} are missing")
        held = {part: saved.entries[f"{number}.{part}"].shape for part in parts}
        rows, _ = _matrix(tuple(shape))
        bits = -(-math.prod(shape) // 8)
        flat = form == "dense" or len(held["values"]) == 1
        sizes = {"bits": (bits,), "offsets": (rows + 1,), "columns": held["values"], "values": held["values"]}
        if form == "dense":
            sizes["values"] = tuple(shape)
        if not flat or any(held[part] != sizes[part] for part in parts) or math.prod(held["values"]) > math.prod(shape):
            raise wrong(f"the parts of tensor {number} do not make up its shape {shape}")
        for part in parts[:-1]:
            dtype = saved.entries[f"{number}.{part}"].dtype
            if dtype not in ([torch.uint8] if part == "bits" else _INDICES):
                raise wrong(f"the {part} of tensor {number} are {dtype}")
    if expected != saved.entries.keys():
        raise wrong("it holds tensors that its metadata do not name")
    return tensors


def _decoded(entry: Mapping[str, Any], number: int, parts: Mapping[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    """The dense tensor, and which elements of it stay."""
    shape, form, values = entry["shape"], entry["form"], parts[f"{number}.values"]
    if form == "dense":
        return values, torch.ones(shape, dtype=torch.bool)
    size = math.prod(shape)
    problem = CheckpointError(
        f"{path} is damaged: the {form} of {entry['names'][0]!r} does not fit its values. Save it again"
    )
    if form == "bitmask":
        bits = np.unpackbits(parts[f"{number}.bits"].numpy(), bitorder="little")
        if bits[size:].any():
            raise problem
        support = torch.from_numpy(bits[:size]).bool()
    else:
        rows, columns = _matrix(shape)
        offsets, places = parts[f"{number}.offsets"].long(), parts[f"{number}.columns"].long()
        # compared, not subtracted, which could wrap: all lie in [0, len(places)] then
        if int(offsets[0]) or int(offsets[-1]) != len(places) or bool((offsets[1:] < offsets[:-1]).any()):
            raise problem
        if bool((places < 0).any()) or bool((places >= columns).any()):
            raise problem
        at = torch.arange(rows).repeat_interleave(offsets.diff()) * columns + places
        if bool((at.diff() <= 0).any()):  # within a row in order, and none twice
            raise problem
        support = torch.zeros(size, dtype=torch.bool)
        support[at] = True
    if int(support.sum()) != len(values):
        raise problem
    filled = torch.zeros(size, dtype=_bits(values).dtype)
    filled[support] = _bits(values)
    return filled.view(values.dtype).reshape(shape), support.reshape(shape)
