"""A clean pass: the model as it is, on the samples as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunewise.core.batch import moved
from prunewise.core.errors import DataError
from prunewise.core.untouched import evaluating
from prunewise.samples.checking import kind_of
from prunewise.samples.tracking import FIELD

LABELS = ("labels", "targets", "label", "target")


class _Records(Protocol):
    def update(self, sample_ids: Any, logits: Tensor, targets: Tensor) -> None: ...


def record_pass(
    recorder: _Records,
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], tuple[Any, Tensor, Tensor]] | None,
    device: torch.device | str | None,
) -> None:
    """Update `recorder` with every batch of `loader`; modes of all modules are as before when it ends, by an error too."""
    if device is None:
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else None
    with evaluating(model), torch.no_grad():
        for batch in loader:
            if device is not None:
                batch = moved(batch, device)
            ids, logits, targets = forward_batch(model, batch) if forward is None else forward(model, batch)
            recorder.update(ids, logits, targets)


def forward_batch(model: nn.Module, batch: Any) -> tuple[Any, Tensor, Tensor]:
    """(sample ids, logits, targets) of a batch of a tracked data set: (inputs, targets, sample ids), or a dict.

    Raises:
        DataError: the batch has another form.
    """
    ids, inputs, targets = split_batch(batch)
    return ids, _logits(model(**inputs) if isinstance(inputs, dict) else model(inputs[0])), targets


def split_batch(batch: Any) -> tuple[Any, dict[str, Any] | tuple[Any], Any]:
    """(sample ids, inputs by keyword or the one input, targets) of a batch of a tracked data set.

    Raises:
        DataError: the batch has another form.
    """
    if isinstance(batch, Mapping) and FIELD in batch:
        label = next((name for name in LABELS if name in batch), None)
        if label is not None:
            return batch[FIELD], {k: v for k, v in batch.items() if k not in (FIELD, label)}, batch[label]
    elif isinstance(batch, (tuple, list)) and len(batch) == 3:
        return batch[2], (batch[0],), batch[1]
    found = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else kind_of(batch)
    if isinstance(batch, (tuple, list)):
        found += f" of {len(batch)}"
    raise DataError(
        f"the loader gives {found}: expected (inputs, targets, sample ids) of a tracked data set, or a dict with "
        f"'{FIELD}' and 'labels'. A collate_fn of your own has to pass the sample ids on; `LearnabilityRecorder.clean_pass` takes "
        "batches of any form by forward="
    )


def _logits(output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise DataError(f"the model returns {kind_of(output)} without logits: give forward=")
    return found
