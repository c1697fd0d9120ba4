"""Fine-tuning on CIFAR-10, the same for every method: batches, schedule, optimizer, evaluation, checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import Images
from torch import Tensor, nn

MOMENTUM = 0.9
WARM_UP = 0.02  # share of a phase in which the learning rate rises from zero


@dataclass(frozen=True)
class Settings:
    """What all methods share."""

    epochs: int
    lr: float
    seed: int
    batch_size: int
    weight_decay: float
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    compile_mode: str = "default"


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of one step of a phase: a short linear warm-up, then half a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Trainer:
    """One model in training. `adopt` takes a new model (after surgery), with or without a new optimizer."""

    def __init__(self, settings: Settings, images: Images) -> None:
        self.settings, self.images = settings, images
        self.steps_per_epoch = len(images) // settings.batch_size
        if not self.steps_per_epoch:
            raise SystemExit(f"{len(images)} images make no batch of {settings.batch_size}")
        self.model: nn.Module = nn.Identity()
        self.optimizer: torch.optim.Optimizer
        self._run: Callable[[Tensor], Tensor] = self.model

    def adopt(
        self, model: nn.Module, *, skip: tuple[nn.Parameter, ...] = (), optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Train `model` from here on, all its parameters but `skip`."""
        s = self.settings
        if s.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model
        if optimizer is None:
            out = {id(p) for p in skip}
            parameters = [p for p in model.parameters() if id(p) not in out]
            optimizer = torch.optim.SGD(
                parameters, lr=s.lr, momentum=MOMENTUM, nesterov=True, weight_decay=s.weight_decay
            )
        self.optimizer = optimizer
        self.recompile()

    def recompile(self) -> None:
        """Compile the model anew, where asked for."""
        s = self.settings
        self._run = torch.compile(self.model, mode=s.compile_mode, dynamic=False) if s.compile else self.model

    def epoch(
        self, epoch: int, phase: tuple[int, int], *, weight_decay: float | None = None,
        extra: Callable[[], Tensor] | None = None, before_step: Callable[[], None] | None = None,
        after_step: Callable[[torch.optim.Optimizer], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """One epoch of the phase of epochs [start, end): `extra` joins the loss, the others are called around the step."""
        s = self.settings
        started = time.perf_counter()
        device = self.images.device
        total, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
        first, steps = (epoch - phase[0]) * self.steps_per_epoch, (phase[1] - phase[0]) * self.steps_per_epoch
        self.model.train()
        for i, (images, labels) in enumerate(self.images.augmented(s.batch_size, s.seed, epoch)):
            lr = rate(first + i, steps, s.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = s.weight_decay if weight_decay is None else weight_decay
            with torch.autocast(device.type, torch.bfloat16, enabled=s.bf16):
                logits = self._run(images)
            loss = F.cross_entropy(logits.float(), labels)
            total += loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
            seen += len(labels)
            self.optimizer.zero_grad(set_to_none=True)
            (loss if extra is None else loss + extra()).backward()
            if before_step is not None:
                before_step()
            self.optimizer.step()
            if after_step is not None:
                after_step(self.optimizer)
        mean = float(total) / self.steps_per_epoch
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss of epoch {epoch + 1} is {mean}: a lower learning rate is needed"
            )
        return {
            "epoch": epoch + 1,
            "loss": round(mean, 5),
            "train_accuracy": round(float(correct) / seen, 5),
            "seconds": round(time.perf_counter() - started, 2),
        }

    def momenta(self) -> dict[str, Tensor]:
        """Momentum buffers by parameter name."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        return {names[id(p)]: state["momentum_buffer"] for p, state in self.optimizer.state.items() if id(p) in names}

    def load_momenta(self, momenta: dict[str, Tensor]) -> None:
        """Set them, for the same model."""
        parameters = dict(self.model.named_parameters())
        for name, value in momenta.items():
            self.optimizer.state[parameters[name]]["momentum_buffer"] = value.to(parameters[name].device)


@torch.no_grad()
def predictions(model: nn.Module, images: Images, limit: int | None = None) -> Tensor:
    """Predicted classes, in eval mode and float32, for all images or about the first `limit`."""
    training = model.training
    model.eval()
    classes, seen = [], 0
    for batch, _ in images.plain(500):
        classes.append(model(batch).argmax(1))
        seen += len(batch)
        if limit is not None and seen >= limit:
            break
    model.train(training)
    return torch.cat(classes)


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images that are predicted right."""
    return float((predictions(model, images) == images.labels).double().mean())


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of plain tensors, numbers and strings; atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
