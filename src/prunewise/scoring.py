"""A training that is there to tell how learnable its samples are: for those with no loop of their own."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunewise._loops import (
    Steps,
    check_settings,
    cosine,
    digest_of,
    fill,
    finite,
    first_batch,
    make_optimizer,
    own_randomness,
    reading,
    require_callable,
    require_fitting,
    require_same,
    seed_epoch,
    set_rates,
    state_of,
    warn_of_other_weights,
)  # fmt: skip
from prunewise._progress import progress as shown_progress
from prunewise._state import load_state, save_state
from prunewise.core.batch import moved, one_number
from prunewise.core.errors import CheckpointError, DataError
from prunewise.core.plan import fingerprint
from prunewise.core.untouched import copied
from prunewise.samples.checking import check_labels
from prunewise.samples.ids import SampleIndex
from prunewise.samples.observing import resolve_task
from prunewise.samples.passes import forward_batch, split_batch
from prunewise.samples.recorder import LearnabilityRecorder
from prunewise.samples.scores import SampleScores
from prunewise.samples.tracking import TrackedDataset, TrackedIterable

_STATE = "scoring"
_IGNORED = -100  # the label that cross_entropy leaves out, and the recorder
Criterion = Callable[[Tensor, Tensor], Tensor]


def score_samples(
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    epochs: int,
    loss: Criterion | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    lr_schedule: Callable[[float], float] = cosine,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SampleScores:
    """Train a copy of `model` and record hits and misses of every sample on the way. The given model is not changed.

    Start from untrained weights: what a trained network knows already says little of its samples. In a loop of your own,
    `LearnabilityRecorder.update` is all it takes.

    Args:
        model: a classifier, on the device where it is to train.
        train_loader: a DataLoader over `track(dataset)`: batches (inputs, targets, sample ids), or dicts with `labels` and
            `sample_id`, whose other entries are the model's keywords.
        epochs: E; a sample's learnability is its share of hits in E observations.
        loss: called with logits and targets, returns one number; default: cross-entropy, in the form that the shapes ask for
            (two classes from one logit; tokens).
        optimizer: makes an optimizer of the list of parameters; default: SGD, learning rate 0.01, Nesterov momentum 0.9,
            weight decay 5e-4.
        lr_schedule: factor of the learning rate at a share of the run in [0, 1); default: half a cosine.
        seed: of all that is random in the training.
        checkpoint: a folder of this run alone, saved to after every epoch; a call with the same arguments goes on from there.
        progress: show a bar (with rich, on a terminal) or a line an epoch, on stderr.

    Raises:
        DataError: the data set is not tracked, a label is no class, the loader or a setting cannot be used.
        NonFiniteError: the loss is not finite; nothing of that step was applied.
        CheckpointError: the folder holds another run, or is damaged.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from prunewise.samples.tracking import track
        >>> _ = torch.manual_seed(0)
        >>> data = track([(torch.randn(4), i % 2) for i in range(32)])
        >>> scores = score_samples(nn.Linear(4, 2), DataLoader(data, 8, shuffle=True), epochs=3, progress=False)
        >>> len(scores), int(scores.observations[0])
        (32, 3)
    """
    check_settings(train_loader, epochs, seed, None)
    require_callable("loss", loss, "of (logits, targets)")
    require_callable("lr_schedule", lr_schedule, "from the share of the run to a factor of the rate")
    index = _index_of(train_loader)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    criterion = copy.deepcopy(loss).to(device) if isinstance(loss, nn.Module) else loss
    network, steps = copied(model), Steps(train_loader, epochs)
    made = make_optimizer(optimizer, network)
    rates = [float(group["lr"]) for group in made.param_groups]
    recorder, labels = LearnabilityRecorder(len(index), ids=index), _Labels(len(index))
    settings = {
        "model": fingerprint(model), "samples": len(index), "epochs": epochs, "steps": steps.of, "seed": seed, "rates": rates,
        "optimizer": type(made).__qualname__,
    }  # fmt: skip
    run = _Run(None if checkpoint is None else Path(checkpoint), settings, network, made, recorder, labels)
    first = run.resume(train_loader, device)
    with own_randomness(device, train_loader), shown_progress(progress, steps.total, "score") as display:
        for epoch in range(first, epochs):
            seed_epoch(train_loader, seed, epoch)
            network.train()
            summed, step = 0.0, -1
            for step, batch in enumerate(train_loader):
                set_rates(made, rates, lr_schedule, steps.share(epoch, step))
                ids, logits, targets = forward_batch(network, moved(batch, device))
                recorder.update(ids, logits.detach(), targets)  # before the loss: it says what is wrong with labels
                told = _cross_entropy(logits, targets, recorder) if criterion is None else criterion(logits, targets)
                value = one_number(told)
                summed += finite(value, epoch, step)
                made.zero_grad(set_to_none=True)
                value.backward()
                made.step()
                labels.note(ids, targets)
                display.step(steps.before(epoch) + step + 1)
            if step < 0:
                raise DataError("train_loader gave no batch in an epoch: it should give some every time")
            run.save(epoch + 1)
            display.line(f"epoch {epoch + 1}/{epochs}  loss {summed / (step + 1):.4f}")
    return recorder.scores(labels.all(), model=type(model).__name__, seed=seed)


def _cross_entropy(logits: Tensor, targets: Tensor, recorder: LearnabilityRecorder) -> Tensor:
    """What the recorder takes a batch for is what is trained."""
    task = resolve_task("auto", logits, targets)
    if task == "binary":
        return nn.functional.binary_cross_entropy_with_logits(logits.reshape(-1), targets.reshape(-1).to(logits.dtype))
    if task == "tokens":
        logits = logits.movedim(recorder.class_dim_of(logits, targets), 1)
    # On a GPU the recorder looks at labels later, and a wrong one in the loss is the end of the process.
    check_labels(task, targets, logits.shape[1], _IGNORED)
    return nn.functional.cross_entropy(logits, targets)


def _index_of(loader: Any) -> SampleIndex:
    if isinstance(loader, (TrackedDataset, TrackedIterable)):
        raise DataError("this is the tracked data set itself: make a DataLoader of it, and give that")
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and not isinstance(dataset, TrackedDataset):
        dataset = getattr(dataset, "dataset", None)  # of a Subset, say
    if dataset is None:
        raise DataError(
            "the loader's data set does not say which sample is which: make the loader of prunewise.track(dataset)"
        )
    return dataset.index


class _Labels:
    """The class of every sample, as far as it was seen; none where targets are no classes."""

    def __init__(self, n: int) -> None:
        self.values: Tensor | None = torch.full((n,), -1)

    def note(self, ids: Any, targets: Any) -> None:
        if self.values is None or not _are_classes(ids, targets):
            self.values = None
            return
        self.values = self.values.to(targets.device)
        self.values[ids.to(targets.device)] = targets.long()

    def all(self) -> Any:
        """The N labels; None where they are not all known."""
        return None if self.values is None or bool((self.values < 0).any()) else self.values.cpu().numpy()


def _are_classes(ids: Any, targets: Any) -> bool:
    plain = isinstance(ids, Tensor) and isinstance(targets, Tensor)
    return plain and targets.dim() == 1 and not targets.is_floating_point()


@dataclass
class _Run:
    """What a run consists of, and the folder it goes on from; None: it keeps nothing."""

    folder: Path | None
    settings: dict[str, Any]
    network: nn.Module
    optimizer: torch.optim.Optimizer
    recorder: LearnabilityRecorder
    labels: _Labels

    def __post_init__(self) -> None:
        self._start = digest_of(self.network) if self.folder is not None else ""

    def save(self, epoch: int) -> None:
        """After `epoch` epochs."""
        if self.folder is not None:
            save_state(self.folder, _STATE, {
                "settings": self.settings, "start": self._start, "epoch": epoch, "model": state_of(self.network),
                "optimizer": self.optimizer.state_dict(), "recorder": self.recorder.state_dict(), "labels": self.labels.values,
            })  # fmt: skip

    def resume(self, loader: Iterable[Any], device: torch.device) -> int:
        """Take up what lies in the folder; the number of epochs done."""
        state = None if self.folder is None else load_state(self.folder, _STATE)
        if self.folder is None or state is None:
            return 0
        with reading(self.folder):
            require_same(self.settings, state["settings"], self.folder)
            require_fitting(self.network, state["model"], self.folder)
            start, epoch, labels = str(state["start"]), int(state["epoch"]), state["labels"]
        with own_randomness(device, loader):
            _require_same_labels(labels, first_batch(loader), self.folder)
        with reading(self.folder):
            self.recorder.load_state_dict(state["recorder"])
            self.optimizer.load_state_dict(state["optimizer"])
            fill(self.network, state["model"])
            self.labels.values = labels
        warn_of_other_weights(start, self._start, self.folder, stacklevel=4)
        self._start = start
        return epoch


def _require_same_labels(known: Tensor | None, batch: Any, folder: Path) -> None:
    """Raise where samples of a batch have other labels than the run saw. One batch: a pass over the data may take long."""
    ids, _, targets = split_batch(batch)
    if known is None or not _are_classes(ids, targets):
        return
    before = known[ids.cpu()]
    other = ((before >= 0) & (before != targets.cpu())).nonzero()
    if len(other):
        i = int(other[0])
        raise CheckpointError(
            f"{folder} holds a run on other data: sample {ids[i].item()} had label {before[i].item()} there and has "
            f"{targets[i].item()} here. Name another folder, or delete this one, to start anew"
        )
