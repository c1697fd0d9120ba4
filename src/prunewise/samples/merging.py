"""The states of several ranks become one, at the end of an epoch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from prunewise.samples.state import OBSERVATIONS, State

_CHUNK = 1 << 20  # samples that are merged at a time: bounds the memory taken


def is_distributed() -> bool:
    """True where a process group of several ranks is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def merge_states(state: State, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the state of the rank that observed the sample since the last merge, in place.

    All ranks held the same state after the last merge, so of those whose count of observations is highest one is taken
    whole. A sample that several ranks observed (a sampler repeats some, so that all ranks get the same number) is so counted
    on one of them only: the one with the most observations, the lowest of several.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for begin in range(0, len(state.counts), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        key = state.counts[part, OBSERVATIONS].long() * world + (world - 1 - rank)
        best = key.clone()
        dist.all_reduce(best, dist.ReduceOp.MAX, group)
        mine = best == key
        for tensor in state.tensors().values():
            # Exactly one rank adds something. Bits, not numbers, are summed: NCCL knows no 16-bit integers, and -0.0 + 0.0 is 0.0.
            rows = tensor[part]
            sent = torch.where(mine[:, None], _as_integers(rows), 0)
            dist.all_reduce(sent, dist.ReduceOp.SUM, group)
            rows.copy_(_from_integers(sent, rows.dtype))


def max_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """The elementwise maximum of a tensor over all ranks, in place."""
    dist.all_reduce(values, dist.ReduceOp.MAX, group)


def range_over_ranks(
    values: Tensor, unknown: int, group: dist.ProcessGroup | None = None
) -> tuple[list[int], list[int]]:
    """The least and the highest of each of the ints ≥ 0 over the ranks that know it; `unknown` (< 0) where none does."""
    lowest = torch.where(values == unknown, torch.iinfo(values.dtype).min, -values)
    both = torch.cat([values, lowest])
    max_over_ranks(both, group)
    most, least = both[: len(values)], -both[len(values) :]
    return torch.where(most == unknown, unknown, least).tolist(), most.tolist()


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The elementwise sum of a tensor over all ranks."""
    total = values.clone()
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total


def _as_integers(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32:
        return tensor.contiguous().view(torch.int32)
    if tensor.dtype == torch.float16:
        return tensor.contiguous().view(torch.int16).int()
    return tensor.int()


def _from_integers(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return tensor.view(torch.float32)
    if dtype == torch.float16:
        return tensor.to(torch.int16).view(torch.float16)
    return tensor.to(dtype)
