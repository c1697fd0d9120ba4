"""Forty bytes a sample, and how a batch of observations changes them. Nothing waits for a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunewise.samples.observing import VALUES, Observed

OBSERVATIONS, HITS = range(2)  # columns of counts
FORGOTTEN, FIRST, STREAK, WRONG = range(4)  # columns of small
AUM, AUM_SOFTMAX, CONFIDENCE, LOSS, EL2N, VARIANCE = range(6)  # columns of means; the first five are VALUES
SMALL_MAX = 32767
_FRACTION = 29  # bits by which a float64's fraction is longer than a float32's
_GOLDEN = 331804471  # 2^29 / golden ratio: multiples of it, modulo 2^29, are spread evenly


@dataclass
class State:
    """What is kept of N samples.

    Attributes:
        counts: (N, 2) int32; observations, hits.
        small: (N, 4) int16; times forgotten; number of the first hit, from 1 (0: none yet); hits since the last miss; the class
            last predicted wrongly, plus 1 (0: none). They stop at 32,767.
        means: (N, 6) float32; running means of `VALUES` (el2n over its window only), variance of the confidence.
        bits: (N, ⌈E/8⌉) uint8 or None; the first E observations, one bit each (1: hit), lowest bit first.
        margins: (N, E) float16 or None; their logit margins.
    """

    counts: Tensor
    small: Tensor
    means: Tensor
    bits: Tensor | None = None
    margins: Tensor | None = None

    @classmethod
    def empty(cls, n: int, device: torch.device, trace: int, trace_margins: bool) -> State:
        """Nothing seen yet."""
        return cls(
            torch.zeros(n, 2, dtype=torch.int32, device=device),
            torch.zeros(n, 4, dtype=torch.int16, device=device),
            torch.zeros(n, 6, dtype=torch.float32, device=device),
            torch.zeros(n, -(-trace // 8), dtype=torch.uint8, device=device) if trace else None,
            torch.zeros(n, trace, dtype=torch.float16, device=device) if trace and trace_margins else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; those of the trace only where there is one."""
        return {n: t for n in ("counts", "small", "means", "bits", "margins") if (t := getattr(self, n)) is not None}


@torch.no_grad()
def accumulate(state: State, ids: Tensor, seen: Observed, window: int, trace: int) -> None:
    """Record one batch in place.

    Args:
        state: changed in place.
        ids: (B,) int64 in [0, N). An id that stands there several times is observed several times, in the batch's order.
        seen: the observations, on the same device; those not counted leave no mark.
        window: observations of a sample that el2n is the mean over.
        trace: observations of a sample that the trace holds.
    """
    size, n = len(ids), len(state.counts)
    if not size or not n:
        return
    device = ids.device
    # Sorted, the observations of one sample lie side by side, in order; those not counted lie at the end, under id n.
    key, order = torch.sort(torch.where(seen.counted, ids, n), stable=True)
    hit, values, predicted = seen.hit[order], seen.values[order], seen.predicted[order]
    counted = key < n
    row = key.clamp(max=n - 1)
    counts, small, means = state.counts[row].long(), state.small[row].long(), state.means[row].double()

    place = torch.arange(size, device=device)
    one = torch.ones(1, dtype=torch.bool, device=device)
    start = torch.cat([one, key[1:] != key[:-1]])
    end = torch.cat([start[1:], one])
    first = torch.where(start, place, 0).cummax(0).values
    last = torch.where(end, place, size).flip(0).cummin(0).values.flip(0)
    run = start.long().cumsum(0) - 1
    rank = place - first
    number = counts[:, OBSERVATIONS] + rank  # of this observation among its sample's, from 0
    total = counts[:, OBSERVATIONS] + rank + 1

    before = torch.where(start, small[:, STREAK] > 0, hit.roll(1))
    missed = torch.where(hit, -1, place).cummax(0).values  # place of the last miss so far, perhaps another sample's
    streak = torch.where(missed >= first, place - missed, small[:, STREAK] + rank + 1)
    wrong = torch.where(missed >= first, predicted[missed.clamp(min=0)] + 1, small[:, WRONG])
    if_first = torch.where(hit, number + 1, SMALL_MAX)
    earliest = torch.full_like(place, SMALL_MAX).scatter_reduce_(0, run, if_first, "amin")[run]
    had = counts[:, HITS] > 0
    added = torch.zeros(size, 2, dtype=torch.long, device=device)
    added = added.index_add_(0, run, torch.stack([hit.long(), (before & ~hit).long()], 1))[run]
    hits = counts[:, HITS] + added[:, 0]
    first_hit = torch.where(had | (hits == 0), small[:, FIRST], earliest)
    new_small = torch.stack([small[:, FORGOTTEN] + added[:, 1], first_hit, streak, wrong], 1).clamp(max=SMALL_MAX)
    # a class number beyond 16 bits is not known, rather than wrong
    new_small[:, WRONG] = torch.where(wrong > SMALL_MAX, 0, new_small[:, WRONG])

    early = torch.cat([torch.ones_like(values[:, :EL2N]), (number < window)[:, None].double()], 1)
    sums = torch.zeros_like(values).index_add_(0, run, values * early)[run]
    old = counts[:, OBSERVATIONS].double()[:, None].repeat(1, len(VALUES))
    new = total.double()[:, None].repeat(1, len(VALUES))
    old[:, EL2N].clamp_(max=window)
    new[:, EL2N].clamp_(max=window)
    fresh = new - old
    delta = torch.where(fresh > 0, sums / fresh.clamp(min=1) - means[:, : len(VALUES)], 0)
    moved = means[:, : len(VALUES)] + delta * fresh / new
    # Chan, Golub, LeVeque 1979: the variance of two parts from their means and variances
    part = sums[last, CONFIDENCE] / total[last].sub(counts[:, OBSERVATIONS])
    spread = torch.zeros_like(part).index_add_(0, run, (values[:, CONFIDENCE] - part).square())[run]
    n_old, n_new, fresh_n = old[:, CONFIDENCE], new[:, CONFIDENCE], fresh[:, CONFIDENCE]
    between = delta[:, CONFIDENCE].square() * n_old * fresh_n / n_new
    variance = (means[:, VARIANCE] * n_old + spread + between) / n_new
    new_means = _to_float32(torch.cat([moved, variance[:, None]], 1), total)

    # Every observation writes what its sample has come to at the end; those not counted write what the first one does.
    source = torch.where(counted, last, last[:1])
    target = row[source]
    whole = counted[source][:, None]
    new_counts = torch.stack([total, hits], 1)
    state.counts[target] = torch.where(whole, new_counts[source], counts[source]).int()
    state.small[target] = torch.where(whole, new_small[source], small[source]).short()
    state.means[target] = torch.where(whole, new_means[source], means[source].float())

    if trace and state.bits is not None:
        inside = counted & (number < trace)
        at = number.clamp(max=trace - 1)
        bit = torch.where(inside & hit, 1 << (at % 8), 0).to(torch.uint8)
        state.bits.view(-1).index_add_(0, row * state.bits.shape[1] + at // 8, bit)
        if state.margins is not None:
            margin = torch.where(inside, values[:, AUM], 0).to(torch.float16)
            state.margins.view(-1).index_add_(0, row * trace + at, margin)


def _to_float32(values: Tensor, number: Tensor) -> Tensor:
    """Rounded up or down in turn, so that a long series of small changes is not lost to rounding.

    A plain float32 mean stands still once its changes, about 1/n, are below half its last digit (n ≈ 10^7). Rounding up with the
    probability of the fraction cut off keeps the expectation (stochastic rounding); here the golden ratio's multiples by
    the observation's number stand for the dice, so that the same observations give the same bits.
    """
    dither = (number * _GOLDEN) % (1 << _FRACTION)
    whole = (values.contiguous().view(torch.int64) + dither[:, None]) & (-1 << _FRACTION)
    return whole.view(torch.float64).float()
