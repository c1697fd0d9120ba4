"""What every training of ours is made of: settings, rates, losses, randomness, and the state it goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunewise._state import rng_state, set_rng_state
from prunewise.core.errors import CheckpointError, DataError, NonFiniteError


def cosine(progress: float) -> float:
    """The share of the learning rate at a share of the run: half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def sgd(parameters: list[nn.Parameter], lr: float = 0.01) -> torch.optim.Optimizer:
    """The optimizer where none is given."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def make_optimizer(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None, model: nn.Module
) -> torch.optim.Optimizer:
    require_callable("optimizer", make, "that makes a torch.optim.Optimizer of a list of parameters")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise DataError("no parameter of the model requires a gradient: nothing can be trained")
    made = sgd(parameters) if make is None else make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise DataError(
            f"optimizer= gave a {type(made).__name__}: it should be a callable that makes a torch.optim.Optimizer of a list of "
            "parameters, as in lambda p: torch.optim.AdamW(p, lr=1e-3)"
        )
    return made


def check_settings(loader: Any, epochs: Any, seed: Any, every: Any) -> None:
    for name, value, least in (("epochs", epochs, 1), ("seed", seed, 0), ("checkpoint_every", every or 1, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name}={value!r} should be an int of at least {least}")
    if isinstance(loader, Iterator):
        raise DataError(
            "train_loader is an iterator, which is used up after one epoch: give the loader itself, or a list"
        )
    try:
        steps = len(loader)
    except TypeError:
        raise DataError(
            f"train_loader, a {type(loader).__name__}, has no length: give one with a length (batches an epoch), which says how "
            "many steps the run has"
        ) from None
    if not steps:
        raise DataError("train_loader is empty: give one with batches (drop_last drops a batch that is not full)")


def require_callable(name: str, value: Any, what: str) -> None:
    """Raise where a setting is neither None nor a callable."""
    if value is not None and not callable(value):
        raise DataError(f"{name}={value!r} should be a callable {what}")


def set_rates(
    optimizer: torch.optim.Optimizer, rates: Iterable[float], schedule: Callable[[float], float], share: float
) -> None:
    """Learning rates of the parameter groups: what they started with times the schedule's factor at a share of the run."""
    factor = schedule(share)
    try:
        number = float(factor)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"lr_schedule gave {factor!r} at {share:.3g} of the run: it should be a finite factor of the rate"
        )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * number


def finite(loss: Tensor, epoch: int, step: int) -> float:
    """The loss as a number; both counts start at 0."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value} at epoch {epoch + 1}, step {step + 1}; nothing of this step was applied, and the given model "
            "is as it was. Look at the data and the model's weights, or lower the learning rate"
        )
    return value


# -- what a run goes on from --------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those that `state_dict` leaves out, too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def digest_of(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in state_of(model).items():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(values.numpy().tobytes())
    return found.hexdigest()


def warn_of_other_weights(saved: str, digest: str, folder: Path, stacklevel: int = 3) -> None:
    """Say where a run goes on that was not started from these weights: its own are as good as any, but they are its own."""
    if saved != digest:
        warnings.warn(
            f"{folder} holds a run that started from other weights than this model's: it goes on with its own, and those given "
            "play no part. Name another folder to start from them",
            stacklevel=stacklevel,
        )


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """What a damaged state leads to is an error that names the folder."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is damaged ({error}): delete it to start anew") from error


def require_same(settings: Mapping[str, Any], saved: Mapping[str, Any], folder: Path) -> None:
    """Raise where the folder holds a run with other settings."""
    for key, value in settings.items():
        found = saved.get(key)
        if found != value:
            raise CheckpointError(
                f"{folder} holds another run: its {key} is {str(found)[:80]}, this call's {str(value)[:80]}. Give the same "
                "arguments to go on with it; name another folder, or delete this one, to start anew"
            )


def require_fitting(model: nn.Module, saved: Mapping[str, Tensor], folder: Path) -> None:
    """Raise where the saved tensors are not those of the model."""
    for name, tensor in state_of(model).items():
        if name not in saved or saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{folder}: tensor {name!r} is missing or of another shape or dtype; delete the folder"
            )


@torch.no_grad()
def fill(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the model the saved values."""
    for name, tensor in state_of(model).items():
        tensor.copy_(saved[name])


# -- randomness ---------------------------------------------------------------------------------------------------


def first_batch(loader: Iterable[Any]) -> Any:
    for batch in loader:
        return batch
    raise DataError("train_loader is empty: give one with batches")


def _generators(loader: Any) -> list[torch.Generator]:
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    holders.append(getattr(holders[2], "sampler", None))
    found = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    return list(found.values())


@contextlib.contextmanager
def own_randomness(device: torch.device, loader: Any) -> Iterator[None]:
    """The global random generators, and the loader's, are put back afterwards."""
    before, generators = rng_state(device), [(g, g.get_state()) for g in _generators(loader)]
    try:
        yield
    finally:
        set_rng_state(before, device)
        for generator, state in generators:
            generator.set_state(state)


def seed_epoch(loader: Any, seed: int, epoch: int) -> None:
    """All that is random in an epoch follows from (seed, epoch)."""
    digest = hashlib.sha256(f"prunewise:{seed}:{epoch}".encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    torch.manual_seed(number)
    np.random.seed(number % (1 << 32))
    random.seed(number)
    for i, generator in enumerate(_generators(loader)):
        generator.manual_seed(number + i + 1 & (1 << 62) - 1)
    _set_epoch(loader, epoch)


def _set_epoch(loader: Any, epoch: int) -> None:
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)


class Steps:
    """How many steps each epoch has: some samplers (a curriculum) give more in one than in another."""

    def __init__(self, loader: Any, epochs: int) -> None:
        self.of: list[int] = []
        for epoch in range(epochs):
            _set_epoch(loader, epoch)
            self.of.append(len(loader))
        _set_epoch(loader, 0)
        self.total = sum(self.of)

    def before(self, epoch: int) -> int:
        """All steps of the epochs before this one."""
        return sum(self.of[:epoch])

    def share(self, epoch: int, step: int) -> float:
        """The share of the run that lies before a step, in [0, 1)."""
        return (self.before(epoch) + step) / self.total
