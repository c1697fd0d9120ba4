"""Find the Python integers that hold widths in the user's own modules, and set them.

The pruned copy is traced on fake tensors and compared with what the plan predicts, operation by operation.
Where the two part, the modules around that operation are searched for integers equal to the old size; the
change that lets the comparison get furthest is kept, until it reaches the end. Where no integer helps, because the size is
in the code itself, the module that holds the code becomes a graph of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from prunewise.core.attention import PrunedMultiheadAttention
from prunewise.core.cost import CostModel
from prunewise.core.graph import Parts, RebuiltModule
from prunewise.core.labels import Layout
from prunewise.core.structure import Pass
from prunewise.core.trace import Inputs, Op, Trace, record_partly

_MAX_TRIALS = 200
Sizes = dict[int, set[int]]  # old size -> new sizes it may stand for
Originals = dict[tuple[int, str], Any]  # (id of a module, attribute) -> what it held before it was changed


def fit_attributes(
    small: nn.Module,
    example_inputs: Inputs,
    costs: CostModel,
    keep: Mapping[str, tuple[int, ...]],
    parts: Parts | None = None,
) -> str | None:
    """Set width attributes until the pruned copy does what is predicted; None, or what still differs.

    With `parts`, modules of which no attribute mends what differs become graphs.
    """
    widths = {name: len(kept) for name, kept in keep.items()}
    for number, each in enumerate(costs.grouping.structure.passes):
        new, problem = _fit_pass(small, example_inputs, costs, widths, each, training=number == 1, parts=parts)
        problem = problem or _moved_slice(new, costs, keep, each)
        if problem is not None:
            return problem
    return None


def _fit_pass(
    small: nn.Module,
    inputs: Inputs,
    costs: CostModel,
    widths: Mapping[str, int],
    each: Pass,
    training: bool,
    parts: Parts | None,
) -> tuple[Trace, str | None]:
    """The last trace of `small`, and what still differs."""
    predicted = [[_predicted(costs, each, o, widths) for o in op.outputs] for op in each.trace.ops]
    new, at, problem = _first_difference(small, inputs, each.trace, predicted, training, parts)
    originals: Originals = {}
    own: set[str] = set()  # attributes that were set on a single module
    again: set[type] = set()  # classes of which a module is a graph already
    trials = 0
    while problem is not None:
        changes: Iterator[_Change | _Swap] = _candidates(small, each, predicted, at, originals, own)
        if parts is not None:
            graphs = partial(_graphs, small, parts, each.trace, at)
            changes = chain(graphs(again, only=again), changes, graphs(again))
        tried: set[frozenset[tuple[int, str, str]]] = set()
        for change in changes:
            if isinstance(change, _Change):
                if trials >= _MAX_TRIALS or change.key in tried:
                    continue
                tried.add(change.key)
            undo = change.apply()
            trials += isinstance(change, _Change)
            trial, reached, found = _first_difference(small, inputs, each.trace, predicted, training, parts)
            if found is None or reached > at:
                if isinstance(change, _Swap):
                    assert parts is not None
                    again |= {type(module) for module in change.old.values()}
                    parts.reasons.update(dict.fromkeys(change.graphs, problem))
                else:
                    own |= {name for _, name, _, _ in change.targets if len(change.targets) == 1}
                    for module, name, old, _ in change.targets:
                        originals.setdefault((id(module), name), old)
                new, at, problem = trial, reached, found
                break
            undo()
        else:
            break
    return new, problem


def _predicted(costs: CostModel, each: Pass, tensor: int, widths: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that a tensor should have; -1 where values decide a size that no channels have."""
    layout = each.layouts.get(tensor) or Layout(each.trace.tensors[tensor].shape)
    shape = costs.shape(layout, widths)
    if not each.trace.asks_at:
        return shape
    labelled = {dim for block in layout.blocks for dim in block.dims}
    return tuple(n if d in labelled else -1 for d, n in enumerate(shape))


def _fits(shape: tuple[int, ...], want: tuple[int, ...]) -> bool:
    return len(shape) == len(want) and all(b in (a, -1) for a, b in zip(shape, want, strict=True))


def _moved_slice(new: Trace, costs: CostModel, keep: Mapping[str, tuple[int, ...]], each: Pass) -> str | None:
    """A slice or pick of channels whose position should have moved with the removed ones, and did not."""
    if [op.func for op in new.ops] != [op.func for op in each.trace.ops]:
        return None  # the numbers decide
    alive = costs.grouping.alive(keep)
    for a, b in zip(each.trace.ops, new.ops, strict=True):
        if a.name not in ("slice", "select", "narrow") or a.args["self"].id not in each.layouts:
            continue
        layout = each.layouts[a.args["self"].id]
        dim = int(a.args["dim"]) % len(layout.shape)
        mask = costs.grouping.kept(layout, dim, alive)
        start = "index" if a.name == "select" else "start"
        old, now = (int(op.args.get(start) or 0) for op in (a, b))
        if mask is not None and int(mask[: old % len(mask)].sum()) != now % max(1, int(mask.sum())):
            return f"{b.func} in {b.module or 'the model'} ({b.where}) picks channels by a position in the code"
    return None


def _first_difference(
    small: nn.Module,
    inputs: Inputs,
    old: Trace,
    predicted: list[list[tuple[int, ...]]],
    training: bool,
    parts: Parts | None,
) -> tuple[Trace, int, str | None]:
    """The trace of `small`, the index in the old one of the first operation that is not as predicted, and what is wrong.

    Views and copies are passed over: what they do shows in the operations that compute. So are the insides of
    modules that surgery put another class in the place of.
    """
    new, error = record_partly(small, inputs, training=training, asks_at=old.asks_at)
    replaced = {n for n, m in small.named_modules() if isinstance(m, (PrunedMultiheadAttention, RebuiltModule))}
    before, after = ([op for op in _live(t, error is None) if _computes(op, replaced)] for t in (old, new))
    if parts is not None and not training:  # a module that others share is run under the name that it has first
        inside = parts.operations(replaced)
        before = [op for op in before if op.index not in inside]
    for a, b in zip(before, after, strict=False):
        where = f"{b.func} in {b.module or 'the model'} ({b.where})"
        if a.func is not b.func or len(a.outputs) != len(b.outputs):
            return new, a.index, f"the pruned forward takes another path: {where} instead of {a.func}"
        for out, want in zip(b.outputs, predicted[a.index], strict=True):
            if not _fits(new.tensors[out].shape, want):
                shape = new.tensors[out].shape
                return (
                    new,
                    a.index,
                    f"{where} gives shape {shape}, should be {want}: a width is written into the code",
                )
        scalar = _changed_scalar(a, b)
        if scalar is not None:
            return new, a.index, f"{where}: the number {scalar} is computed from a width"
    if error is not None or len(after) != len(before):
        at = _failed_at(before, after, old, new)
        where = old.ops[at].where if at < len(old.ops) else "the end"
        cause = error.__cause__ if error is not None else "another number of operations"
        return new, at, f"the pruned forward fails at {where}: {cause}"
    changed = _changed_constants(old, new)
    if changed:
        again, _ = record_partly(small, inputs, training=training, asks_at=old.asks_at)
        for place in sorted(changed.keys() - _changed_constants(new, again)):  # what changes by itself was drawn
            op, value = changed[place]
            where = f"{op.func} in {op.module or 'the model'} ({op.where})"
            return new, op.index, f"{where}: the number {value} is computed from a width"
    return new, len(old.ops), None


def _changed_constants(old: Trace, new: Trace) -> dict[int, tuple[Op, Any]]:
    """Tensors of one number that the code makes and that differ: by place, the old operation that reads it, and the number."""
    before, after = ([i for i, t in enumerate(trace.tensors) if t.kind == "constant"] for trace in (old, new))
    found = {}
    for place, (i, j) in enumerate(zip(before, after, strict=True) if len(before) == len(after) else ()):
        value = new.tensors[j].value
        if value is not None and value == value and value != old.tensors[i].value:
            op = next((op for op in old.ops if i in op.inputs), None)
            if op is not None:
                found[place] = op, value
    return found


def _live(trace: Trace, ended: bool) -> list[Op]:
    """The operations that an output depends on; all, where the pass has not ended."""
    live = trace.live_ops() if ended else range(len(trace.ops))
    return [op for op in trace.ops if op.index in live]


def _computes(op: Op, replaced: set[str]) -> bool:
    if any(op.module == name or op.module.startswith(f"{name}.") for name in replaced):
        return False
    return op.computes


def _failed_at(before: list[Op], after: list[Op], old: Trace, new: Trace) -> int:
    """Index in the old trace of the operation at which the new one stopped: as many views after the last match."""
    if not after or len(after) > len(before):
        return 0 if not after else len(old.ops) - 1
    extra = len(new.ops) - 1 - after[-1].index
    return min(before[len(after) - 1].index + extra + 1, len(old.ops) - 1)


def _changed_scalar(a: Op, b: Op) -> Any:
    """A number among the arguments that differs (sizes may; factors, scales and exponents may not)."""
    for argument in a.func._schema.arguments:
        x, y = a.args.get(argument.name), b.args.get(argument.name)
        sized = str(argument.type) in ("int", "SymInt", "Optional[int]", "Optional[SymInt]")
        if isinstance(x, (int, float)) and not sized and x != y:
            return y
    return None


class _Change:
    """Set one attribute, by name, on all modules of one class whose old value has a new size of its own."""

    def __init__(self, targets: list[tuple[nn.Module, str, Any, Any]]) -> None:
        self.targets = targets
        self.key = frozenset((id(module), name, repr(new)) for module, name, _, new in targets)

    def apply(self) -> Any:
        for module, name, _, new in self.targets:
            setattr(module, name, new)

        def undo() -> None:
            for module, name, old, _ in self.targets:
                setattr(module, name, old)

        return undo


class _Swap:
    """Put graphs in the places of modules."""

    def __init__(self, small: nn.Module, graphs: Mapping[str, nn.Module]) -> None:
        self.small, self.graphs = small, graphs
        self.old = {path: small.get_submodule(path) for path in graphs}

    def apply(self) -> Any:
        self._put(self.graphs)
        return lambda: self._put(self.old)

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            owner, _, name = path.rpartition(".")
            self.small.get_submodule(owner)._modules[name] = module


def _graphs(
    small: nn.Module, parts: Parts, trace: Trace, at: int, again: Collection[type], only: Collection[type] | None = None
) -> Iterator[_Swap]:
    """A graph of the module around the operation at index `at`, the innermost first.

    Of classes that come up `again`, graphs of all modules in which the same line runs. `only` these classes are tried.
    """
    op = trace.ops[min(at, len(trace.ops) - 1)]
    path = op.module
    while path:
        kind = type(small.get_submodule(path))
        known = kind is RebuiltModule or kind.__module__.startswith("torch.")
        if not known and (only is None or kind in only):
            chosen = {path}
            if kind in again:
                ran = {o.module for o in trace.ops if o.where == op.where}
                alike = {p for p, m in small.named_modules() if type(m) is kind}
                chosen |= {p for p in alike if any(r == p or r.startswith(f"{p}.") for r in ran)}
            graphs = {}
            for each in sorted(chosen):
                with suppress(Exception):  # of one module in many; what stays wrong is told in the end
                    graphs[each] = parts.graph_of(each, small.get_submodule(each))
            if path in graphs:
                yield _Swap(small, graphs)
        path = path.rpartition(".")[0]


def _candidates(
    small: nn.Module,
    each: Pass,
    predicted: list[list[tuple[int, ...]]],
    at: int,
    originals: Originals,
    own: Collection[str],
) -> Iterator[_Change]:
    """Changes that might mend the operation at index `at`, the likeliest first; attributes in `own` differ by module."""
    modules = dict(small.named_modules())
    ops = each.trace.ops
    path = ops[min(at, len(ops) - 1)].module
    scopes = [path]
    while path:
        path = path.rpartition(".")[0]
        scopes.append(path)
    here = _new_sizes(each, predicted, "", {*range(max(at - 1, 0), min(at + 2, len(ops))), *_upstream(each.trace, at)})
    for scope in scopes:
        module = modules[scope]
        alike = [(n, m) for n, m in modules.items() if type(m) is type(module)] if scope else [(scope, module)]
        sizes = {n: _new_sizes(each, predicted, n) for n, _ in alike}
        names = [n for n, v in vars(module).items() if _holds_width(n, originals.get((id(module), n), v))]
        names = [n for n in names if _replaced(originals.get((id(module), n), vars(module)[n]), here, 0) is not None]
        for name in [n for n in names if n in own]:
            yield from _alone(module, name, sizes[scope], originals)
        for name in names:
            for choice in range(3):
                targets: list[tuple[nn.Module, str, Any, Any]] = []
                clear: list[tuple[nn.Module, str, Any, Any]] = []
                for other_scope, other in alike:
                    old = vars(other).get(name)
                    if (id(other), name) in originals or not _holds_width(name, old):
                        continue
                    new = _replaced(old, sizes[other_scope], choice)
                    if new is not None:
                        targets.append((other, name, old, new))
                        held = [old] if isinstance(old, int) else list(old or ())
                        if not any(n in sizes[other_scope].get(n, ()) for n in held):
                            clear.append(targets[-1])
                # Where a size stays in another place of the module, the integer may mean that place.
                for chosen in (clear, targets) if 0 < len(clear) < len(targets) else (targets,):
                    if chosen:
                        yield _Change(chosen)
        # What one choice for all modules of a class got wrong here
        for name in [n for n in names if n not in own]:
            yield from _alone(module, name, sizes[scope], originals)


def _alone(module: nn.Module, name: str, sizes: Sizes, originals: Originals) -> Iterator[_Change]:
    """All that one attribute of one module may be."""
    now = vars(module)[name]
    first = originals.get((id(module), name), now)
    for new in (first, *(_replaced(first, sizes, choice) for choice in range(3))):
        if new is not None and new != now:
            yield _Change([(module, name, now, new)])


def _holds_width(name: str, value: Any) -> bool:
    if name.startswith("_") or isinstance(value, bool) or name == "training":
        return False
    if isinstance(value, int):
        return value > 1
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(v, int) for v in value)


def _upstream(trace: Trace, at: int) -> set[int]:
    """The views that lead to an operation, and what computes their sources: a wrong view shows in what computes with it."""
    made = {out: op for op in trace.ops[:at] for out in op.outputs}
    found: set[int] = set()
    queue = trace.ops[at].inputs if at < len(trace.ops) else []
    while queue:
        op = made.get(queue.pop())
        if op is not None and op.index not in found:
            found.add(op.index)
            queue += [] if op.computes else op.inputs
    return found


def _new_sizes(
    each: Pass, predicted: list[list[tuple[int, ...]]], scope: str, at: Collection[int] | None = None
) -> Sizes:
    """Old size -> new sizes (itself, where it stays), over what operations inside a module (or only some) make."""
    sizes: Sizes = {}
    prefix = f"{scope}." if scope else ""
    shapes = each.trace.tensors
    for op in each.trace.ops if at is None else [each.trace.ops[i] for i in at]:
        if op.module != scope and not op.module.startswith(prefix):
            continue
        for out, new in zip(op.outputs, predicted[op.index], strict=True):
            for before, after in zip(shapes[out].shape, new, strict=True):
                sizes.setdefault(before, set()).add(before if after < 0 else after)
    return sizes


def _replaced(old: Any, sizes: Sizes, choice: int) -> Any:
    """`old` with sizes replaced: the choice-th new size of each; None where nothing changes."""

    def one(value: int) -> int:
        news = sorted(sizes.get(value, set()) - {value})
        return news[choice] if choice < len(news) else value

    new = one(old) if isinstance(old, int) else type(old)(one(v) for v in old)
    return None if new == old else new
