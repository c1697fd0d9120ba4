"""The methods that cifar.py compares: each says what happens before, during and after the shared fine-tuning."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import peers
from data import Images
from torch import Tensor, nn
from training import Trainer, predictions

import prunewise as pw

INNER = "layer*.conv1"  # the groups inside the residual blocks
CHECKED = 2_000  # training images on which removal must not change a prediction


@dataclass
class Job:
    """What a method is given."""

    model: nn.Module  # the trained network
    example: Tensor
    images: Images  # training images
    trainer: Trainer
    budget: float
    inner_only: bool
    seed: int
    keep_gates: bool
    tp_reg: float
    notes: dict[str, Any] = field(default_factory=dict)  # goes into the record

    @property
    def include(self) -> str | None:
        return INNER if self.inner_only else None

    @property
    def limit(self) -> float:
        """The most MACs that a result may cost."""
        return self.budget * pw.measure(self.model, self.example).macs


class Method:
    """No pruning; the base of the others."""

    needs_torch_pruning = False
    surgery_s = 0  # what an epoch may take longer than its training, about

    def __init__(self, job: Job) -> None:
        self.job = job

    def phases(self, epochs: int) -> list[tuple[int, int]]:
        """Ranges of epochs, each with a learning-rate schedule of its own."""
        return [(0, epochs)]

    def start(self) -> None:
        """Hand a model to the trainer."""
        self.job.trainer.adopt(self.job.model)

    def train(self, epoch: int, phase: tuple[int, int]) -> dict[str, Any]:
        """One epoch."""
        return self.job.trainer.epoch(epoch, phase)

    def finish(self) -> nn.Module:
        """The final model."""
        return self.job.trainer.model

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the model's tensors and momenta."""
        return {}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Instead of `start`: hand the trainer a model that `tensors` fit into."""
        self.start()


class OneShot(Method):
    """`pw.plan_channels`, then fine-tuning."""

    importance, allocation = "magnitude", "uniform"

    def start(self) -> None:
        job = self.job
        options: dict[str, Any] = {"importance": self.importance, "allocation": self.allocation, "seed": job.seed}
        if self.importance in ("taylor", "hybrid"):
            options["data"] = list(islice(job.images.augmented(64, job.seed, 0), 32))
        budget = pw.Budget(macs=job.budget)
        self._cut(pw.plan_channels(job.model, job.example, budget=budget, include=job.include, **options))

    def _cut(self, plan: pw.ChannelPlan) -> None:
        self.plan = plan
        self.job.trainer.adopt(pw.apply_plan(self.job.model, plan, self.job.example))

    def state(self) -> dict[str, Any]:
        return {"plan": json.dumps(self.plan.to_dict())}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._cut(pw.ChannelPlan.from_dict(json.loads(state["plan"])))


class TaylorGlobal(OneShot):
    importance, allocation = "taylor", "global"


class HybridGlobal(OneShot):
    importance, allocation = "hybrid", "global"


class RandomUniform(OneShot):
    importance = "random"


class TrainedGates(Method):
    """`pw.attach_gates`. Once all gates have settled, the closed channels are removed for good at the end of the epoch: the
    function stays the same, and the rest of the training is faster (`--keep-gates` leaves them on to the end)."""

    control = "fisher"
    small: nn.Module | None = None

    def start(self) -> None:
        self._attach()

    def _attach(self) -> None:
        job = self.job
        trainer = job.trainer
        self.gates = pw.attach_gates(
            job.model,
            job.example,
            budget=pw.Budget(macs=job.budget),
            total_steps=trainer.settings.epochs * trainer.steps_per_epoch,
            include=job.include,
            control=self.control,  # type: ignore[arg-type]
        )
        trainer.adopt(job.model, skip=tuple(self.gates.parameters()))

    def train(self, epoch: int, phase: tuple[int, int]) -> dict[str, Any]:
        trainer = self.job.trainer
        if self.small is not None:
            return trainer.epoch(epoch, phase)
        row = trainer.epoch(epoch, phase, extra=self.gates.penalty, after_step=lambda optimizer: self.gates.step())
        row["macs"] = self.gates.cost().macs
        settled = self.gates.control.frozen  # not public; without it, `--keep-gates` does the same, slower
        if settled and not self.job.keep_gates and epoch + 1 < phase[1]:
            optimizer = trainer.optimizer
            gated = trainer.model
            small = self._remove(epoch)
            pw.migrate_optimizer(optimizer, gated, small, self.gates.plan, self.job.example)
            trainer.adopt(small, optimizer=optimizer)
        return row

    def _remove(self, epoch: int) -> nn.Module:
        job = self.job
        self.gates.harden()
        before = predictions(job.trainer.model, job.images, CHECKED)
        self.small = self.gates.finish()
        after = predictions(self.small, job.images, CHECKED)
        labels = job.images.labels[: len(before)]
        job.notes["removal"] = {
            "after_epoch": epoch + 1,
            "images": len(before),
            "right_gated": int((before == labels).sum()),
            "right_small": int((after == labels).sum()),
            "predictions_changed": int((before != after).sum()),
        }
        return self.small

    def finish(self) -> nn.Module:
        if self.small is None:
            self._remove(self.job.trainer.settings.epochs - 1)
            return self.small
        return self.job.trainer.model

    def state(self) -> dict[str, Any]:
        if self.small is None:
            return {"gates": self.gates.state_dict()}
        return {"plan": json.dumps(self.gates.plan.to_dict())}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if "gates" in state:
            self._attach()
            self.gates.load_state_dict(state["gates"])
            return
        plan = pw.ChannelPlan.from_dict(json.loads(state["plan"]))
        self.small = pw.apply_plan(self.job.model, plan, self.job.example)
        self.gates = _Ended(plan)
        self.job.trainer.adopt(self.small)


class DescendedGates(TrainedGates):
    """The same with gates that move by plain gradient descent, as in the paper."""

    control = "descent"


@dataclass
class _Ended:
    """What is left of a gate session after a restart."""

    plan: pw.ChannelPlan


class TPMagnitude(Method):
    """Torch-Pruning's magnitude pruner, the same share of every layer, then fine-tuning."""

    needs_torch_pruning = True
    global_pruning = False

    def start(self) -> None:
        small, notes = peers.magnitude(
            self.job.model, self.job.example, self.job.limit, global_pruning=self.global_pruning
        )
        self.job.notes.update(notes)
        self.job.trainer.adopt(small)

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        peers.fit_shapes(self.job.model, tensors)
        self.job.trainer.adopt(self.job.model)


class TPMagnitudeGlobal(TPMagnitude):
    """The same, ranked through the whole network."""

    global_pruning = True


class TPGroupNorm(Method):
    """Torch-Pruning's group sparsity: half of the epochs with its regulariser, pruning, half of fine-tuning; each half with its
    own learning-rate schedule, as published."""

    needs_torch_pruning = True
    surgery_s = 60
    pruned = False

    def phases(self, epochs: int) -> list[tuple[int, int]]:
        half = max(1, epochs // 2)
        return [(0, half), (half, epochs)] if epochs > 1 else [(0, 1)]

    def start(self) -> None:
        self.limit = self.job.limit
        self.sparsity = peers.GroupSparsity(self.job.model, self.job.example, self.job.tp_reg)
        self.job.notes["reg"] = self.job.tp_reg
        self.job.trainer.adopt(self.job.model)

    def train(self, epoch: int, phase: tuple[int, int]) -> dict[str, Any]:
        trainer = self.job.trainer
        if phase[0] > 0:
            return trainer.epoch(epoch, phase)
        row = trainer.epoch(epoch, phase, weight_decay=0.0, before_step=self.sparsity.regularize)
        if epoch + 1 == phase[1]:
            self.sparsity.prune(self.limit)
            self.pruned = True
            trainer.adopt(trainer.model)
        return row

    def state(self) -> dict[str, Any]:
        return {"pruned": self.pruned}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if not state["pruned"]:
            self.start()
            return
        self.pruned = True
        peers.fit_shapes(self.job.model, tensors)
        self.job.trainer.adopt(self.job.model)


METHODS: dict[str, type[Method]] = {
    "gates": TrainedGates,
    "gates_descent": DescendedGates,
    "l1_uniform": OneShot,
    "taylor_global": TaylorGlobal,
    "hybrid_global": HybridGlobal,
    "random_uniform": RandomUniform,
    "tp_magnitude": TPMagnitude,
    "tp_magnitude_global": TPMagnitudeGlobal,
    "tp_group_norm": TPGroupNorm,
    "dense": Method,
}
