"""The training inside `compress`: loss and metric, the loop, and its checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunewise._loops import (
    Steps,
    fill,
    finite,
    reading,
    require_fitting,
    require_same,
    seed_epoch,
    set_rates,
    state_of,
)
from prunewise._progress import Progress, progress
from prunewise._state import load_state, rng_state, save_state, set_rng_state
from prunewise.channels.session import GateSession
from prunewise.core.batch import Loss, inputs_of, moved, one_number
from prunewise.core.errors import DataError, NonFiniteError
from prunewise.core.plan import ChannelPlan
from prunewise.core.trace import as_call
from prunewise.core.untouched import modes_kept

_STATE = "run"

Metric = Callable[[nn.Module, Iterable[Any]], float]


@dataclass(frozen=True)
class HistoryRow:
    """One epoch: mean training loss, metric on `val_loader` (None without one), share of the MACs still open, last rate."""

    epoch: int
    loss: float
    metric: float | None
    macs_share: float
    lr: float


@dataclass(frozen=True)
class Score:
    """A metric on `val_loader`; for accuracy (in [0, 1], higher is better) also how many predictions were right, of how many."""

    value: float
    correct: int | None = None
    total: int | None = None


# -- what is trained for ------------------------------------------------------------------------------------------


class Task:
    """Loss and metric of a model on batches."""

    def __init__(
        self, device: torch.device, loss: Loss | None, metric: Metric | None, loader: Iterable[Any] | None, amp: bool
    ) -> None:
        self.device, self._loss, self._metric, self._loader, self._amp = device, loss, metric, loader, amp
        self._counts_hits = loss is None or isinstance(loss, nn.CrossEntropyLoss)
        self.metric_name = "accuracy" if self._counts_hits else "loss"
        if metric is not None:
            self.metric_name = getattr(metric, "__name__", type(metric).__name__)
        if isinstance(loss, nn.Module):
            self._loss = copy.deepcopy(loss).to(device)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        batch = moved(batch, self.device)
        value: Any
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._amp):
            if self._loss is not None and not isinstance(self._loss, nn.Module):
                value = self._loss(model, batch)
            elif isinstance(batch, Mapping) and self._loss is None:
                out = model(**batch)
                value = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
                if value is None:
                    raise DataError(
                        "the model returns no 'loss' for a batch that is a dict: give loss=, a callable of (model, batch)"
                    )
            else:
                value = self._criterion(*self._run(model, batch))
        return one_number(value)

    def score(self, model: nn.Module) -> Score | None:
        """The metric on the validation data, in eval mode."""
        if self._loader is None:
            return None
        with modes_kept(model), torch.no_grad():
            model.eval()
            if self._metric is not None:
                return Score(float(self._metric(model, self._loader)))
            return self._default_score(model, self._loader)

    def _default_score(self, model: nn.Module, loader: Iterable[Any]) -> Score | None:
        correct, total, summed, batches = 0, 0, 0.0, 0
        for batch in loader:
            batches += 1
            if not self._counts_hits or isinstance(batch, Mapping):
                self.metric_name = "loss"
                summed += float(self.loss(model, batch))
                continue
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._amp):
                outputs, targets = self._run(model, moved(batch, self.device))
            if targets.is_floating_point() and targets.shape == outputs.shape:  # class probabilities
                targets = targets.argmax(1)
            correct += int((outputs.argmax(1) == targets).sum())
            total += targets.numel()
        if not batches:
            raise DataError("val_loader is empty: give one with batches, or none")
        return Score(correct / total, correct, total) if total else Score(summed / batches)

    def _criterion(self, outputs: Tensor, targets: Any) -> Tensor:
        if isinstance(self._loss, nn.Module):
            return self._loss(outputs, targets)  # type: ignore[no-any-return]
        return nn.functional.cross_entropy(outputs, targets)

    def _run(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise DataError(
                f"a batch is a {type(batch).__name__}, and not (inputs, targets): give loss=, a callable of (model, batch)"
            )
        args, kwargs = as_call(inputs_of(batch))
        outputs = model(*args, **kwargs)
        if self._loss is None and not isinstance(outputs, Tensor):
            raise DataError(f"the model returns a {type(outputs).__name__}: give loss=, a callable of (model, batch)")
        return outputs, batch[-1]


# -- training -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training that can be stopped at any step and gone on with."""

    network: nn.Module
    session: GateSession | None
    plan: ChannelPlan | None
    task: Task
    loader: Iterable[Any]
    epochs: int
    steps: Steps
    seed: int
    lr_schedule: Callable[[float], float]

    def __post_init__(self) -> None:
        self.optimizer: torch.optim.Optimizer = None  # type: ignore[assignment]
        self.base_rates: list[float] = []
        self.history: list[HistoryRow] = []
        self.original: Score | None = None
        self.gated: Score | None = None
        self.resumed = False
        self.start = ""  # which weights the run began with
        self._epoch, self._step, self._loss_sum = 0, 0, 0.0
        self._rng: dict[str, Any] | None = None
        self._folder: Path | None = None
        self._every: int | None = None
        self._settings: dict[str, Any] = {}

    def train(self, shown: bool) -> None:
        """From where it stands to the last epoch."""
        with progress(shown, self.steps.total) as display:
            if self.resumed:
                display.line(f"resumed after {self._epoch} epochs and {self._step} steps")
            while self._epoch < self.epochs:
                self._train_epoch(display)

    def _train_epoch(self, display: Progress) -> None:
        seed_epoch(self.loader, self.seed, self._epoch)
        self.network.train()
        batches = iter(self.loader)
        for _ in range(self._step):
            next(batches, None)
        if self._rng is not None:
            set_rng_state(self._rng, self.task.device)
            self._rng = None
        for batch in batches:
            self._one_step(batch)
            display.step(self.steps.before(self._epoch) + self._step)
            if self._step == self.steps.of[self._epoch]:
                break
            if self._every and self._step % self._every == 0:
                self._save()
        if not self._step:
            raise DataError("train_loader gave no batch in an epoch: it should give the same number every time")
        score = self.task.score(self.network)
        lr = float(self.optimizer.param_groups[0]["lr"])
        metric = None if score is None else score.value
        self.history.append(HistoryRow(self._epoch + 1, self._loss_sum / self._step, metric, self._macs_share(), lr))
        self._epoch, self._step, self._loss_sum = self._epoch + 1, 0, 0.0
        self._save()
        display.line(self._line(self.history[-1]))

    def _one_step(self, batch: Any) -> None:
        set_rates(self.optimizer, self.base_rates, self.lr_schedule, self.steps.share(self._epoch, self._step))
        loss = self.task.loss(self.network, batch)
        value = finite(loss, self._epoch, self._step)
        if self.session is not None:
            loss = loss + self.session.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.session is not None:
            self.session.step(self.optimizer)
        self._loss_sum += value
        self._step += 1

    def _macs_share(self) -> float:
        if self.session is not None:
            before, after = self.session.control.full, self.session.cost().as_dict()
        else:
            assert self.plan is not None
            before, after = dict(self.plan.cost_before), dict(self.plan.cost_after)
        return after["macs"] / before["macs"] if before.get("macs") else 1.0

    def _line(self, row: HistoryRow) -> str:
        metric = "" if row.metric is None else f"  {self.task.metric_name} {row.metric:.4f}"
        return f"epoch {row.epoch}/{self.epochs}  loss {row.loss:.4f}{metric}  MACs {100 * row.macs_share:.1f} %  lr {row.lr:.2g}"

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def keep_in(self, folder: Path, every: int | None, settings: dict[str, Any]) -> None:
        """Save to `folder` from now on, and take up what lies there.

        Raises:
            CheckpointError: that is another run's.
        """
        groups = [] if self.session is None else [[g.name, g.size] for g in self.session.groups]
        limits = (
            [] if self.session is None else [self.session.control.limits.min_keep, self.session.control.limits.round_to]
        )
        self._folder, self._every = folder, every
        self._settings = {
            **settings, "epochs": self.epochs, "steps": self.steps.of, "seed": self.seed, "groups": groups, "limits": limits,
            "optimizer": type(self.optimizer).__qualname__, "rates": self.base_rates,
            "channels": None if self.plan is None else {n: list(k) for n, k in self.plan.keep.items()},
        }  # fmt: skip
        state = load_state(folder, _STATE)
        if state is not None:
            with reading(folder):
                self._restore(state, folder)

    def _save(self) -> None:
        if self._folder is None:
            return
        tensors = state_of(self.network)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"{name} is not finite any more: lower the learning rate. The checkpoint before is kept"
                )
        state = {
            "settings": self._settings,
            "start": self.start,
            "epoch": self._epoch,
            "step": self._step,
            "loss_sum": self._loss_sum,
            "history": [asdict(row) for row in self.history],
            "scores": [None if s is None else asdict(s) for s in (self.original, self.gated)],
            "metric_name": self.task.metric_name,
            "model": tensors,
            "optimizer": self.optimizer.state_dict(),
            "gates": None if self.session is None else self.session.state_dict(),
            "rng": rng_state(self.task.device) if self._step else None,
        }
        save_state(self._folder, _STATE, state)

    def _restore(self, state: Any, folder: Path) -> None:
        require_same(self._settings, state["settings"], folder)
        if self.session is not None:  # first: it shrinks the network to what was saved
            self.session.load_state_dict(state["gates"], self.optimizer)
        require_fitting(self.network, state["model"], folder)
        history = [HistoryRow(**row) for row in state["history"]]
        scores = [None if s is None else Score(**s) for s in state["scores"]]
        start = str(state["start"])
        epoch, step, loss_sum = int(state["epoch"]), int(state["step"]), float(state["loss_sum"])
        self.optimizer.load_state_dict(state["optimizer"])
        fill(self.network, state["model"])
        self.original, self.gated = scores
        self.start = start
        self.history, self._epoch, self._step, self._loss_sum = history, epoch, step, loss_sum
        self.task.metric_name, self._rng, self.resumed = state["metric_name"], state["rng"], True
