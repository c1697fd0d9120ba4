"""Hits and misses of every training sample, recorded in the user's own loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.core.checks import is_count
from prunewise.core.errors import CheckpointError, DataError
from prunewise.samples.checking import (
    KIND,
    VERSION,
    as_device,
    bad_labels,
    check_ids,
    check_labels,
    checked_state,
    kind_of,
    numbers_of,
    require,
    require_values,
    warn_caller,
)
from prunewise.samples.ids import SampleIndex
from prunewise.samples.merging import is_distributed, max_over_ranks, merge_states, range_over_ranks, sum_over_ranks
from prunewise.samples.observing import REASONS, TASKS, class_dims, observe, resolve_task
from prunewise.samples.passes import record_pass
from prunewise.samples.scores import SampleScores, from_state
from prunewise.samples.state import OBSERVATIONS, State, accumulate
from prunewise.samples.window import Batch, Window, rounds

if TYPE_CHECKING:
    import torch.distributed as dist

MODES = ("train", "clean")
_MIXED = REASONS.index("mixed")
_BATCHES = len(REASONS)  # of the tally: batches refused, bad ids, bad labels stand after the reasons


class LearnabilityRecorder:
    """Aggregates what each forward pass says of each sample: one `update` a batch, `scores` at the end.

    The learnability of a sample is hits / observations over the whole training, in [0, 1], higher = easier (arXiv 1901.02347).
    The same update keeps what forgetting events, AUM, EL2N, data maps and mean loss need: see `SampleScores`, which
    defines each. 40 bytes a sample, on the device of the first logits.

    `update` never waits for a GPU and never talks to other ranks. So on a GPU bad ids and labels are found later: their batch is
    left out as a whole, and `scores` and `reduce` say so. On the CPU they are an error at once.
    Batches of class numbers wait, some thirty together, until they are worked out. On the CPU no bit depends on that; on a GPU the
    last bit of a mean may, where one sample comes twice within that time. Devices without float64 (MPS) are not supported: give
    `logits.cpu()`.

    An observation is one sample in one batch; it is not counted (see `not_counted`) where its logits hold NaN, +inf or
    nothing but -inf; where its label is `ignore_index`; where a soft label has two peaks (mixup, CutMix: the input is no
    sample; of two classes, where the second has more than 0.2); where a soft label has no highest class. With gradient
    accumulation, update once for each forward pass.

    Tasks, told by the shapes of logits and targets unless `task` says otherwise:
        multiclass: (B, K) with (B,) class numbers, or (B, K) floats: one-hot, smoothed, or (with `soft_labels`) any
            distribution, whose highest class is the label.
        binary: (B,) or (B, 1) with (B,) labels 0 and 1; one logit z counts as the two logits (0, z).
        multilabel (always say so): (B, K) both, 0 and 1. A hit has all labels right; margins are those of the worst label.
        tokens: (B, T, K), or (B, K, T...) as `cross_entropy` has it, with (B, T...) labels. One observation a sample: a hit
            has at least `hit_share` of its tokens right that are not `ignore_index`; values are means over them.

    A tie for the highest logit is a miss: the model has not decided.

    Counts of observations and hits are 32 bits wide. Forgetting events, the first hit's number and the length of the last
    run of hits stop at 32,767. Means are 32-bit floats that are rounded so that they hold over 10⁸ observations (relative
    error about 10⁻⁴ there, 10⁻⁶ over a thousand).

    Args:
        n: number of samples, N.
        task: "auto", "multiclass", "binary", "multilabel" or "tokens".
        mode: "train" (hits of the training passes, augmented and for free) or "clean" (of passes of their own: `clean_pass`).
            Only written beside the scores, since the two are not comparable.
        el2n_window: EL2N is the mean over this many first observations of a sample.
        ignore_index: the label of what is not to be counted.
        soft_labels: take any distribution as a label.
        hit_share: share of right tokens that makes a hit, in (0, 1].
        class_dim: of token logits, the dimension of the classes: -1 or 1. None: told by the shapes; a batch with as many tokens as
            classes tells nothing, and follows the batches before it.
        trace: also keep the first `trace` observations of each sample: one bit each (hit or miss).
        trace_margins: and their logit margins in half precision, 2 bytes each.
        ids: the samples' own ids (`track(...).index`, or N ints or strings); the scores carry them, and `update` takes them.
        device: where the state lies; default: where the first logits are.

    Raises:
        DataError: a setting is out of range.

    Example:
        >>> recorder = LearnabilityRecorder(3)
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> recorder.update(torch.tensor([2, 0]), logits, torch.tensor([0, 0]))
        >>> recorder.update(torch.tensor([0]), logits[:1], torch.tensor([0]))
        >>> recorder.scores().learnability  # sample 1 was never seen
        array([0.5, nan, 1. ])
    """

    def __init__(
        self,
        n: int,
        *,
        task: str = "auto",
        mode: str = "train",
        el2n_window: int = 10,
        ignore_index: int = -100,
        soft_labels: bool = False,
        hit_share: float = 0.5,
        class_dim: int | None = None,
        trace: int = 0,
        trace_margins: bool = False,
        ids: Sequence[Any] | SampleIndex | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        require(is_count(n) and 1 <= n < 1 << 31, f"n={n!r} should be the number of samples, an int of at least 1")
        require(task in TASKS, f"task={task!r} should be one of {', '.join(TASKS)}")
        require(mode in MODES, f"mode={mode!r} should be 'train' or 'clean'")
        require(is_count(el2n_window) and el2n_window >= 1, f"el2n_window={el2n_window!r} should be an int ≥ 1")
        require(is_count(ignore_index, -(1 << 62)), f"ignore_index={ignore_index!r} should be an int")
        share = isinstance(hit_share, (int, float)) and not isinstance(hit_share, bool) and 0 < hit_share <= 1
        require(share, f"hit_share={hit_share!r} should be a share in (0, 1]")
        require(class_dim in (None, -1, 1), f"class_dim={class_dim!r} should be -1, 1 or None")
        require(is_count(trace) and trace < _TRACE_MAX, f"trace={trace!r} should be an int in [0, {_TRACE_MAX})")
        require(trace > 0 or not trace_margins, "trace_margins=True needs trace=: how many observations to keep")
        self.index = SampleIndex(n) if ids is None else ids if isinstance(ids, SampleIndex) else SampleIndex(ids)
        require(len(self.index) == n, f"{len(self.index):,} ids for n={n:,} samples")
        self.num_samples, self.mode = int(n), mode
        self.num_classes: int | None = None
        self._task, self._trace, self._trace_margins = task, int(trace), bool(trace_margins)
        self._el2n_window, self._ignore_index = int(el2n_window), int(ignore_index)
        self._soft_labels, self._hit_share = bool(soft_labels), float(hit_share)
        self._class_dim = class_dim
        self._asked = task, class_dim  # the other two follow the batches where these leave it open
        self._window = Window()
        self._state: State | None = None
        self._tally: Tensor | None = None
        self._extent: Tensor | None = None  # -least and highest logit: both are maxima
        self._merged_tally = [0] * (len(REASONS) + 3)
        if device is not None:
            self._allocate(as_device(device))

    # -- recording ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(
        self, sample_ids: Tensor | Sequence[Any], logits: Tensor, targets: Tensor, *, mixed: Tensor | bool = False
    ) -> None:
        """Record one batch.

        Args:
            sample_ids: a tensor: (B,) ints in [0, N), the numbers that `track` puts into the samples. A list, tuple or array: with
                `ids`, the samples' own ids; without, numbers as well.
            logits, targets: see the class. Half-precision logits are taken as they are; gradients are not touched.
            mixed: True, or (B,) bool: these inputs are mixtures of several samples (mixup, CutMix) and are not counted.

        Raises:
            DataError: shapes do not fit the task, which must stay the same, as must the number of classes; on the CPU also: an
                id out of range, a label that is no class. Nothing of the batch is recorded then.
        """
        for name, value in (("logits", logits), ("targets", targets)):
            if not isinstance(value, Tensor):
                raise DataError(
                    f"update takes the {name} as a tensor; got {kind_of(value)} (targets are class numbers from 0)"
                )
        if self._state is None or not self._state.counts.is_meta:
            require_values(logits=logits, targets=targets, sample_ids=sample_ids, mixed=mixed)
        task = resolve_task(self._task, logits, targets)
        class_dim = self.class_dim_of(logits, targets) if task == "tokens" else -1
        classes = _classes(task, logits, class_dim)
        if self.num_classes is not None and classes != self.num_classes:
            raise DataError(
                f"logits of {classes} classes, after {self.num_classes} in earlier batches: one recorder, one set of classes"
            )
        ids = numbers_of(sample_ids, len(logits), self.index)
        at_once = not torch.compiler.is_compiling()
        if at_once and ids.device.type == "cpu":
            check_ids(ids, self.num_samples)
        if at_once and targets.device.type == "cpu":
            check_labels(task, targets, classes, self._ignore_index)
        mixed = _mixture(mixed, ids)
        if not len(logits):
            return
        self._allocate(logits.device)
        if at_once and task == "multiclass" and targets.ndim == 1:
            if not self._window.has_room(ids, logits, targets):
                self._flush()
            if self._window.has_room(ids, logits, targets):
                self._window.add(ids, logits, targets, mixed)
                self._task, self.num_classes = task, classes
                return
        self._flush()
        self._record(task, Batch(ids, logits, targets, mixed, None), at_once, class_dim)
        self._task, self.num_classes = task, classes
        if task == "tokens":
            self._class_dim = class_dim

    def clean_pass(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        forward: Callable[[nn.Module, Any], tuple[Any, Tensor, Tensor]] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """One pass of its own over the samples, in eval mode and without gradients; the modes are put back after it.

        Args:
            model: left as it was.
            loader: batches (inputs, targets, sample ids) of a tracked data set without augmentation; or dicts with
                `labels` (or `targets`, `label`) and `sample_id`, whose other entries are the model's keywords.
            forward: called with (model, batch) for batches of any other form; returns (sample ids, logits, targets).
            device: where batches are moved; default: where the model's parameters are.

        Raises:
            DataError: the recorder is in mode "train", or a batch has another form.
        """
        require(
            self.mode == "clean",
            "this recorder is for training passes, which a clean pass would mix with: make one with mode='clean'",
        )
        record_pass(self, model, loader, forward, device)

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """At the end of an epoch, on all ranks: every rank gets what all have recorded. Alone, it only checks.

        Equal to the recorder of a single process that saw each sample once an epoch. A sample that several ranks observed
        since the last call (a distributed sampler repeats some, to fill up) is counted on one of them only.

        Raises:
            DataError: on all ranks, where any rank met bad ids or labels; merged all the same. Where ranks recorded different
                tasks, or logits of different numbers of classes; nothing is merged then.
        """
        self._flush()
        if is_distributed():
            state, tally, extent = self._allocate(_default_device(group))
            self._agree_on_task(tally.device, group)
            merge_states(state, group)
            max_over_ranks(extent, group)
            total = sum_over_ranks(tally, group).tolist()
            self._merged_tally = [a + b for a, b in zip(self._merged_tally, total, strict=True)]
            tally.zero_()
        self._raise_deferred()

    # -- what was recorded ----------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the state: 40 a sample, and the trace. At most 4,096 observations and 8 MiB wait besides to be added."""
        return sum(t.nbytes for t in self._state.tensors().values()) if self._state is not None else 0

    @property
    def not_counted(self) -> dict[str, int]:
        """How many observations were not counted, by reason. Waits for the device."""
        tally = self._whole_tally()
        return dict(zip(REASONS, tally, strict=False))

    def scores(self, targets: Any = None, *, model: str | None = None, seed: int | None = None) -> SampleScores:
        """The scores of all N samples so far. Waits for the device; in a distributed run call `reduce` first.

        Args:
            targets: the N labels in the order of the sample numbers; only their hash is kept, by which scores of another data
                set are told.
            model, seed: written beside the scores.

        Raises:
            DataError: nothing was recorded yet; batches were left out for bad ids or labels (said once: a second call gives the
                scores without them); `targets` are not the labels that were recorded, as far as that shows.

        Warns:
            UserWarning: the logits look like probabilities.
        """
        self._raise_deferred()
        if self._state is None or not bool((self._state.counts[:, OBSERVATIONS] > 0).any()):
            raise DataError(
                f"the recorder has counted no observation ({_reasons(self.not_counted)}): call update(sample_ids, logits, "
                "targets) in the training loop"
            )
        info = {
            "mode": self.mode, "task": self._task, "num_classes": self.num_classes, "el2n_window": self._el2n_window,
            "not_counted": self.not_counted, "model": model, "seed": seed,
            "ids": "numbers" if self.index.is_dense else "own", "total": self.num_samples,
        }  # fmt: skip
        low, high = self._logit_range()
        if low >= 0 and high <= 1 and int(self._state.counts[:, OBSERVATIONS].sum()) >= _ENOUGH:
            warn_caller(
                f"all logits lay in [0, 1] (from {low:.3g} to {high:.3g}), as probabilities do: give update() the model's raw "
                "outputs, from before its sigmoid or softmax. With probabilities the scores mean little"
            )
        return from_state(self._state, self.index, info, targets)

    def trace(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float16] | None]:
        """The first observations: hits (N, E) bool, and margins (N, E) float16 or None. Beyond a sample's observations: False, 0.

        Raises:
            DataError: the recorder was made without `trace`.
        """
        require(
            self._trace > 0, "this recorder keeps no trace: make it with trace=, the number of observations to keep"
        )
        self._flush()
        if self._state is None:
            margins = np.zeros((self.num_samples, self._trace), np.float16) if self._trace_margins else None
            return np.zeros((self.num_samples, self._trace), bool), margins
        assert self._state.bits is not None
        bits = np.unpackbits(self._state.bits.cpu().numpy(), axis=1, count=self._trace, bitorder="little")
        return bits.astype(bool), None if self._state.margins is None else self._state.margins.cpu().numpy()

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that was recorded, as tensors on the CPU and plain values; `load_state_dict` resumes to the bit."""
        self._flush()
        tensors = {} if self._state is None else self._state.tensors()
        return {
            "kind": KIND,
            "version": VERSION,
            "config": self._config(),
            "task": self._task,
            "num_classes": self.num_classes,
            "class_dim": self._class_dim,
            "tally": [0] * len(self._merged_tally) if self._tally is None else self._tally.tolist(),
            "merged_tally": list(self._merged_tally),
            "logit_range": self._logit_range(),
            "tensors": {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state; what was recorded here before is replaced.

        Raises:
            CheckpointError: the state is damaged, of another version, or of a recorder with other settings or samples.
                Nothing is changed then.
        """
        saved = checked_state(state_dict, self._config(), len(self._merged_tally))
        for name, asked, open_ in (("task", self._asked[0], "auto"), ("class_dim", self._asked[1], None)):
            if open_ not in (asked, saved[name]) and asked != saved[name]:
                raise CheckpointError(f"the state is of {name}={saved[name]!r}, this recorder of {name}={asked!r}")
        tensors, tally = saved["tensors"], saved["tally"]
        device = self._state.counts.device if self._state is not None else None
        self._window, self._state, self._tally, self._extent = Window(), None, None, None
        if tensors:
            with torch.inference_mode(False):
                loaded = {n: t.detach().to(device or t.device, copy=True) for n, t in tensors.items()}
                self._state = State(**loaded)
                self._tally = torch.tensor(tally, dtype=torch.int64, device=self._state.counts.device)
                low, high = saved["logit_range"]
                self._extent = torch.tensor([-low, high], dtype=torch.float64, device=self._state.counts.device)
        self._merged_tally, self.num_classes = list(saved["merged_tally"]), saved["num_classes"]
        task, class_dim = self._asked
        self._task = saved["task"] if task == "auto" else task
        self._class_dim = saved["class_dim"] if class_dim is None else class_dim

    def to(self, device: torch.device | str) -> LearnabilityRecorder:
        """Move the state to a device, in place; after loading a state, which lies on the CPU, say."""
        self._flush()
        device = as_device(device)
        if self._state is None:
            self._allocate(device)
            return self
        assert self._tally is not None and self._extent is not None
        with torch.inference_mode(False):
            self._state = State(**{n: t.to(device) for n, t in self._state.tensors().items()})
            self._tally, self._extent = self._tally.to(device), self._extent.to(device)
        return self

    # -- inside ---------------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        return {
            "n": self.num_samples, "mode": self.mode, "el2n_window": self._el2n_window, "ignore_index": self._ignore_index,
            "soft_labels": self._soft_labels, "hit_share": self._hit_share, "trace": self._trace,
            "trace_margins": self._trace_margins, "ids": None if self.index.is_dense else self.index.hash(),
        }  # fmt: skip

    def _allocate(self, device: torch.device) -> tuple[State, Tensor, Tensor]:
        if self._state is None or self._tally is None or self._extent is None:
            with torch.inference_mode(False):  # what is made under it cannot be written to outside
                self._state = State.empty(self.num_samples, device, self._trace, self._trace_margins)
                self._tally = torch.zeros(len(REASONS) + 3, dtype=torch.int64, device=device)
                self._extent = torch.full((2,), -math.inf, dtype=torch.float64, device=device)
        return self._state, self._tally, self._extent

    def _agree_on_task(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """A rank that saw nothing takes over what the others recorded; `DataError` where they differ."""
        open_, dims = -1, (-1, 1)
        mine = [
            open_ if self._task == "auto" else TASKS.index(self._task),
            open_ if self.num_classes is None else self.num_classes,
            open_ if self._class_dim is None else dims.index(self._class_dim),
        ]
        least, most = range_over_ranks(torch.tensor(mine, device=device), open_, group)
        for name, low, high in zip(("tasks", "numbers of classes", "class_dim"), least, most, strict=True):
            shown = (TASKS[low], TASKS[high]) if name == "tasks" else (low, high)
            require(
                low == high, f"the ranks recorded different {name} ({shown[0]} and {shown[1]}): give all the same model"
            )
        task, classes, dim = most
        self._task = "auto" if task == open_ else TASKS[task]
        self.num_classes = None if classes == open_ else classes
        self._class_dim = None if dim == open_ else dims[dim]

    def _flush(self) -> None:
        """Record the batches that wait."""
        if len(self._window):
            self._record("multiclass", self._window.take(), True)

    def class_dim_of(self, logits: Tensor, targets: Tensor) -> int:
        """Which dimension of token logits holds the classes, -1 or 1; `DataError` where nothing tells."""
        fitting = class_dims(logits, targets)
        if self._class_dim is not None:
            require(
                self._class_dim in fitting,
                f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not have the classes in dimension "
                f"{self._class_dim}, as class_dim= or the batches before say",
            )
            return self._class_dim
        require(
            len(fitting) == 1,
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}: the classes may be in the last dimension or in the "
            "second; say class_dim=-1 or class_dim=1",
        )
        return fitting[0]

    @torch.no_grad()
    def _record(self, task: str, given: Batch, at_once: bool, class_dim: int = -1) -> None:
        seen = observe(
            task, given.logits, given.targets,
            ignore_index=self._ignore_index, soft_labels=self._soft_labels, hit_share=self._hit_share, class_dim=class_dim,
        )  # fmt: skip
        device = given.logits.device
        on_cpu = at_once and device.type == "cpu"
        if on_cpu and bool(seen.bad.any()):
            raise DataError(bad_labels(seen.bad, given.targets, None, self._ignore_index))
        mixed = given.mixed
        is_mixed = (
            mixed.to(device, non_blocking=True) if isinstance(mixed, Tensor) else torch.full_like(seen.hit, mixed)
        )
        state, tally, extent = self._allocate(device)
        home = state.counts.device
        if home != device:
            seen = type(seen)(*(t.to(home, non_blocking=True) for t in seen))
            is_mixed = is_mixed.to(home, non_blocking=True)
        ends = torch.stack([-given.logits.amin(), given.logits.amax()]).double().to(home, non_blocking=True)
        extent.copy_(torch.fmax(extent, ends))  # passes over NaN
        ids = given.ids.to(home, non_blocking=True)
        batch = torch.zeros_like(ids) if given.batch is None else given.batch.to(home, non_blocking=True)
        outside = (ids < 0) | (ids >= self.num_samples)
        # a batch with a bad id or label is left out as a whole
        spoiled = torch.zeros(max(1, len(ids)), dtype=torch.long, device=home)
        spoiled = spoiled.index_add_(0, batch, (outside | seen.bad).long()) > 0
        fine = ~spoiled[batch]
        reasons = seen.reasons & (fine & ~is_mixed)[:, None]
        reasons[:, _MIXED] |= is_mixed & fine
        problems = torch.stack([spoiled.sum(), outside.sum(), seen.bad.sum()])
        seen = seen._replace(counted=seen.counted & ~is_mixed & fine)
        ids = ids.clamp(0, self.num_samples - 1)
        # Where looking costs nothing, each batch is recorded after the other: no rounding depends on how long it waited.
        turn = rounds(ids, batch) if on_cpu and given.batch is not None and home == device else None
        turns = 1 if turn is None else int(turn.max()) + 1
        for number in range(turns):
            if turn is None or turns == 1:
                accumulate(state, ids, seen, self._el2n_window, self._trace)
            else:
                chosen = turn == number
                part = type(seen)(*(t[chosen] for t in seen))
                accumulate(state, ids[chosen], part, self._el2n_window, self._trace)
        tally += torch.cat([reasons.sum(0), problems])

    def _logit_range(self) -> tuple[float, float]:
        """The least and the highest logit so far; (inf, -inf) where there was none."""
        if self._extent is None:
            return math.inf, -math.inf
        low, high = self._extent.tolist()
        return -low, high

    def _whole_tally(self) -> list[int]:
        self._flush()
        local = [0] * len(self._merged_tally) if self._tally is None else self._tally.tolist()
        return [a + b for a, b in zip(self._merged_tally, local, strict=True)]

    def _raise_deferred(self) -> None:
        """Raise once for the batches that were left out since the last time."""
        batches, ids, labels = self._whole_tally()[_BATCHES:]
        if not batches:
            return
        self._merged_tally[_BATCHES:] = [0, 0, 0]
        if self._tally is not None:
            self._tally[_BATCHES:] = 0
        raise DataError(
            f"{batches} batches were not recorded: {ids} sample ids were outside [0, {self.num_samples:,}), {labels} samples had "
            "labels that are no classes. Correct them and record again, or call again to go on without these batches"
        )


_TRACE_MAX = 1 << 16
_ENOUGH = 1000  # observations, by which the range of the logits is known


def _mixture(mixed: Any, ids: Tensor) -> Tensor | bool:
    if isinstance(mixed, bool):
        return mixed
    found = torch.as_tensor(mixed) if isinstance(mixed, (list, tuple, np.ndarray)) else mixed
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != ids.shape:
        raise DataError(f"mixed={str(mixed)[:80]} should be True, or one truth value a sample")
    return found


def _classes(task: str, logits: Tensor, class_dim: int) -> int:
    if task == "binary":
        return 2
    if task == "tokens":
        return int(logits.shape[class_dim])
    return math.prod(logits.shape[1:])


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "none was left out"


def _default_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a rank that has seen nothing keeps its state: collectives want all ranks on one kind of device."""
    backend = torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
