"""Cut a model by way of its exported graphs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

from torch import fx, nn

from prunewise.core.cost import CostModel
from prunewise.core.errors import TraceError
from prunewise.core.graph.call import Call
from prunewise.core.graph.export import export_graph, with_flags
from prunewise.core.graph.module import RebuiltModule, skeleton_of
from prunewise.core.graph.rewrite import Cut, rewrite
from prunewise.core.groups import Grouping
from prunewise.core.proof import check_equal
from prunewise.core.slices import slice_state, state_slices
from prunewise.core.trace import Inputs


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
    call = Call.of(model, example_inputs)
    cut = Cut(grouping, keep)
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
    for training, (graph, constants) in graphs.items():
        for name, tensor in constants.items():
            skeleton.register_buffer(name, tensor, persistent=False)
        rewrite(
            graph,
            model,
            skeleton,
            call.tensors if training in call.fixed else call.doubled(),
            cut,
            constants,
            training,
        )
    small = RebuiltModule(skeleton, {t: g for t, (g, _) in graphs.items()}, call, type(model).__name__)
    call.tensors = [t.detach().to("meta") for t in call.tensors]
    small.train(model.training)
    check_equal(model, small, grouping, keep, example_inputs)
    return small
