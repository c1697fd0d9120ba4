"""The zoo's models given to Torch-Pruning: its documented generic set-up, with nothing said about the architecture."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import torch_pruning
from torch import Tensor, nn
from zoo_models import Entry, vary_
from zoo_stages import Facts, as_call, counted_macs, failure, outputs, peak_mib

from tests.zoo import call, flat_tensors


def torch_pruning_work(entry: Entry, options: argparse.Namespace, report: Callable[[str, Facts], None]) -> None:
    """Build the model, prune it at ratio 0.5, run it and count."""
    tp = torch_pruning()
    state: dict[str, Any] = {}

    def build() -> Facts:
        torch.manual_seed(options.seed)
        state["model"] = model = entry.build()
        vary_(model)
        state["inputs"] = entry.inputs()
        outputs(model.eval(), state["inputs"])
        return {"params": sum(p.numel() for p in model.parameters())}

    def prune() -> Facts:
        assert tp is not None, "torch-pruning is not installed"
        model, inputs = state["model"], state["inputs"]
        before = counted_macs(model, inputs)
        pruner = tp.pruner.MagnitudePruner(
            model,
            # It calls model(*list), or model(**dict).
            inputs if isinstance(inputs, dict) else list(as_call(inputs)[0]),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=last_layers(model, inputs),
        )
        pruner.step()
        found = outputs(model, inputs)
        finite = all(bool(t.isfinite().all()) for t in found if t.is_floating_point())
        after = counted_macs(model, inputs)
        return {"share": after / before, "finite": finite, "right": finite}

    for name, stage in (("build", build), ("prune", prune)):
        report(name, {})
        start = time.process_time()
        try:
            facts = {"right": True, **stage()}
        except Exception as error:
            facts = {"right": False, **failure(error)}
        report(name, {**facts, "seconds": time.process_time() - start, "peak_mib": peak_mib()})
        if not facts["right"]:
            return


@torch.no_grad()
def last_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers whose own output is an output of the model (up to views): its classifiers, by the documented rule."""
    made: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # so that no storage is used again

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            kept.append(output)
            made[output.untyped_storage().data_ptr()] = module

    layers = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, layers)]
    found = flat_tensors(call(model, inputs))
    for handle in handles:
        handle.remove()
    last = [made[t.untyped_storage().data_ptr()] for t in found if t.untyped_storage().data_ptr() in made]
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier) and isinstance(classifier(), nn.Module):
        last.append(classifier())
    return list(dict.fromkeys(last))


PEERS = {"torch-pruning": torch_pruning_work}
