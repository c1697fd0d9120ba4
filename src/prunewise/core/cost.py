"""What a network costs: multiply-adds, parameters, activation bytes; exact, and differentiable in the group widths.

Every size in the network is a linear form in the widths of the channel groups, and every cost a sum of products of
such sizes. Both are read off the trace, so the cost of a pruned network is known before it exists.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prunewise.core.groups import Grouping, find_groups
from prunewise.core.labels import Block, Layout
from prunewise.core.structure import Pass, analyse
from prunewise.core.trace import Inputs, Op, Ref, Trace

# A factor of a product: (tensor id, dimension), or a constant.
Factor = tuple[int, int] | int

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
)  # fmt: skip


@dataclass(frozen=True)
class LayerCost:
    """One row of `Cost.by_layer()`: what the calls made in one module cost."""

    name: str
    macs: int
    params: int
    activation_bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass on the example inputs.

    Attributes:
        macs: multiply-adds of convolutions, matrix products and attention (FLOPs = 2 x MACs).
        params: number of parameters, shared ones counted once.
        activation_bytes: bytes of all tensors that the forward pass writes (views are free): what training must hold
            at the most, not the peak of inference.
    """

    macs: int
    params: int
    activation_bytes: int
    _layers: tuple[LayerCost, ...] = field(default=(), repr=False, compare=False)

    def by_layer(self) -> list[LayerCost]:
        """One row a module that costs anything, in no particular order; parameters stand with the module that owns them."""
        return list(self._layers)

    def as_dict(self) -> dict[str, int]:
        """The three totals."""
        return {"macs": self.macs, "params": self.params, "activation_bytes": self.activation_bytes}


@dataclass
class _Terms:
    """A cost as Σ coefficient · Π sizes. `factors` index into the linear forms; form 0 is the constant 1."""

    factors: list[tuple[int, ...]] = field(default_factory=list)
    coefficients: list[int] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def add(self, factors: tuple[int, ...], coefficient: int, layer: str) -> None:
        if coefficient:
            self.factors.append(tuple(sorted(factors)))
            self.coefficients.append(coefficient)
            self.layers.append(layer)


class CostModel:
    """The cost of a model as a function of how many units of each group are kept.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> cost = CostModel.of(model, torch.zeros(1, 4))
        >>> cost(cost.widths).macs, cost({"0": 3}).macs
        (48, 18)
    """

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.groups = [g for g in grouping.groups if g.prunable]
        self._column = {id(g): i for i, g in enumerate(self.groups)}
        self._column_of_group = np.array([self._column.get(id(g), -1) for g in grouping.groups], dtype=np.int64)
        self._forms: dict[tuple[int, bytes], int] = {}
        self._rows: list[tuple[int, dict[int, int]]] = []
        self._by_block: dict[tuple[int, int], int] = {}
        self._alive: list[npt.NDArray[np.int64]] = []
        self._form(1, {})
        self._terms = {"macs": _Terms(), "params": _Terms(), "activation_bytes": _Terms()}
        # Branches that can be dropped, innermost first; the gate of number i is factor -1 - i.
        self._branches = sorted((b for b in grouping.branches if not b.reason), key=lambda b: len(b.inside))
        column = {g.name: i for i, g in enumerate(self.groups)}
        self._cuts = [[column[name] for name in b.cuts] for b in self._branches]
        self._collect_params()
        self._collect_ops(grouping.structure.passes[0])
        matrix = np.zeros((len(self._rows), len(self.groups)))
        for i, (_, counts) in enumerate(self._rows):
            for k, count in counts.items():
                matrix[i, k] = count
        self._matrix = torch.from_numpy(matrix)
        self._constant = torch.tensor([float(c) for c, _ in self._rows], dtype=torch.float64)
        self._merged = {kind: _merge(terms) for kind, terms in self._terms.items()}
        self._device_cache: dict[tuple[str, torch.device], tuple[Tensor, ...]] = {}

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs) -> CostModel:
        """The cost model of a module, traced on `example_inputs`."""
        return cls(find_groups(analyse(model, example_inputs)))

    @property
    def widths(self) -> dict[str, int]:
        """The full widths: every prunable group's size by its name."""
        return {g.name: g.size for g in self.groups}

    def __call__(self, kept: Mapping[str, int]) -> Cost:
        """Cost with `kept[name]` units of each group; groups not named are kept whole."""
        numbers = [int(kept.get(g.name, g.size)) for g in self.groups]
        sizes = [c + sum(n * numbers[k] for k, n in counts.items()) for c, counts in self._rows]
        sizes += [min(1, *(numbers[k] for k in cuts)) for cuts in reversed(self._cuts)]  # found by factors -1, -2, …
        totals = {}
        layers: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(self._terms, 0))
        for kind, terms in self._terms.items():
            total = 0
            for factors, coefficient, layer in zip(terms.factors, terms.coefficients, terms.layers, strict=True):
                value = coefficient
                for f in factors:
                    value *= sizes[f]
                total += value
                layers[layer][kind] += value
            totals[kind] = total
        rows = tuple(LayerCost(name, **values) for name, values in layers.items())
        return Cost(totals["macs"], totals["params"], totals["activation_bytes"], rows)

    def tensor(self, kind: str, kept: Tensor) -> Tensor:
        """One cost as a scalar tensor, differentiable in `kept`.

        Args:
            kind: "macs", "params" or "activation_bytes".
            kept: widths of the prunable groups in the order of `groups`, shape (groups,), any float dtype.

        Returns:
            float64 scalar on the device of `kept`.
        """
        matrix, constant, index, coefficients = self._on(kind, kept.device)
        kept = kept.to(torch.float64)
        sizes = matrix @ kept + constant
        if self._cuts:
            gates = [kept[cuts].min().clamp(max=1) for cuts in reversed(self._cuts)]
            sizes = torch.cat([sizes, torch.stack(gates)])
        return (coefficients * sizes[index].prod(dim=1)).sum()

    def size_form(self, layout: Layout, dim: int) -> tuple[int, tuple[tuple[str, int], ...]]:
        """The size of a dimension as a linear form: a constant, and how much each unit of a group adds."""
        constant, counts = self._rows[self._size(layout, dim)]
        return constant, tuple((self.groups[k].name, n) for k, n in sorted(counts.items()))

    def count_form(self, labels: npt.NDArray[np.int64]) -> tuple[int, tuple[tuple[str, int], ...]]:
        """How many of these labels (one dimension's) there are, as a linear form like `size_form`'s."""
        return self.size_form(Layout((len(labels),), (Block((0,), labels),)), 0)

    def shape(self, layout: Layout, kept: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a tensor with this layout when `kept[name]` units of each group stay."""
        sizes = []
        for dim in range(len(layout.shape)):
            constant, counts = self._rows[self._size(layout, dim)]
            units = ((n, self.groups[k]) for k, n in counts.items())
            sizes.append(constant + sum(n * kept.get(g.name, g.size) for n, g in units))
        return tuple(sizes)

    def count(self, labels: npt.NDArray[np.int64], kept: Mapping[str, int]) -> int:
        """How many of these labels (one dimension's) stay when `kept[name]` units of each group do."""
        return self.shape(Layout((len(labels),), (Block((0,), labels),)), kept)[0]

    def _on(self, kind: str, device: torch.device) -> tuple[Tensor, ...]:
        key = (kind, device)
        if key not in self._device_cache:
            parts = (self._matrix, self._constant, *self._merged[kind])
            self._device_cache[key] = tuple(t.to(device) for t in parts)
        return self._device_cache[key]

    # -- reading the trace ----------------------------------------------------------------------------------------

    def _form(self, constant: int, counts: dict[int, int]) -> int:
        key = (constant, np.array(sorted(counts.items()), dtype=np.int64).tobytes())
        if key not in self._forms:
            self._forms[key] = len(self._rows)
            self._rows.append((constant, counts))
        return self._forms[key]

    def _size(self, layout: Layout, dim: int) -> int:
        """The linear form of a dimension's size."""
        block = layout.block_at(dim)
        if block is None:
            return self._form(layout.shape[dim], {})
        axis = block.dims.index(dim)
        cached = self._by_block.get((id(block.labels), axis))
        if cached is not None:
            return cached
        table = np.moveaxis(block.labels, axis, 0).reshape(block.labels.shape[axis], -1)
        classes = self.grouping.classes(table)
        if (classes == classes[:, :1]).all():
            rows = classes[:, 0]
            groups = np.full(len(rows), -1)
            groups[rows >= 0] = self.grouping.group_of[rows[rows >= 0]]
            groups[groups >= 0] = self._column_of_group[groups[groups >= 0]]
            unique, counts = np.unique(groups, return_counts=True)
            found = dict(zip(unique.tolist(), counts.tolist(), strict=True))
            constant = found.pop(-1, 0)
            # A group's units are alike, so each owns the same number of indices here.
            form = self._form(constant, {k: n // self.groups[k].size for k, n in found.items()})
        else:  # joint labels that go column by column: this dimension stays whole
            form = self._form(layout.shape[dim], {})
        self._by_block[(id(block.labels), axis)] = form
        self._alive.append(block.labels)  # its id must not be taken by another array
        return form

    def _product(
        self, layouts: dict[int, Layout], trace_shape: Any, factors: list[Factor]
    ) -> tuple[tuple[int, ...], int]:
        forms, coefficient = [], 1
        for factor in factors:
            if isinstance(factor, int):
                coefficient *= factor
                continue
            tensor, dim = factor
            form = self._size(layouts.get(tensor) or Layout(trace_shape(tensor)), dim)
            constant, counts = self._rows[form]
            if counts:
                forms.append(form)
            else:
                coefficient *= constant
        return tuple(forms), coefficient

    def _collect_params(self) -> None:
        structure = self.grouping.structure
        trace = structure.trace
        for index in dict.fromkeys(trace.state.values()):
            info = trace.tensors[index]
            if info.kind == "param":
                layout = structure.flow.state[info.name]
                factors: list[Factor] = [(index, d) for d in range(len(info.shape))]
                forms, coefficient = self._product({index: layout}, None, factors)
                gate = tuple(-1 - i for i, b in enumerate(self._branches) if info.name in b.gone)[:1]
                self._terms["params"].add(forms + gate, coefficient, info.name.rpartition(".")[0])

    def _collect_ops(self, each: Pass) -> None:
        def shape(tensor: int) -> tuple[int, ...]:
            return each.trace.tensors[tensor].shape

        for op in each.trace.ops:
            gate = self._gate(op)
            for factors in multiply_adds(op, shape):
                forms, coefficient = self._product(each.layouts, shape, factors)
                self._terms["macs"].add(forms + gate, coefficient, op.module)
            if not _writes(op):
                continue
            for index in op.outputs:
                info = each.trace.tensors[index]
                factors = [info.dtype.itemsize, *((index, d) for d in range(len(info.shape)))]
                forms, coefficient = self._product(each.layouts, shape, factors)
                self._terms["activation_bytes"].add(forms + gate, coefficient, op.module)
        self._collect_zeros(each)

    def _gate(self, op: Op) -> tuple[int, ...]:
        """The gate of the innermost branch that the operation changes or goes with."""
        for i, branch in enumerate(self._branches):
            if op.index in branch.gone_ops or op.index in branch.carried:
                return (-1 - i,)
        return ()

    def _collect_zeros(self, each: Pass) -> None:
        """What dropped branches still write: zeros like their input."""
        for i, branch in enumerate(self._branches):
            like = each.trace.tensors[branch.entry]
            around = tuple(-1 - j for j, b in enumerate(self._branches) if branch.inside < b.inside)[:1]
            written = [(branch.fresh * like.dtype.itemsize, branch.stubs[0].path)]
            for index in sorted(branch.carried):
                op = each.trace.ops[index]
                if _writes(op):
                    written.append((each.trace.tensors[op.outputs[0]].dtype.itemsize, op.module))
            for size, module in written:
                factors: list[Factor] = [size, *((branch.entry, d) for d in range(len(like.shape)))]
                forms, coefficient = self._product(each.layouts, lambda t: each.trace.tensors[t].shape, factors)
                self._terms["activation_bytes"].add(forms + around, coefficient, module)
                self._terms["activation_bytes"].add((*forms, -1 - i), -coefficient, module)


def _writes(op: Op) -> bool:
    """True where an operation writes new tensors."""
    return op.name != "_unsafe_view" and all(r.alias_info is None for r in op.func._schema.returns)


def writes(op: Op, trace: Trace) -> int:
    """How many bytes an operation writes."""
    outputs = [trace.tensors[i] for i in op.outputs] if _writes(op) else []
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in outputs)


def multiply_adds(op: Op, shape: Any) -> list[list[Factor]]:
    """The multiply-adds of one operation, as products of tensor sizes."""
    a = op.args

    def dims(ref: Ref, *which: int) -> list[Factor]:
        rank = len(shape(ref.id))
        return [(ref.id, d % rank) for d in which]

    if op.name in ("convolution", "_convolution"):
        weight, spatial = a["weight"], a["input"] if a["transposed"] else Ref(op.outputs[0])
        kernel = int(np.prod(shape(weight.id)[2:]))
        places = int(np.prod(shape(spatial.id)[2:]))
        return [[kernel * places, *dims(a["input"], 0), *dims(weight, 0, 1)]]
    if op.name == "mm":
        return [dims(a["self"], 0, 1) + dims(a["mat2"], 1)]
    if op.name == "addmm":
        return [dims(a["mat1"], 0, 1) + dims(a["mat2"], 1)]
    if op.name == "bmm":
        return [dims(a["self"], 0, 1, 2) + dims(a["mat2"], 2)]
    if op.name == "baddbmm":
        return [dims(a["batch1"], 0, 1, 2) + dims(a["batch2"], 2)]
    if op.name == "_grouped_mm" and len(shape(a["self"].id)) == 2:
        return [dims(a["self"], 0, 1) + dims(a["mat2"], -1)]
    if op.name == "linear":
        rank = len(shape(a["input"].id))
        return [dims(a["input"], *range(rank)) + dims(a["weight"], 0)]
    if op.name in _ATTENTION:
        q, k, v = a["query"], a["key"], a["value"]
        batch = dims(q, *range(len(shape(q.id)) - 2))
        return [batch + dims(q, -2, -1) + dims(k, -2), batch + dims(q, -2) + dims(k, -2) + dims(v, -1)]
    return []


def _merge(terms: _Terms) -> tuple[Tensor, Tensor]:
    """Equal products added up: (index of factors, shape (terms, degree); coefficients, float64)."""
    merged: dict[tuple[int, ...], int] = defaultdict(int)
    for factors, coefficient in zip(terms.factors, terms.coefficients, strict=True):
        merged[factors] += coefficient
    degree = max((len(f) for f in merged), default=1) or 1
    index = [f + (0,) * (degree - len(f)) for f in merged] or [(0,) * degree]
    values = [float(c) for c in merged.values()] or [0.0]
    return torch.tensor(index, dtype=torch.int64), torch.tensor(values, dtype=torch.float64)


def measure(model: nn.Module, example_inputs: Inputs) -> Cost:
    """Multiply-adds, parameters and activation bytes of one forward pass, without running it.

    Args:
        model: any module, on any device (the meta device too).
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments).

    Returns:
        `Cost` with ints. Multiply-adds agree with `torch.utils.flop_counter.FlopCounterMode` (its flops / 2).

    Raises:
        TraceError: the forward pass fails on `example_inputs`.

    Example:
        >>> from torch import nn
        >>> measure(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 10, 10)).macs
        13824
    """
    return CostModel.of(model, example_inputs)({})
