"""The structure of one model: its traces, the labels after all rules ran, and the channel classes they leave."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from prunewise.core import rules as _rules  # noqa: F401  (registers the rules)
from prunewise.core.errors import TraceError
from prunewise.core.flow import RULES, Flow, Rectangle
from prunewise.core.gains import find_gains
from prunewise.core.labels import LabelArray, LabelStore, Layout
from prunewise.core.norms import Norm, find_norms
from prunewise.core.rules.pointwise import pointwise
from prunewise.core.trace import Inputs, Op, Trace, asks_for_values, record, record_partly


@dataclass
class Pass:
    """One recorded forward pass with the layout of every tensor in it."""

    trace: Trace
    layouts: dict[int, Layout]
    group_counts: dict[int, LabelArray]


@dataclass
class Structure:
    """All that `analyse` finds out. `passes[0]` is the eval pass."""

    flow: Flow
    passes: list[Pass]
    replaced: frozenset[str] = frozenset()  # names of buffers that forward assigns to, in either mode

    @property
    def trace(self) -> Trace:
        """The trace in eval mode."""
        return self.passes[0].trace


def analyse(model: nn.Module, example_inputs: Inputs) -> Structure:
    """Trace `model` and find which indices of its parameters and buffers must go together.

    The model is traced in eval mode, and followed in train mode as well if it does something else there. Where its code
    asks for values of tensors, the values of the example inputs decide what is seen; a warning says so.

    Raises:
        TraceError: the forward pass fails on `example_inputs`, or their values do not reach all parameters.
    """
    trace = record(model, example_inputs)
    traces = [(trace, find_norms(model, trace))]
    in_training, failure = record_partly(model, example_inputs, training=True, asks_at=trace.asks_at)
    if trace.asks_at:
        _check_reached(model, [trace, in_training])
    if failure is not None:  # detection models want targets in training: what eval mode shows has to do
        _tell_of_train_mode(model, trace, failure)
    elif _path(in_training) != _path(trace):
        traces.append((in_training, find_norms(model, in_training)))
    given_up: dict[tuple[str, int], str] = {}
    while True:
        structure = _follow(model, traces, Flow(given_up=dict(given_up)))
        more = structure.flow.given_way_for_nothing()
        if not more:
            structure.replaced = frozenset(trace.replaced | in_training.replaced)
            return structure
        given_up.update(more)


def _unused(traces: Sequence[Trace]) -> list[str]:
    """The parameters that no trace uses."""
    used = set().union(*(trace.used_state() for trace in traces))
    known = traces[0].tensors
    return [known[i].name for i in sorted(set(traces[0].state.values()) - used) if known[i].kind == "param"]


def _check_reached(model: nn.Module, traces: Sequence[Trace]) -> None:
    """Warn that values decide what runs; refuse where some parameters were not reached with these.

    Raises:
        TraceError: names the parameter and the line.
    """
    unused, asks_at = _unused(traces), traces[0].asks_at
    if unused:
        more = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
        raise TraceError(
            f"{type(model).__name__} asks for the values of tensors at {asks_at}, and with those of the example inputs it does "
            f"not reach {unused[0]}{more}. Others may, where channels around them are gone: give example inputs that reach "
            "all (more samples, say), or remove parameters that are never used"
        )
    warnings.warn(
        f"{type(model).__name__} asks for the values of tensors at {asks_at}: what it does was followed with the values of the "
        "example inputs, and what it does with others is not known",
        stacklevel=4,
    )


def _tell_of_train_mode(model: nn.Module, trace: Trace, failure: TraceError) -> None:
    """Warn where train mode fails for want of values, and where parameters are used there only, if at all."""
    if not trace.asks_at and asks_for_values(failure):
        warnings.warn(
            f"in train mode {type(model).__name__} asks for values of tensors, which eval mode does not: what it does there "
            f"cannot be followed and may fail once channels are removed ({failure})",
            stacklevel=4,
        )
    unused = _unused([trace])
    if unused:
        warnings.warn(
            f"{type(model).__name__} does not run on the example inputs in train mode ({failure.__cause__}), and in eval mode "
            f"it does not use {unused[0]}{f' and {len(unused) - 1} others' if len(unused) > 1 else ''}. What it does with "
            "them in train mode cannot be followed and may fail once channels are removed: give inputs that both modes take",
            stacklevel=4,
        )


def _follow(model: nn.Module, traces: Sequence[tuple[Trace, Sequence[Norm]]], flow: Flow) -> Structure:
    """Let labels flow through all traces, and find what stays because of the model itself."""
    passes = [run_rules(flow, trace, norms) for trace, norms in traces]
    for name in _unused([trace for trace, _ in traces]):
        for block in flow.state[name].blocks:
            flow.store.pin(block.labels, "not used in the forward pass")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # its tensors cannot be replaced by smaller ones
            for name, _ in [*module.named_parameters(path), *module.named_buffers(path)]:
                for block in flow.state[name].blocks if name in flow.state else ():
                    flow.store.pin(block.labels, f"held by the scripted module {path or 'itself'}")
    for rectangle in flow.rectangles:
        resolve(flow, rectangle)
    return Structure(flow, passes)


# Operations in which a weight whose entries are zero takes nothing in and gives nothing on.
_READS_BY_WEIGHT = (
    "mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "linear", "convolution", "_convolution", "embedding",
    "_grouped_mm",
)  # fmt: skip

# What differs between the modes of any network and says nothing about its structure.
_OF_THE_MODE = ("native_dropout", "bernoulli", "empty_like", "native_batch_norm", "cudnn_batch_norm", "batch_norm")


def _path(trace: Trace) -> list[object]:
    """The operations of a trace and the state that each reads, without what training adds to any network (dropout, counters)."""
    return [
        (op.func, [trace.tensors[i].name for i in op.inputs])
        for op in trace.ops
        if op.name not in _OF_THE_MODE and any(trace.tensors[o].shape for o in op.outputs) and not _is_dropout(op)
    ]


def _is_dropout(op: Op) -> bool:
    """True for the pieces into which torch takes dropout apart."""
    return op.name in ("div", "mul") and "torch/nn/modules/dropout" in op.where


def run_rules(flow: Flow, trace: Trace, norms: Sequence[Norm] = (), given: Mapping[int, Layout] | None = None) -> Pass:
    """Let the labels flow through a trace; outputs of the model are pinned.

    Where the layouts of its inputs are `given`, it is the trace of a part of the model: nothing is pinned at its ends.
    """
    flow.begin(trace)
    flow.layouts.update(given or {})
    flow.group_counts = {}
    starts = {norm.ops.start: norm for norm in norms}
    gains = find_gains(trace)
    making = {i for use in gains for i in use.ops}
    made = {use.ops[-1]: use for use in gains}
    live = trace.live_ops()
    for op in trace.ops:
        # What no output depends on (attention weights that nobody asked for, say) must not pin anything; it runs all
        # the same, so the shapes that it ties stay tied.
        # Nor the steps to a normalised weight: what they mix is made up for.
        flow.store.muted = op.index not in live or op.index in making
        flow.made_up_for = op.index in making
        known = len(flow.rectangles), len(flow.demands)
        if op.index in starts and not flow.store.muted:
            flow.enter_norm(starts[op.index], op)
        outputs = _apply(flow, op)
        if flow.store.muted:
            del flow.rectangles[known[0] :], flow.demands[known[1] :]
        elif op.name not in _READS_BY_WEIGHT:
            for index in op.inputs:
                if index in flow.origins and (op.writes or not set(op.outputs) <= set(flow.origins)):
                    flow.note_use(flow.origins[index], op)
        for index, layout in zip(op.outputs, outputs, strict=True):
            flow.layouts[index] = layout
        if op.index in made:
            flow.store.muted = op.index not in live
            flow.layouts[made[op.index].result] = flow.normalised(made[op.index], op)
    flow.store.muted = flow.made_up_for = False
    for index in trace.told:
        for block in flow.layouts.get(index, Layout(())).blocks:
            flow.store.pin(block.labels, f"read as numbers by the code that asks for values at {trace.asks_at}")
    for index in trace.outputs if given is None else ():
        for block in flow.layouts.get(index, Layout(())).blocks:
            flow.store.pin(block.labels, "an output of the model")
    return Pass(trace, flow.layouts, flow.group_counts)


def _apply(flow: Flow, op: Op) -> list[Layout]:
    """Layouts of all outputs of `op`. Without a rule that works, all it touches is pinned."""
    rule = RULES.get(op.name)
    if rule is None and torch.Tag.pointwise in op.func.tags:
        rule = pointwise
    why = "no rule for"
    if rule is not None:
        try:
            result = rule(flow, op)
            outputs = [result] if isinstance(result, Layout) else result
            return outputs + [Layout(flow.shape(o)) for o in op.outputs[len(outputs) :]]
        except (AssertionError, IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
            why = f"a rule failed ({type(error).__name__}: {error}) for"
    for index in op.inputs:
        layout = flow.layouts.get(index)
        if layout is not None:
            for block in layout.blocks:
                flow.store.pin(block.labels, f"{why} {flow.reason(op)}")
            flow.layouts[index] = Layout(layout.shape)
    return [Layout(flow.shape(o)) for o in op.outputs]


def resolve(flow: Flow, rectangle: Rectangle) -> None:
    """Unite labels until what stays of a split dimension is a product: pick the axis that leaves most choice."""
    store = flow.store
    roots = store.roots(rectangle.labels)

    def carried_by(axis: int) -> bool:
        first = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
        return bool((first == first[:, :1]).all())

    if any(carried_by(axis) for axis in rectangle.axes):
        return
    if not rectangle.axes:
        store.pin(rectangle.labels, f"split by {rectangle.where}")
        return
    _, small = np.unique(roots, return_inverse=True)
    small = small.reshape(roots.shape)
    choices = {}
    for axis in rectangle.axes:
        trial = LabelStore()
        trial.fresh(int(small.max()) + 1)
        table = np.moveaxis(small, axis, 0).reshape(small.shape[axis], -1)
        trial.unite(table, table[:, :1])
        choices[axis] = len(np.unique(trial.roots(table)))
    best = max(rectangle.axes, key=lambda axis: choices[axis])
    table = np.moveaxis(roots, best, 0).reshape(roots.shape[best], -1)
    store.unite(table, table[:, :1])
