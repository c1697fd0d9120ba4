"""Cut a model by way of its exported graphs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from prunewise.core.cost import CostModel
from prunewise.core.errors import TraceError, VerificationError
from prunewise.core.graph.call import Call
from prunewise.core.graph.export import Exported, export_graph, with_flags
from prunewise.core.graph.module import RebuiltModule, skeleton_of
from prunewise.core.graph.rewrite import Cut, Part, rewrite
from prunewise.core.groups import Grouping
from prunewise.core.proof import check_equal
from prunewise.core.slices import slice_state, state_slices
from prunewise.core.trace import Inputs, as_call


def rebuild(
    model: nn.Module,
    grouping: Grouping | CostModel,
    keep: Mapping[str, tuple[int, ...]],
    example_inputs: Inputs,
) -> fx.GraphModule:
    """A smaller copy of `model` as a graph module: same parameter names, inputs and outputs; trainable.

    Train and eval mode hold for the whole module: one mode for one part of it cannot be set any more.
    Arguments that are not tensors are fixed to what they are in `example_inputs`.

    Args:
        model: the original; not changed.
        grouping: its groups (or its cost model).
        keep: units that stay, by group name; groups not named stay whole.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).

    Raises:
        TraceError: torch.export cannot capture the model.
        VerificationError: an operation cannot be rewritten (it is named), or the result differs from the
        masked model.
    """
    grouping = grouping.grouping if isinstance(grouping, CostModel) else grouping
    refuse_replaced(grouping)
    args, kwargs = as_call(example_inputs)
    call = Call.of(model, args, kwargs)
    skeleton = copy.deepcopy(skeleton_of(model, {}))
    slice_state(skeleton, state_slices(grouping, keep))
    graphs = {False: export_graph(model, call, False)}
    try:
        graphs[True] = export_graph(model, call, True)
    except TraceError as error:
        warnings.warn(f"{error} Its eval graph is used, with dropout and batch norm in train mode.", stacklevel=2)
        graphs[True] = (with_flags(graphs[False][0]), graphs[False][1])
        call.outputs[True] = call.outputs[False]
        call.fixed |= {True} if False in call.fixed else set()
    for training in sorted(call.fixed):
        warnings.warn(
            f"the rebuilt {type(model).__name__} takes batches of {call.batch} only in {'train' if training else 'eval'} "
            "mode: its code fixes the size",
            stacklevel=3,
        )
    small = assembled(model, skeleton, graphs, call, Cut(grouping, keep))
    small.train(model.training)
    check_equal(model, small, grouping, keep, example_inputs)
    return small


def refuse_replaced(grouping: Grouping, within: str = "") -> None:
    """A graph has no assignments: what forward assigns to a buffer would be lost.

    Raises:
        VerificationError: names the buffer.
    """
    name = next((n for n in sorted(grouping.structure.replaced) if n.startswith(within)), None)
    if name is not None:
        raise VerificationError(
            f"forward assigns to the buffer {name}, which a graph cannot: write to it in place (copy_)"
        )


def assembled(
    model: nn.Module,
    skeleton: nn.Module,
    graphs: Mapping[bool, Exported],
    call: Call,
    cut: Cut,
    part: Part | None = None,
) -> RebuiltModule:
    """The graphs of a model (or of a part of one), rewritten for the smaller tensors that `skeleton` holds."""
    for training, (graph, constants) in graphs.items():
        if training and graph is graphs[False][0]:  # one for both modes
            continue
        for name, tensor in constants.items():
            skeleton.register_buffer(name, tensor, persistent=False)
        inputs = call.tensors if training in call.fixed else call.doubled()
        rewrite(graph, model, skeleton, inputs, cut, constants, part)
    call.tensors = [
        torch.zeros(cut.shape(replace(layout, shape=t.shape)) if layout else t.shape, dtype=t.dtype, device="meta")
        for t, layout in zip(call.tensors, part.inputs if part else [None] * len(call.tensors), strict=True)
    ]
    return RebuiltModule(skeleton, {t: g for t, (g, _) in graphs.items()}, call, type(model).__name__)
