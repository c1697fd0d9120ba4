"""Single operations of a trace, run again at other widths, and the clock."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from prunewise.core.cost import CostModel
from prunewise.core.structure import Pass
from prunewise.core.trace import Inputs, Op, Ref, as_call
from prunewise.core.untouched import evaluating

Form = tuple[int, tuple[tuple[str, int], ...]]  # a size: constant + Σ count · units kept of a group


@dataclass(frozen=True)
class Case:
    """One distinct operation: `pattern` names it without the sizes that vary, `axes` are those sizes as they are in full.

    `build(sizes)` gives a call of it on the device with other sizes.
    """

    pattern: str
    axes: tuple[Form, ...]
    full: tuple[int, ...]
    least: tuple[int, ...]
    build: Callable[[Sequence[int]], Callable[[], Any]]

    @property
    def key(self) -> str:
        """Names the operation with its full sizes."""
        return f"{self.pattern} {self.full}"


def cases_of(
    costs: CostModel, each: Pass, device: torch.device, memory: torch.memory_format
) -> tuple[dict[str, Case], list[tuple[str, tuple[Form, ...]]]]:
    """The distinct operations whose size varies with the widths, by key; and (key, sizes) of every such call."""
    cases: dict[str, Case] = {}
    terms = []
    arena = _Arena(device, memory)
    for op in each.trace.ops:
        if _is_free(op):
            continue
        case = _case(costs, each, op, arena)
        if case is not None:
            cases.setdefault(case.key, case)
            terms.append((case.key, case.axes))
    return cases, terms


def _is_free(op: Op) -> bool:
    """Views take no time; in-place operations do."""
    return op.is_view or op.name in ("_unsafe_view", "detach")


def _case(costs: CostModel, each: Pass, op: Op, arena: _Arena) -> Case | None:
    """One operation, ready to be run at other widths; None where its time does not depend on them or it cannot be run alone."""
    leaves = [leaf for leaf in tree_flatten(op.args)[0] if isinstance(leaf, Ref)]
    if not leaves or any(not each.trace.tensors[leaf.id].dtype.is_floating_point for leaf in leaves):
        return None
    forms: dict[Form, int] = {}

    def form(size: Form) -> int | str:
        return size[0] if not size[1] else "abcdefghijkl"[forms.setdefault(size, len(forms))]

    shapes: dict[int, list[Form]] = {}
    for leaf in leaves:
        info = each.trace.tensors[leaf.id]
        layout = each.layouts.get(leaf.id)
        shapes[leaf.id] = [
            costs.size_form(layout, d) if layout is not None else (n, ()) for d, n in enumerate(info.shape)
        ]
    groups: Form | None = None
    if op.index in each.group_counts:
        groups = costs.count_form(each.group_counts[op.index])
    words = [str(op.func)]
    for name, value in op.args.items():
        if name == "groups" and groups is not None:
            words.append(f"groups={form(groups)}")
            continue
        described = tree_map(
            lambda leaf: (
                [str(each.trace.tensors[leaf.id].dtype)[6:], *map(form, shapes[leaf.id])]
                if isinstance(leaf, Ref)
                else leaf
            ),
            value,
        )
        words.append(f"{name}={described}")
    if not forms or len(forms) > 12:
        return None
    axes = tuple(forms)
    sizes = {g.name: g.size for g in costs.groups}
    full = tuple(base + sum(n * sizes[name] for name, n in counts) for base, counts in axes)
    least = tuple(base + sum(n for _, n in counts) for base, counts in axes)
    if not _sizes_are_free(op, each):
        return None

    def build(at: Sequence[int]) -> Callable[[], Any]:
        now = dict(zip(axes, at, strict=True))
        number = iter(range(len(leaves)))

        def leaf(value: Any) -> Any:
            if not isinstance(value, Ref):
                return value
            shape = [base if not counts else now[base, counts] for base, counts in shapes[value.id]]
            return arena.tensor(next(number), shape, each.trace.tensors[value.id].dtype)

        args = tree_map(leaf, op.args)
        if groups is not None:
            args["groups"] = now.get(groups, groups[0])
        return lambda: op.func(**args)

    pattern = " ".join(words)
    if len(axes) > 2:
        # Along the diagonal only: one axis, the sum of all.
        total: Form = (sum(base for base, _ in axes), _added([counts for _, counts in axes]))

        def along(at: Sequence[int]) -> Callable[[], Any]:
            share = (at[0] - sum(least)) / max(1, sum(full) - sum(least))
            return build([a + round(share * (b - a)) for a, b in zip(least, full, strict=True)])

        return Case(pattern, (total,), (sum(full),), (sum(least),), along)
    return Case(pattern, axes, full, least, build)


def _added(counts: Sequence[tuple[tuple[str, int], ...]]) -> tuple[tuple[str, int], ...]:
    total: Counter[str] = Counter()
    for row in counts:
        total.update(dict(row))
    return tuple(total.items())


def _sizes_are_free(op: Op, each: Pass) -> bool:
    """False where the arguments hold sizes themselves (`expand`, `split`, `new_zeros`), which would have to follow."""
    names = {
        "size",
        "split_sizes",
        "split_size",
        "sizes",
        "output_size",
        "start",
        "end",
        "index",
        "indices",
        "shape",
        "normalized_shape",
        "N",
        "C",
        "group",
    }
    return not any(name in names and op.args[name] is not None for name in op.args) or op.name in _POOLS


_POOLS = ("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d")


class _Arena:
    """Operands for timing: views of one long random vector for each argument, so that memory stays bounded."""

    def __init__(self, device: torch.device, memory: torch.memory_format) -> None:
        self.device, self.memory = device, memory
        self._vectors: dict[tuple[int, torch.dtype], Tensor] = {}

    def tensor(self, argument: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape; its values are in (0.5, 1.5), fit for variances and divisors."""
        n = max(1, int(np.prod(shape)))
        vector = self._vectors.get((argument, dtype))
        if vector is None or len(vector) < n:
            vector = (torch.rand(n, device=self.device) + 0.5).to(dtype)
            self._vectors[argument, dtype] = vector
        if self.memory == torch.channels_last and len(shape) == 4:
            a, b, c, d = shape
            return vector[:n].view(a, c, d, b).permute(0, 3, 1, 2)
        return vector[:n].view(list(shape))


# -- the clock ------------------------------------------------------------------------------------------


def interleaved(
    calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float, least: int = 3
) -> list[float]:
    """Median milliseconds of each call; one of each in turn, so that what else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    # With one thread on a CPU the thread's own time is the latency, and other jobs on the machine do not stretch it.
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    with torch.no_grad():
        for call in calls:
            for _ in range(2):
                call()
        rounds = 0
        while rounds < least or (rounds < 200 and time.perf_counter() < end):
            for call, row in zip(calls, times, strict=True):
                _wait(device)
                start = clock()
                call()
                _wait(device)
                row.append((clock() - start) * 1e3)
            rounds += 1
    return [median(row) for row in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def runner(model: nn.Module, example_inputs: Inputs, device: torch.device) -> Callable[[], Any]:
    """A call of the model in eval mode on `device`."""
    own = model if device_of(model) == device else copy.deepcopy(model).to(device)
    args, kwargs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, as_call(example_inputs))

    def run() -> None:
        with evaluating(own), torch.no_grad():
            own(*args, **kwargs)

    return run


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """That of the 4-D weights."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    last = [w for w in weights if not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)]
    return torch.channels_last if last else torch.contiguous_format
