"""What a recorder takes: ids, labels, saved states. Each is looked at before anything is changed. And how to say what is wrong."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunewise.core.checks import is_count
from prunewise.core.errors import CheckpointError, DataError
from prunewise.samples.ids import SampleIndex
from prunewise.samples.observing import TASKS
from prunewise.samples.state import State

KIND, VERSION = "prunewise/learnability-recorder", 1


def require_values(**tensors: Any) -> None:
    """Raise `DataError` for tensors, by name, that hold no values to look at: those on the meta device, and sparse ones."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and (value.device.type == "meta" or value.layout != torch.strided):
            what = "on the meta device" if value.device.type == "meta" else str(value.layout)
            raise DataError(f"the {name.replace('_', ' ')} are {what}: give a dense tensor with values")


def as_device(device: Any) -> torch.device:
    """The device of that name; `DataError` where there is none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DataError(f"device={device!r} is no device ({str(error).splitlines()[0]})") from error


def numbers_of(sample_ids: Any, size: int, index: SampleIndex) -> Tensor:
    """Dense numbers, (B,) int64, wherever the ids lie; `DataError` where they are no ids, or not `size` of them."""
    if isinstance(sample_ids, Tensor):
        ids = sample_ids  # numbers already, as `track` makes them
    elif isinstance(sample_ids, (np.ndarray, list, tuple)):
        listed = sample_ids.tolist() if isinstance(sample_ids, np.ndarray) else list(sample_ids)
        if index.is_dense and all(type(i) is int and -(1 << 63) <= i < 1 << 63 for i in listed):
            ids = torch.tensor(listed, dtype=torch.int64)
        else:
            ids = torch.tensor([index.number(i) for i in listed], dtype=torch.int64)
    else:
        raise DataError(f"the sample ids are {kind_of(sample_ids)}: give a tensor of shape ({size},)")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"the sample ids are {ids.dtype}: ids are whole numbers, as track() puts them into the samples")
    if ids.numel() != size or ids.ndim > 2:
        raise DataError(
            f"{tuple(ids.shape)} sample ids for the logits of {size} samples: one id for each, in the same order"
        )
    return ids.detach().reshape(-1).long()


def check_ids(ids: Tensor, n: int) -> None:
    """Raise `DataError` for ids outside [0, n)."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= n):
        wrong = ids[(ids < 0) | (ids >= n)]
        raise DataError(
            f"sample id {int(wrong[0])} is not in [0, {n:,}) ({len(wrong)} of {len(ids)} are not): make the recorder for the "
            "whole data set, LearnabilityRecorder(len(tracked))"
        )


def check_labels(task: str, targets: Tensor, classes: int, ignore_index: int) -> None:
    """Raise `DataError` for class numbers that are none; distributions are looked at later."""
    if task == "multilabel" or targets.is_floating_point() or not targets.numel():
        return
    labels = targets.long()
    low, high = labels.aminmax()
    if int(low) < 0 or int(high) >= classes:
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        if bool(bad.any()):
            raise DataError(bad_labels(bad.flatten(1).any(1) if bad.ndim > 1 else bad, targets, classes, ignore_index))


def bad_labels(bad: Tensor, targets: Tensor, classes: int | None, ignore_index: int) -> str:
    """What to say of the samples where `bad`, (B,) bool, is True."""
    return (
        f"{int(bad.sum())} of {len(bad)} samples have labels that do not fit "
        f"{'the task' if classes is None else f'{classes} classes'} (they lie between {targets.min().item():g} and "
        f"{targets.max().item():g}): number the classes from 0, give distributions that sum to 1, or leave labels out by "
        f"ignore_index={ignore_index}"
    )


def checked_state(given: Any, mine: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A saved state, if it is whole and of a recorder with the settings `mine`; its tallies have `length` entries."""
    saved: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    if saved.get("kind") != KIND:
        raise CheckpointError("this is no state of a LearnabilityRecorder: give what its state_dict() returned")
    if saved.get("version") != VERSION:
        raise CheckpointError(f"state of version {saved.get('version')!r}; this prunewise reads version {VERSION}")
    config = saved.get("config")
    if not isinstance(config, Mapping) or set(config) != set(mine):
        raise CheckpointError("the state is damaged: its settings are missing")
    for name, value in mine.items():
        if config[name] != value:
            raise CheckpointError(
                f"the state was saved with {name}={config[name]!r}, this recorder has {value!r}: make it with the "
                "settings, and for the data set, of the run that is gone on with"
            )
    task, classes = saved.get("task"), saved.get("num_classes")
    tallies = [saved.get("tally"), saved.get("merged_tally")]
    sound = (
        task in TASKS
        and (classes is None or is_count(classes))
        and saved.setdefault("class_dim", None) in (None, -1, 1)
    )
    sound = sound and all(isinstance(t, list) and len(t) == length and all(map(is_count, t)) for t in tallies)
    tensors = saved.get("tensors")
    if not sound or not isinstance(tensors, Mapping):
        raise CheckpointError("the state is damaged: its task, tally or tensors are not valid")
    empty = State.empty(0, torch.device("cpu"), mine["trace"], mine["trace_margins"]).tensors()
    if tensors and set(tensors) != set(empty):
        raise CheckpointError(f"the state is damaged: it holds {sorted(tensors)}, and should hold {sorted(empty)}")
    for name, tensor in tensors.items():
        wanted = (mine["n"], *empty[name].shape[1:])
        fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == wanted and tensor.dtype == empty[name].dtype
        if not fits or tensor.device.type == "meta":
            found = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"the state is damaged: {name} is {found}, not {wanted} {empty[name].dtype}")
    extent = saved.setdefault("logit_range", (-math.inf, math.inf))  # states of before do not know it
    if not isinstance(extent, (tuple, list)) or len(extent) != 2 or not all(isinstance(v, float) for v in extent):
        raise CheckpointError("the state is damaged: its range of logits is not valid")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()) or (name in ("counts", "small") and bool((tensor < 0).any())):
            raise CheckpointError(f"the state is damaged: {name} holds what no recorder writes (NaN, or below 0)")
    if tensors and bool((tensors["counts"][:, 1] > tensors["counts"][:, 0]).any()):
        raise CheckpointError("the state is damaged: some samples have more hits than observations")
    return saved


def array_of(values: Any, what: str, remedy: str) -> npt.NDArray[Any]:
    """`values` as an array; `DataError`, with `what` they are and a `remedy`, where they are none: ragged lists, sparse tensors."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            # NumPy has no bfloat16, and no 8-bit floats
            narrow = values.is_floating_point() and values.element_size() <= 2
            values = (values.float() if narrow else values).numpy()
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what} are no array ({str(error)[:200]}): {remedy}") from error


def require(condition: bool, message: str) -> None:
    """Raise `DataError` with the message where the condition does not hold."""
    if not condition:
        raise DataError(message)


def kind_of(value: Any) -> str:
    """The type of a value, with its article.

    >>> kind_of(3), kind_of([3])
    ('an int', 'a list')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def warn_caller(message: str) -> None:
    """Warn at the line that called into `prunewise.samples`, however many of its functions lie between."""
    level, frame = 1, sys._getframe()
    outer: FrameType | None = frame
    while outer is not None and outer.f_globals.get("__name__", "").startswith("prunewise.samples."):
        level, outer = level + 1, outer.f_back
    warnings.warn(message, stacklevel=level)
