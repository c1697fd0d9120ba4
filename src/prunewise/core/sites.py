"""Where a gate stands: on the weights that read the channels.

Removing a channel takes away what its readers add up. So masking the readers' weights along the channel equals
the removal, whatever lies between the channel's origin and its readers, and costs a product per weight instead
of one per activation. Only norms over channels need more: see `prunewise.core.norms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prunewise.core.gains import Gain
from prunewise.core.groups import ChannelGroup
from prunewise.core.norms import Norm, norms_masked

if TYPE_CHECKING:
    from prunewise.core.groups import Grouping


@dataclass(frozen=True)
class Site:
    """One dimension of one parameter that reads channels. `units[i]` numbers the unit that entry `i` belongs to.

    Units are numbered through the given groups, one group after another; -1 means an entry that always stays.
    """

    name: str
    dim: int
    units: npt.NDArray[np.int64]
    gain: Gain | None = None  # set where a norm runs over the dimension, which a gain makes up for


def gate_sites(groups: Sequence[ChannelGroup], sizes: Mapping[str, tuple[int, ...]]) -> list[Site]:
    """The sites of these groups; `sizes` are the shapes of the parameters by name."""
    found: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
    gains: dict[tuple[str, int], Gain | None] = {}
    offset = 0
    for group in groups:
        for member in group.members:
            if member.role == "in":
                key = (member.name, member.dim)
                if key not in found:
                    found[key] = np.full(sizes[member.name][member.dim], -1, dtype=np.int64)
                gains[key] = member.gain
                found[key][member.indices] = offset + np.arange(group.size)[:, None]
        offset += group.size
    return [Site(*key, units, gains[key]) for key, units in found.items()]


def norm_sites(grouping: Grouping, groups: Sequence[ChannelGroup]) -> list[tuple[Norm, npt.NDArray[np.int64]]]:
    """The norms that average over channels of these groups, and the units of their channels, numbered as in `Site`."""
    unit_of = np.full(len(grouping.roots) + 1, -1, dtype=np.int64)
    offset = 0
    for group in groups:
        unit_of[group.class_ids] = offset + np.arange(group.size)
        offset += group.size
    found = [(norm, unit_of[grouping.classes(labels)]) for norm, labels in grouping.structure.flow.norms]
    return [(norm, units) for norm, units in found if (units >= 0).any()]


@contextmanager
def masked(model: nn.Module, grouping: Grouping, keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """While active, `model` computes what the network without the other units would; weights are put back after.

    Branches that lose all their units give zero.
    """
    alive = grouping.alive(keep)
    channels = grouping.structure.flow.norms
    norms = {norm: torch.from_numpy(alive[grouping.classes(labels)]) for norm, labels in channels}
    with norms_masked(model, norms), _weights_masked(model, grouping, keep):
        yield


@contextmanager
def _weights_masked(model: nn.Module, grouping: Grouping, keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            masks: dict[Gain, torch.Tensor] = {}
            for group in grouping.groups:
                if group.name not in keep or len(keep[group.name]) == group.size:
                    continue
                gone = np.setdiff1d(np.arange(group.size), np.asarray(keep[group.name], dtype=np.int64))
                for member in group.members:
                    if member.role == "in":
                        weight = tensors[member.name]
                        if member.gain is not None:
                            weight = masks.setdefault(member.gain, torch.ones_like(weight))
                        else:
                            before.append((weight, weight.detach().clone()))
                        index = torch.from_numpy(member.indices[gone].reshape(-1)).to(weight.device)
                        weight.index_fill_(member.dim, index, 0)
            for gain, mask in masks.items():
                weight, direction = tensors[gain.gain], tensors[gain.direction]
                before += [(t, t.detach().clone()) for t in (weight, direction)]
                weight.mul_(gain.factor(direction, mask, weight))
                direction.copy_(gain.closed(direction, mask))
            for branch in grouping.branches:
                for name in branch.parameters if branch.dropped(keep) else ():
                    before.append((tensors[name], tensors[name].detach().clone()))
                    tensors[name].zero_()
        yield
    finally:
        with torch.no_grad():
            for weight, value in reversed(before):
                weight.copy_(value)
