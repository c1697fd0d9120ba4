"""Slices of a model's parameters and buffers down to the units that stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.core.gains import Gain
from prunewise.core.groups import Grouping


class Slices(dict[str, dict[int, npt.NDArray[np.int64]]]):
    """Tensor name -> dimension -> indices that stay; and the `gains` that make up for a norm that this makes smaller."""

    def __init__(self, dims: Mapping[str, dict[int, npt.NDArray[np.int64]]], gains: Iterable[Gain] = ()) -> None:
        super().__init__(dims)
        self.gains = set(gains)


def state_slices(grouping: Grouping, keep: Mapping[str, tuple[int, ...]]) -> Slices:
    """For every parameter and buffer that loses something: the indices that stay, by dimension."""
    shapes = {t.name: t.shape for t in grouping.structure.trace.tensors if t.name}
    gone: dict[str, dict[int, npt.NDArray[np.bool_]]] = {}
    gains = set()
    for group in grouping.groups:
        if group.name not in keep:
            continue
        removed = np.setdiff1d(np.arange(group.size), np.asarray(keep[group.name], dtype=np.int64))
        for member in group.members:
            dims = gone.setdefault(member.name, {})
            if member.dim not in dims:
                dims[member.dim] = np.zeros(shapes[member.name][member.dim], dtype=bool)
            dims[member.dim][member.indices[removed]] = True
            if member.gain is not None and not member.gain.centred and len(removed):
                gains.add(member.gain)
    kept = {
        name: {dim: np.flatnonzero(~mask) for dim, mask in dims.items() if mask.any()} for name, dims in gone.items()
    }
    return Slices(kept, gains)


def take(tensor: Tensor, slices: Mapping[int, npt.NDArray[np.int64]]) -> Tensor:
    """`tensor` with only the given indices of each dimension, contiguous as the original was."""
    format_ = torch.preserve_format
    out = tensor
    for dim, indices in slices.items():
        out = out.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out.clone(memory_format=format_) if out is tensor else out


def slice_state(module: nn.Module, slices: Slices) -> None:
    """Replace the parameters and buffers of `module` by slices of them. Tied ones stay tied."""
    owners: dict[int, tuple[str, list[tuple[dict[str, Any], str]]]] = {}
    for path, sub in module.named_modules():
        for store in (sub._parameters, sub._buffers):
            for leaf, tensor in store.items():
                if tensor is not None:
                    name = f"{path}.{leaf}" if path else leaf
                    owners.setdefault(id(tensor), (name, []))[1].append((store, leaf))
    found = {name: places[0][0][places[0][1]] for name, places in owners.values()}
    mended = {name: tensor for gain in slices.gains for name, tensor in _mended(gain, found, slices).items()}
    for name, places in owners.values():
        dims = slices.get(name)
        if not dims and name not in mended:
            continue
        store, leaf = places[0]
        old = store[leaf]
        with torch.no_grad():
            new = mended[name] if name in mended else take(old.detach(), dims or {})
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
        for store, leaf in places:
            store[leaf] = new


@torch.no_grad()
def _mended(gain: Gain, tensors: Mapping[str, Tensor], slices: Slices) -> dict[str, Tensor]:
    """The gain and the direction of a normalised weight, sliced so that what is left of the weight is what it was."""
    weight, direction = (tensors[name].detach() for name in (gain.gain, gain.direction))
    dims = slices[gain.direction]
    new, left = take(weight, slices.get(gain.gain, {})), take(direction, dims)
    norm = take(gain.norm(direction), {d: kept for d, kept in dims.items() if d not in gain.dims})
    return {gain.gain: new * gain.ratio(norm, gain.norm(left), new), gain.direction: gain.filled(left)}
