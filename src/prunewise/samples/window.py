"""Batches that wait to be looked at together: what they say is worked out once for many of them.

A batch of 128 takes some 250 small operations, nearly all of it their fixed cost. Kept as they are and worked out thirty at a
time, batches cost three copies each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS, BYTES = 4096, 8 << 20  # what waits at most


class Batch(NamedTuple):
    """One batch, or several one after the other, then with (B,) batch numbers: (B,) ids, logits, targets, mixed or not."""

    ids: Tensor
    logits: Tensor
    targets: Tensor
    mixed: Tensor | bool
    batch: Tensor | None


class Window:
    """Waiting batches of one kind: the same dtypes, devices and number of classes."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor, Tensor | bool]] = []
        self._count = self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def has_room(self, ids: Tensor, logits: Tensor, targets: Tensor) -> bool:
        """True where one more batch may wait with the others."""
        if self._count + len(logits) > ROWS or self._bytes + logits.nbytes > BYTES:
            return False
        if not self._rows:
            return True
        numbers, first, labels, _ = self._rows[0]
        same = first.dtype == logits.dtype and first.shape[1:] == logits.shape[1:] and labels.dtype == targets.dtype
        pairs = ((numbers, ids), (first, logits), (labels, targets))
        return same and all(old.device == new.device for old, new in pairs)

    def add(self, ids: Tensor, logits: Tensor, targets: Tensor, mixed: Tensor | bool) -> None:
        """Keep copies: the caller may write into its tensors before they are looked at."""
        mixed = mixed.clone() if isinstance(mixed, Tensor) else mixed
        self._rows.append((ids.clone(), logits.detach().clone(), targets.detach().clone(), mixed))
        self._count += len(logits)
        self._bytes += logits.nbytes

    def take(self) -> Batch:
        """All that waits, in order; the window is empty then."""
        rows = self._rows
        ids, logits, targets = (torch.cat([row[i] for row in rows]) for i in range(3))  # type: ignore[misc]
        sizes = [len(row[0]) for row in rows]
        mixed = torch.zeros(len(ids), dtype=torch.bool, device=logits.device)
        at = 0
        for row, size in zip(rows, sizes, strict=True):
            if row[3] is not False:
                mixed[at : at + size] = row[3]
            at += size
        numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor(sizes)).to(logits.device, non_blocking=True)
        self._rows, self._count, self._bytes = [], 0, 0  # not before: what raises loses nothing
        return Batch(ids, logits, targets, mixed, numbers)


def rounds(ids: Tensor, batch: Tensor) -> Tensor:
    """For each row, how many earlier batches hold its id: (B,) int64. Rows of one round are recorded as one batch would be."""
    order = torch.argsort(ids, stable=True)  # batches are in order already
    key, number = ids[order], batch[order]
    one = torch.ones(1, dtype=torch.bool, device=ids.device)
    new_id = torch.cat([one, key[1:] != key[:-1]])
    new_batch = new_id | torch.cat([one, number[1:] != number[:-1]])
    count = new_batch.long().cumsum(0)
    first = torch.where(new_id, count, 0).cummax(0).values
    return torch.empty_like(count).scatter_(0, order, count - first)
