"""Latency as a function of the widths, from measurements on the user's own device.

Every distinct operation of the trace is run alone, at a few widths; between them its time is interpolated. The sum over all
operations, plus what a forward pass takes beyond them (Python, launches), is calibrated to the full model's measured time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.channels.replay import Case, Form, cases_of, device_of, interleaved, memory_format_of, runner
from prunewise.core.cost import CostModel
from prunewise.core.errors import BudgetError
from prunewise.core.trace import Inputs

_KIND = "prunewise/latency-model"
_VERSION = 1
_POINTS = 5  # widths that an operation is measured at, for each of its axes
_LEAST_SLOPE = 0.01  # of an operation's time, over its whole range: no width is ever quite free

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Grid:
    """Times of one operation: `ms[i, j]` at widths `axes[0][i]`, `axes[1][j]`; both ascend. A missing axis is (1.0,)."""

    axes: tuple[tuple[float, ...], tuple[float, ...]]
    ms: Table


class LatencyModel:
    """Milliseconds of one forward pass (eval mode, no gradients) as a function of how many units of each group are kept.

    Attributes:
        device: where it was measured, in words.
        full_ms: the full model's measured latency; the prediction at full widths equals it.
        groups: names of the prunable groups, in the order that `tensor` expects.

    Limits: an operation alone, with its operands far from the cache, is not quite the same operation in a network; memory format
    is taken to be that of the model's 4-D weights; autocast and `torch.compile` are not looked at.
    """

    def __init__(
        self,
        groups: Sequence[str],
        sizes: Sequence[int],
        grids: Mapping[str, _Grid],
        terms: Sequence[tuple[str, tuple[Form, ...], int]],
        constant_ms: float,
        scale: float,
        full_ms: float,
        device: str,
    ) -> None:
        self.groups, self.sizes = list(groups), list(sizes)
        self.constant_ms, self.scale, self.full_ms, self.device = constant_ms, scale, full_ms, device
        self._grids, self._terms = dict(grids), list(terms)
        column = {name: i for i, name in enumerate(self.groups)}
        depth = max((len(a) for g in self._grids.values() for a in g.axes), default=1) + 1
        rows = np.zeros((len(terms), 2, len(self.groups)))
        constant = np.ones((len(terms), 2))
        knots = np.zeros((len(terms), 2, depth))
        values = np.zeros((len(terms), depth, depth))
        for i, (key, axes, count) in enumerate(terms):
            grid = self._grids[key]
            for j, (base, counts) in enumerate(axes):
                constant[i, j] = base
                for name, number in counts:
                    rows[i, j, column[name]] += number
            for j, axis in enumerate(grid.axes):
                pad = depth - len(axis)
                knots[i, j] = [*axis, *(axis[-1] + 1 + k for k in range(pad))]
            pads = [(0, depth - n) for n in grid.ms.shape]
            values[i] = count * np.pad(grid.ms, pads, mode="edge")
        self._parts = tuple(torch.from_numpy(a) for a in (rows, constant, knots, values))
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}

    @classmethod
    def of(
        cls,
        costs: CostModel,
        model: nn.Module,
        example_inputs: Inputs,
        device: torch.device | str | None = None,
        *,
        seconds: float = 20.0,
    ) -> LatencyModel:
        """Measure.

        Args:
            costs: the cost model of `model` (of `CostModel.of`, or a `Surgeon`'s `costs`).
            model: the full network; not changed. It is copied to `device` if it is elsewhere.
            example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments); their batch size counts.
            device: where to measure; default: where the model is. Threads are as set (`torch.set_num_threads`).
            seconds: about how long to measure; every point is measured 3 times in any case.

        Raises:
            BudgetError: the model is on the meta device, so nothing can be measured.
        """
        where = torch.device(device) if device is not None else device_of(model)
        if where.type == "meta" or any(p.is_meta for p in model.parameters()):
            raise BudgetError(
                "latency cannot be measured on the meta device: put the model on a real one, or budget macs"
            )
        run = runner(model, example_inputs, where)
        cases, terms = cases_of(costs, costs.grouping.structure.passes[0], where, memory_format_of(model))
        calls, places = [], []
        for key, case in cases.items():
            for at in product(*(_knots(a, b) for a, b in zip(case.least, case.full, strict=True))):
                calls.append(case.build(at))
                places.append((key, at))
        times = interleaved([run, *calls], where, seconds)
        full_ms, points = times[0], dict(zip(places, times[1:], strict=True))
        grids = {
            key: _grid(case, {at: ms for (k, at), ms in points.items() if k == key}) for key, case in cases.items()
        }
        counted = Counter((key, axes) for key, axes in terms)
        rows = [(key, axes, count) for (key, axes), count in counted.items()]
        total = sum(float(grids[key].ms[-1, -1]) * count for key, _, count in rows)
        scale = min(1.0, full_ms / total) if total > 0 else 1.0
        names, sizes = [g.name for g in costs.groups], [g.size for g in costs.groups]
        return cls(names, sizes, grids, rows, max(0.0, full_ms - scale * total), scale, full_ms, in_words(where))

    def __call__(self, kept: Mapping[str, int]) -> float:
        """Predicted milliseconds with `kept[name]` units of each group; groups not named are kept whole."""
        pairs = zip(self.groups, self.sizes, strict=True)
        widths = torch.tensor([float(kept.get(name, size)) for name, size in pairs], dtype=torch.float64)
        return float(self.tensor(widths))

    def tensor(self, kept: Tensor) -> Tensor:
        """Predicted milliseconds, differentiable in `kept` (piecewise bilinear, never falling as a width grows).

        Args:
            kept: widths of the prunable groups in the order of `groups`, shape (groups,), any float dtype.

        Returns:
            float64 scalar on the device of `kept`.
        """
        if kept.device not in self._on:
            self._on[kept.device] = tuple(t.to(kept.device) for t in self._parts)
        rows, constant, knots, values = self._on[kept.device]
        if not len(rows):
            return kept.sum().to(torch.float64) * 0 + self.constant_ms
        x = rows @ kept.to(torch.float64) + constant  # (terms, 2)
        cell = (torch.searchsorted(knots, x.detach()[..., None].contiguous(), right=True) - 1).clamp(
            0, knots.shape[-1] - 2
        )
        low, high = knots.gather(-1, cell)[..., 0], knots.gather(-1, cell + 1)[..., 0]
        t = ((x - low) / (high - low)).clamp(0, 1)
        i, j = cell[:, 0, 0], cell[:, 1, 0]
        row = torch.arange(len(x), device=kept.device)
        a, b = t[:, 0], t[:, 1]
        ms = (
            (1 - a) * (1 - b) * values[row, i, j] + a * (1 - b) * values[row, i + 1, j]
            + (1 - a) * b * values[row, i, j + 1] + a * b * values[row, i + 1, j + 1]
        )  # fmt: skip
        return self.constant_ms + self.scale * ms.sum()

    def bind(self, costs: CostModel) -> LatencyModel:
        """The same measurements for a smaller network: one that was cut from the measured one and traced again.

        Operations that this model does not know are left out.
        """
        known: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for key in self._grids:
            pattern, _, sizes = key.rpartition(" (")
            full = tuple(int(s) for s in sizes[:-1].split(",") if s.strip())
            known.setdefault(pattern, []).append((full, key))
        cases, terms = cases_of(costs, costs.grouping.structure.passes[0], torch.device("cpu"), torch.contiguous_format)
        counted: Counter[tuple[str, tuple[Form, ...]]] = Counter()
        for key, axes in terms:
            case = cases[key]
            fits = [
                (sum(full), other)
                for full, other in known.get(case.pattern, ())
                if all(a <= b for a, b in zip(case.full, full, strict=True))
            ]
            if fits:
                counted[min(fits)[1], axes] += 1
        names, sizes_ = [g.name for g in costs.groups], [g.size for g in costs.groups]
        rows = [(key, axes, count) for (key, axes), count in counted.items()]
        args = (self._grids, rows, self.constant_ms, self.scale, self.full_ms, self.device)
        return LatencyModel(names, sizes_, *args)

    # -- as data --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, with a schema version."""
        return {
            "kind": _KIND,
            "schema_version": _VERSION,
            "device": self.device,
            "full_ms": self.full_ms,
            "constant_ms": self.constant_ms,
            "scale": self.scale,
            "groups": dict(zip(self.groups, self.sizes, strict=True)),
            "operations": {k: {"axes": [list(a) for a in g.axes], "ms": g.ms.tolist()} for k, g in self._grids.items()},
            "terms": [
                {"operation": key, "sizes": [[base, dict(counts)] for base, counts in axes], "count": count}
                for key, axes, count in self._terms
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> LatencyModel:
        """The reverse of `to_dict`.

        Raises:
            BudgetError: the data are not a latency model of this version, or damaged.
        """
        if not isinstance(data, dict) or data.get("kind") != _KIND or data.get("schema_version") != _VERSION:
            raise BudgetError(f"this is not a latency model of schema version {_VERSION}: measure again")
        try:
            grids = {}
            for key, g in data["operations"].items():
                first, second = (tuple(float(v) for v in a) for a in g["axes"])
                ms = np.array(g["ms"], dtype=np.float64)
                if ms.shape != (len(first), len(second)) or not np.isfinite(ms).all() or (ms < 0).any():
                    raise ValueError(f"operation {key!r}")
                grids[str(key)] = _Grid((first, second), ms)
            terms = [
                (t["operation"], tuple((int(b), tuple((str(n), int(k)) for n, k in c.items())) for b, c in t["sizes"]),
                 int(t["count"]))
                for t in data["terms"]
            ]  # fmt: skip
            constant, scale, full = (float(data[k]) for k in ("constant_ms", "scale", "full_ms"))
            groups = {str(n): int(s) for n, s in data["groups"].items()}
            sizes = list(groups.values())
            return cls(list(groups), sizes, grids, terms, constant, scale, full, str(data["device"]))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BudgetError(
                f"the latency model is damaged ({type(error).__name__}: {error}): measure again"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> LatencyModel:
        """Read what `save` wrote.

        Raises:
            BudgetError: the file is not a latency model, or damaged.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise BudgetError(f"{path} is not a latency model: {error}") from error

    def check(self, costs: CostModel) -> None:
        """Raise `BudgetError` where this was not measured on the network that `costs` describes."""
        if dict(zip(self.groups, self.sizes, strict=True)) != {g.name: g.size for g in costs.groups}:
            raise BudgetError(
                "the latency model was measured on another network: its channel groups differ. Measure again"
            )


def in_words(device: torch.device) -> str:
    """The device and what else its times depend on: numbers measured under other words are not to be compared."""
    known = device.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name(device) if known else device.type
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure_latency(
    model: nn.Module, example_inputs: Inputs, device: torch.device | str | None = None, *, seconds: float = 3.0
) -> float:
    """Median milliseconds of a forward pass in eval mode without gradients, after warm-up.

    Args:
        model: any module; not changed.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        device: where; default: where the model is.
        seconds: about how long to measure; at least 5 passes.
    """
    where = torch.device(device) if device is not None else device_of(model)
    return interleaved([runner(model, example_inputs, where)], where, seconds, least=5)[0]


# -- between the points --------------------------------------------------------------------------------


def _knots(least: int, full: int) -> tuple[int, ...]:
    """Widths to measure at: both ends, and quarters; multiples of 8 in between where the range is long enough."""
    found = {least, full}
    for k in range(1, _POINTS - 1):
        at = full * k / (_POINTS - 1)
        found.add(max(least, round(at / 8) * 8 if full >= 64 else round(at)))
    return tuple(sorted(found))


def _grid(case: Case, points: Mapping[tuple[int, ...], float]) -> _Grid:
    axes = [tuple(sorted({at[k] for at in points})) for k in range(len(case.full))]
    ms = np.array([points[at] for at in product(*axes)]).reshape([len(a) for a in axes])
    for axis in range(ms.ndim):
        ms = _monotone(ms, axis)
    for axis, knots in enumerate(axes):
        rise = np.array(knots) / knots[-1]
        ms = ms + _LEAST_SLOPE * ms.max() * rise.reshape([-1 if d == axis else 1 for d in range(ms.ndim)])
    ms = ms / (1 + _LEAST_SLOPE * len(axes))
    one, two = (axes[0], (1.0,)) if len(axes) == 1 else axes
    return _Grid((tuple(map(float, one)), tuple(map(float, two))), ms.reshape(len(one), len(two)))


def _monotone(ms: Table, axis: int) -> Table:
    """Never falling along `axis`: the mean of the least such function above and the greatest below."""
    above = np.maximum.accumulate(ms, axis=axis)
    below = np.flip(np.minimum.accumulate(np.flip(ms, axis), axis=axis), axis)
    return (above + below) / 2
