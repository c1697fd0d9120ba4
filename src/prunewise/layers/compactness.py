"""How far each layer can shrink alone before the metric falls, and all layers together."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunewise._files import read_json, write_json
from prunewise._progress import Progress
from prunewise._progress import progress as show_progress
from prunewise.core.batch import Loss
from prunewise.core.errors import CheckpointError, DataError, NonFiniteError, PlanError
from prunewise.core.sparsity import SparsityPlan
from prunewise.core.untouched import untouched
from prunewise.layers.masks import with_weights
from prunewise.layers.methods import Method
from prunewise.layers.profile import Compactness, LayerCompactness
from prunewise.layers.sparsify import Masks
from prunewise.layers.weights import Choice, Layer, check_finite, find_layers

Evaluate = Callable[[nn.Module, Any], float]

# Densities that are tried: 2^(−level/4), from 1 down to 0.46 %. Thirty-two of them take five bisections.
LEVELS = 32
_PER_OCTAVE = 4
BISECTIONS = int(math.log2(LEVELS))
_KIND = "prunewise/compactness-state"


def compactness(
    model: nn.Module,
    loader: Any,
    *,
    evaluate: Evaluate,
    tolerance: float = 0.01,
    higher_is_better: bool = True,
    method: str | Method = "magnitude",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    include: Choice = None,
    exclude: Choice = None,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Compactness:
    """For each layer, the fewest weights that keep the metric within a tolerance, all other layers being whole.

    Densities 2^(−i/4), i = 0 … 31, are searched by bisection: five evaluations a layer, and five for all layers together (each
    layer going the same share of its own way, on a logarithmic scale), so at most 1 + 5·(L + 1) for L layers.
    Bisection takes it that the metric only falls as a layer shrinks; where it does not, the density found is still one that was
    evaluated and held (or 1). Nothing is trained, and the model is left as it was, bit for bit.

    Args:
        model: the network.
        loader: handed to `evaluate`, and to methods that need data.
        evaluate: evaluate(model, loader) → the metric, run in eval mode without gradients.
        tolerance: how much the metric may fall (or rise), in its own unit; 0.01 is one point of an accuracy in [0, 1].
        higher_is_better: False for losses.
        method: how weights are chosen, as for `sparsify_`.
        data, loss, seed: as for `sparsify_`; `data` is `loader` by default.
        include, exclude: paths, shell patterns or a callable that select layers.
        state: a JSON file that is written after each evaluation, atomically. The same call finds there what was
            evaluated already and goes on; the weights, the method and what it took from the data must be the same (`evaluate`
            and `loader` cannot be checked).
        progress: show how far it is, and the time left, on stderr.

    Raises:
        PlanError: an unknown method or layer, or a mask in force.
        DataError: `tolerance` is negative, `loader` an iterator, the metric no number, or the method needs data.
        NonFiniteError: the metric of the whole model is not finite, or a weight is.
        CheckpointError: `state` is damaged, or of another model, method or data.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False))
        >>> _ = torch.nn.init.zeros_(model[0].weight)
        >>> found = compactness(model, torch.ones(1, 4), evaluate=lambda m, x: float(m(x).sum()), progress=False)
        >>> [layer.kept for layer in found.layers]
        [1, 1]
    """
    given: object = tolerance
    if not isinstance(given, Real) or not 0 <= float(given) < math.inf:
        raise DataError(f"tolerance={tolerance!r} should be how much the metric may fall: a finite number, at least 0")
    if isinstance(loader, Iterator):
        raise DataError("an iterator can be read once, and every evaluation needs the data: give a loader or a list")
    layers = find_layers(model, include, exclude)
    _check(layers)
    masks = Masks(model, layers, method, loader if data is None else data, loss, seed, progress)
    with show_progress(progress, 1 + BISECTIONS * (len(layers) + 1), "compactness") as display:
        search = _Search(model, loader, evaluate, layers, masks, state, display)
        base = search.metric({})
        if not math.isfinite(base):
            raise NonFiniteError(f"the metric of the whole model is {base}: look at evaluate and the data")
        edge = tolerance + 4 * torch.finfo(torch.float32).eps * abs(base)  # metrics are often taken in float32

        def holds(value: float) -> bool:
            fall = base - value if higher_is_better else value - base
            return math.isfinite(value) and fall <= edge

        rows = []
        for number, layer in enumerate(layers):
            counts = [_count(layer.size, level) for level in range(LEVELS)]
            level, value = _bisect([{layer.name: count} for count in counts], base, search, holds)
            rows.append(LayerCompactness(layer.name, layer.size, counts[level], value))
            display.step(1 + BISECTIONS * (number + 1))
            display.line(
                f"{layer.name}: keeps {counts[level] / layer.size:.2%} alone ({number + 1} of {len(layers)} layers)"
            )
        shared = [_shared(rows, share / (LEVELS - 1)) for share in range(LEVELS)]
        level, value = _bisect(shared, base, search, holds)
        display.step(1 + BISECTIONS * (len(layers) + 1))
    notes = {"importance": "compactness", "tolerance": repr(tolerance), "method": masks.name}
    together = SparsityPlan(shared[level], {layer.name: layer.shape for layer in layers}, notes)
    return Compactness(tuple(rows), base, tolerance, together, value, search.evaluations, masks.name)


def _check(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.keep_mask is not None:
            raise PlanError(
                f"{layer.name!r} has a mask in force: call make_permanent_ first, or give exclude={layer.name!r}"
            )
        if layer.parameter.is_meta:
            raise PlanError(f"{layer.name!r} is on the meta device: load the weights first")
    check_finite(layers)


def _count(size: int, level: int) -> int:
    """Weights kept at a level; one at least."""
    return max(1, round(size * 2 ** (-level / _PER_OCTAVE)))


def _shared(rows: Sequence[LayerCompactness], share: float) -> dict[str, int]:
    """Counts with each layer gone this share of its own way, in octaves."""
    return {row.name: max(1, round(row.params * (row.kept / row.params) ** share)) for row in rows}


def _bisect(
    steps: Sequence[Mapping[str, int]], base: float, search: _Search, holds: Callable[[float], bool]
) -> tuple[int, float]:
    """The last of the steps (the first changes nothing) that holds, and its metric."""
    good, bad, value = 0, len(steps), base
    while bad - good > 1:
        middle = (good + bad) // 2
        metric = search.metric(steps[middle])
        if holds(metric):
            good, value = middle, metric
        else:
            bad = middle
    return good, value


class _Search:
    """Metrics of the model with fewer weights, each evaluated once and remembered, on disk too where asked for."""

    def __init__(
        self, model: nn.Module, loader: Any, evaluate: Evaluate, layers: Sequence[Layer], masks: Masks,
        state: str | os.PathLike[str] | None, display: Progress,
    ) -> None:  # fmt: skip
        self._model, self._loader, self._evaluate, self._masks = model, loader, evaluate, masks
        self._layers = {layer.name: layer for layer in layers}
        self._path = None if state is None else Path(state)
        self._key = "" if state is None else _identity(model, masks)
        self._display = display
        self._known: dict[str, float | None] = self._read()
        self.evaluations = 0
        if self._known:
            display.line(f"resumed after {len(self._known)} evaluations")

    def metric(self, keep: Mapping[str, int]) -> float:
        """The metric with these counts; layers not named, or whole, are as they are. NaN where it is not finite."""
        less = {name: count for name, count in keep.items() if count < self._layers[name].size}
        name = ";".join(f"{path}={count}" for path, count in less.items())
        if name not in self._known:
            value = self._measured(less)
            self.evaluations += 1
            self._known[name] = value if math.isfinite(value) else None  # JSON has no NaN
            self._display.step(len(self._known))
            self._write()
        found = self._known[name]
        return math.nan if found is None else found

    def _measured(self, keep: Mapping[str, int]) -> float:
        chosen = self._masks.choose(keep)
        exchanged = []
        for name, (mask, updated) in chosen.items():
            layer = self._layers[name]
            weight = layer.weight if updated is None else updated
            exchanged.append((layer, torch.where(mask, weight, torch.zeros_like(weight))))
        with torch.no_grad(), untouched(self._model), with_weights(exchanged):
            value = self._evaluate(self._model, self._loader)
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"evaluate gave a {type(value).__name__}: it should give the metric, a number") from None

    def _read(self) -> dict[str, float | None]:
        if self._path is None or not (self._path.exists() or self._path.is_symlink()):
            return {}
        data = read_json(self._path)
        metrics = data.get("metrics")
        if data.get("kind") != _KIND or data.get("schema_version") != 1 or not isinstance(metrics, dict):
            raise CheckpointError(
                f"{self._path} is not the state of a compactness run of this version: use another file"
            )
        if data.get("key") != self._key:
            raise CheckpointError(
                f"{self._path} is of another model, other weights, another method or other data: use another file, or delete it"
            )
        if not all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in metrics.values()):
            raise CheckpointError(f"{self._path} is damaged (a metric is no number): delete it to start anew")
        return dict(metrics)

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            data = {"kind": _KIND, "schema_version": 1, "key": self._key, "metrics": self._known}
            write_json(self._path, data)


def _identity(model: nn.Module, masks: Masks) -> str:
    """Hash of all that the metrics depend on, as far as it can be seen."""
    digest = hashlib.sha256(f"{masks.identity};{LEVELS};".encode())
    tensors = [*model.named_parameters(), *model.named_buffers(), *masks.gathered.items()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
