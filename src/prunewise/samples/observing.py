"""What one batch says of its samples: right or wrong, by how much. Pure functions; nothing waits for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunewise.core.errors import DataError

TASKS = ("auto", "multiclass", "binary", "multilabel", "tokens")
SMOOTH = 0.2  # of two classes: the second's probability in a smoothed label at most; more is a mixture
LIMIT = 65504.0  # margins and losses are held within what half precision holds
VALUES = ("aum", "aum_softmax", "confidence", "loss", "el2n")  # columns of `Observed.values`

# Why an observation was not counted; columns of the recorder's tally.
REASONS = ("not finite", "ignored", "mixed", "no single class")


class Observed(NamedTuple):
    """One batch of B samples.

    Attributes:
        hit: (B,) bool; the prediction is the label. A tie for the highest logit is no hit: the model has not decided.
        values: (B, 5) float64, the columns `VALUES`.
        predicted: (B,) int64, the class with the highest logit (at a tie with the label, the other); -1 where there is no single
            one (multi-label, tokens).
        counted: (B,) bool; False where the sample was not observed at all.
        reasons: (B, 4) bool; why not, the columns `REASONS`.
        bad: (B,) bool; the label is no class (then the whole batch must be refused).
    """

    hit: Tensor
    values: Tensor
    predicted: Tensor
    counted: Tensor
    reasons: Tensor
    bad: Tensor


def resolve_task(task: str, logits: Tensor, targets: Tensor) -> str:
    """The task that the shapes tell, where it is "auto"; `DataError` where shapes and task do not fit."""
    shapes = f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"
    if not logits.is_floating_point():
        raise DataError(f"the logits are {logits.dtype}: give the model's raw outputs, before softmax and argmax")
    if targets.is_complex():
        raise DataError(f"the targets are {targets.dtype}: give class numbers, or probabilities by class")
    if logits.ndim == 0:
        raise DataError("the logits are a single number: their first dimension should be the samples of the batch")
    if targets.ndim == 0 or len(targets) != len(logits):
        raise DataError(f"{shapes} differ in their first dimension, which is the samples of the batch")
    labels = not targets.is_floating_point()
    one = logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1)
    if task == "auto":
        if one and targets.numel() == len(logits):
            task = "binary"
        elif logits.ndim == 2 and ((targets.ndim == 1 and labels) or (targets.shape == logits.shape and not labels)):
            task = "multiclass"
        elif logits.ndim >= 3 and labels and targets.ndim == logits.ndim - 1:
            task = "tokens"
        elif logits.shape == targets.shape and labels:
            raise DataError(f"{shapes} of whole numbers look like several labels a sample: say task='multilabel'")
    fits = {
        "binary": one and targets.numel() == len(logits),
        "multiclass": logits.ndim == 2
        and logits.shape[1] > 1
        and ((targets.shape == logits.shape and not labels) or (targets.ndim == 1 and labels)),
        "multilabel": logits.ndim >= 2 and logits.shape == targets.shape and 0 not in logits.shape[1:],
        "tokens": logits.ndim >= 3 and labels and targets.ndim == logits.ndim - 1 and bool(class_dims(logits, targets)),
    }
    if not fits.get(task, False):
        wants = {
            "auto": "(B, K) with (B,) class numbers or (B, K) probabilities; (B,) or (B, 1) with (B,) for two classes; "
            "(B, T, K) or (B, K, ...) with labels by token",
            "binary": "(B,) or (B, 1), and one label a sample",
            "multiclass": "(B, K) with K > 1, and (B,) class numbers or (B, K) probabilities (floats)",
            "multilabel": "(B, K) both",
            "tokens": "(B, T, K) or (B, K, ...), and class numbers of the remaining shape",
        }
        numbers = logits.ndim > 1 and not one and targets.shape == (*logits.shape[:1], *logits.shape[2:]) and not labels
        remedy = "; class numbers are whole numbers: targets.long()" if numbers else ""
        raise DataError(f"{shapes} ({targets.dtype}) do not fit; expected for task {task!r}: {wants[task]}{remedy}")
    return task


@torch.no_grad()
def observe(
    task: str,
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    soft_labels: bool,
    hit_share: float,
    class_dim: int = -1,
) -> Observed:
    """What `logits` say of `targets`, for a task other than "auto".

    Definitions, with z the logits, p = softmax(z), y the label:
        aum: z_y minus the highest other logit. aum_softmax: p_y minus the highest other p. confidence: p_y.
        loss: cross-entropy in nats. el2n: ‖p − onehot(y)‖₂, or ‖p − t‖₂ for soft labels t.
        binary: one logit z is read as the two logits (0, z).
        multilabel: each label is a binary decision; a hit has them all right; margins are those of the weakest
            label, confidence and loss means over the labels, el2n = ‖sigmoid(z) − t‖₂.
        tokens: a hit has at least `hit_share` of its counted tokens right; all values are means over them.
    """
    logits, targets = logits.detach(), targets.detach()
    if targets.device != logits.device:
        targets = targets.to(logits.device, non_blocking=True)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if task == "multilabel":
        return _multilabel(logits, targets)
    if task == "binary":
        z, y = logits.reshape(-1), targets.reshape(-1)
        logits = torch.stack([torch.zeros_like(z), z], 1)
        if y.is_floating_point():
            # the usual 0. and 1. of BCE losses, or soft ones
            if soft_labels:
                ignored = y == ignore_index
                y = torch.where(ignored, 0, y)
                return _soft(logits, torch.stack([1 - y, y], 1), soft_labels, ignored)
            neither = (y != 0) & (y != 1) & (y != ignore_index)
            return _hard(logits, torch.where(neither, -1, y).long(), ignore_index)._replace(bad=neither)
        return _hard(logits, y, ignore_index)
    if task == "tokens":
        return _tokens(logits, targets, ignore_index, hit_share, class_dim)
    if targets.is_floating_point():
        return _soft(logits, targets, soft_labels)
    return _hard(logits, targets, ignore_index)


def _hard(z: Tensor, y: Tensor, ignore_index: int) -> Observed:
    """Logits (B, K), class numbers (B,)."""
    y = y.long()
    ignored = y == ignore_index
    bad = ~ignored & ((y < 0) | (y >= z.shape[1]))
    y = torch.where(ignored | bad, 0, y)
    none = torch.zeros_like(ignored)
    return _of_class(z, y, None, ignored, none, none, bad)


def _soft(z: Tensor, t: Tensor, soft_labels: bool, ignored: Tensor | None = None) -> Observed:
    """Logits (B, K), probabilities (B, K): one-hot and smoothed labels; other distributions only with `soft_labels`."""
    t = t.to(z.dtype)
    wrong = ~torch.isfinite(t).all(1) | (t < -1e-4).any(1) | ((t.sum(1) - 1).abs() > 1e-2)
    t = torch.where(wrong[:, None], 0, t)
    top, y = t.max(1)
    second, least = _without(t, y, -torch.inf).amax(1), _without(t, y, torch.inf).amin(1)
    # Smoothing gives all other classes the same; two peaks are a mixture of two samples, which is an observation of neither.
    # Of two classes nothing but the size of the second tells them apart.
    peaks = second > SMOOTH if t.shape[1] == 2 else second - least > 1e-3
    mixed = torch.zeros_like(wrong) if soft_labels else peaks
    ignored = torch.zeros_like(wrong) if ignored is None else ignored
    return _of_class(z, y, t, ignored, mixed, (top == second) & ~mixed, wrong)


def _of_class(
    z: Tensor, y: Tensor, t: Tensor | None, ignored: Tensor, mixed: Tensor, unclear: Tensor, bad: Tensor
) -> Observed:
    """The values of logits `z` for labels `y`, or for the distribution `t` whose highest class is `y`."""
    broken = _broken(z).any(1) | (z == -torch.inf).all(1)
    z = torch.where(broken[:, None], 0, z)
    own = z.gather(1, y[:, None])[:, 0]
    other = _without(z, y, -torch.inf).amax(1)
    log_p = z.log_softmax(1)
    own_p = log_p.gather(1, y[:, None])[:, 0]
    p = log_p.exp()
    if t is None:
        loss = -own_p
        error = p.scatter_add(1, y[:, None], -torch.ones_like(own)[:, None])
    else:
        loss = -torch.where(t > 0, t * log_p, 0).sum(1)
        error = p - t
    confidence, rival = own_p.exp(), _without(p, y, 0).amax(1)
    values = [own - other, confidence - rival, confidence, loss, error.double().norm(dim=1)]
    left_out = ignored | mixed | unclear
    reasons = torch.stack([broken & ~left_out, ignored, mixed, unclear], 1)
    rival_class = _without(z, y, -torch.inf).argmax(1)  # not the label, where the two tie
    predicted = torch.where(own > other, y, rival_class)
    return Observed(own > other, _columns(values), predicted, ~broken & ~left_out, reasons, bad)


def _multilabel(z: Tensor, t: Tensor) -> Observed:
    z, t = z.flatten(1), t.flatten(1).to(z.dtype)
    wrong = ~((t == 0) | (t == 1)).all(1)
    t = torch.where(wrong[:, None], 0, t)
    broken = (_broken(z) | (z == -torch.inf)).any(1)
    z = torch.where(broken[:, None], 0, z)
    signed = (2 * t - 1) * z
    own = signed.sigmoid()
    loss = torch.nn.functional.softplus(-signed).mean(1)
    margin = signed.amin(1)
    values = [margin, torch.tanh(margin / 2), own.mean(1), loss, (1 - own).double().norm(dim=1)]
    none = torch.zeros_like(broken)
    reasons = torch.stack([broken, none, none, none], 1)
    return Observed(
        margin > 0, _columns(values), torch.full_like(broken, -1, dtype=torch.long), ~broken, reasons, wrong
    )


def _tokens(z: Tensor, y: Tensor, ignore_index: int, hit_share: float, class_dim: int) -> Observed:
    size, classes = len(z), z.shape[class_dim]
    rows = z.movedim(class_dim, -1).reshape(-1, classes)
    found = _hard(rows, y.reshape(-1), ignore_index)
    found = found._replace(counted=found.counted.view(size, -1), reasons=found.reasons.view(size, -1, len(REASONS)))
    broken = found.reasons[:, :, 0].any(1)
    count = found.counted.sum(1)
    right = (found.hit.view(size, -1) & found.counted).sum(1)
    share = right.double() / count.clamp(min=1)  # whatever the default dtype
    values = torch.where(found.counted[:, :, None], found.values.view(size, -1, len(VALUES)), 0).sum(1)
    values = values / count.clamp(min=1)[:, None]
    empty, none = (count == 0) & ~broken, torch.zeros_like(broken)
    return Observed(
        share >= hit_share, values, torch.full_like(count, -1), ~broken & ~empty,
        torch.stack([broken, empty, none, none], 1), found.bad.view(size, -1).any(1),
    )  # fmt: skip


def class_dims(z: Tensor, y: Tensor) -> tuple[int, ...]:
    """Which dimensions of token logits may hold the classes: the last (-1), the second (1, as `cross_entropy` has it), or both."""
    last, second = z.shape[:-1] == y.shape, (z.shape[0], *z.shape[2:]) == tuple(y.shape)
    return (-1,) * last + (1,) * second


def _broken(z: Tensor) -> Tensor:
    """NaN and +inf; -inf is how classes are ruled out."""
    return torch.isnan(z) | (z == torch.inf)


def _without(z: Tensor, y: Tensor, fill: float) -> Tensor:
    return z.scatter(1, y[:, None], fill)


def _columns(values: list[Tensor]) -> Tensor:
    return torch.stack([v.double() for v in values], 1).clamp(-LIMIT, LIMIT)
