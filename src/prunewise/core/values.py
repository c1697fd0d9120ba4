"""A trace in single-assignment form: what each operation reads and makes, and which zeros stay zero."""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappop, heappush
from typing import Any

from torch.utils._pytree import tree_flatten

from prunewise.core.trace import Op, Ref, Trace


class Values:
    """A trace in single-assignment form: in-place operations make new values of all that shares memory."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.tensor: list[int] = []  # value -> tensor id
        self.producer: list[int] = []  # value -> operation, -1: none
        self.reads: list[list[int]] = []  # operation -> values
        self.makes: list[list[int]] = []  # operation -> values; those of its outputs come first
        self.arguments: list[dict[int, int]] = []  # operation -> tensor id -> value read
        self._history: dict[int, tuple[list[int], list[int]]] = {}  # tensor -> (operations, values)
        family: dict[int, int] = {}

        def root(t: int) -> int:
            while family.get(t, t) != t:
                t = family[t]
            return t

        members: dict[int, list[int]] = {}
        for op in trace.ops:
            inputs = op.inputs
            seen = {t: self._now(t) for t in inputs}
            returns = op.func._schema.returns
            written = op.written
            others = {m for t in written for m in members.get(root(t), [t])} - set(op.outputs)
            extra = [self._now(m) for m in others if m not in seen]
            self.arguments.append(seen)
            self.reads.append([*seen.values(), *extra])
            made = [self._new(t, op.index) for t in dict.fromkeys([*op.outputs, *sorted(others)])]
            self.makes.append(made)
            if any(r.alias_info is not None for r in returns) and inputs:
                for out in op.outputs:
                    a, b = root(inputs[0]), root(out)
                    if a != b:
                        family[b] = a
                        members[a] = members.get(a, [a]) + members.pop(b, [b])
        self.consumers: list[list[int]] = [[] for _ in self.tensor]
        for index, reads in enumerate(self.reads):
            for value in dict.fromkeys(reads):
                self.consumers[value].append(index)
        self.results = {self._now(t) for t in trace.outputs}
        while len(self.consumers) < len(self.tensor):
            self.consumers.append([])
        self.dead = self._dead()

    def _new(self, tensor: int, op: int) -> int:
        self.tensor.append(tensor)
        self.producer.append(op)
        history = self._history.setdefault(tensor, ([], []))
        history[0].append(op)
        history[1].append(len(self.tensor) - 1)
        return len(self.tensor) - 1

    def _now(self, tensor: int) -> int:
        history = self._history.get(tensor)
        return history[1][-1] if history else self._new(tensor, -1)

    def at(self, tensor: int, op: int) -> int | None:
        """The value of a tensor before operation `op` runs."""
        history = self._history.get(tensor)
        if history is None:
            return None
        k = bisect_right(history[0], op - 1) - 1
        return history[1][k] if k >= 0 else None

    def first(self, tensor: int) -> int | None:
        """The value that a parameter or an input comes with."""
        history = self._history.get(tensor)
        return history[1][0] if history and history[0][0] < 0 else None

    def _dead(self) -> set[int]:
        dead: set[int] = set()
        for index in reversed(range(len(self.makes))):
            if all(v not in self.results and dead.issuperset(self.consumers[v]) for v in self.makes[index]):
                dead.add(index)
        return dead

    def info(self, value: int) -> Any:
        """Shape, dtype and kind of a value."""
        return self.trace.tensors[self.tensor[value]]

    def is_state(self, value: int) -> bool:
        """True for parameters and buffers as they come."""
        return self.producer[value] < 0 and self.info(value).kind in ("param", "buffer")

    def slice_of(self, y: int) -> frozenset[int]:
        """The operations whose results flow into `y` only (and what is computed for nothing on the way)."""
        inside: set[int] = set()
        queue = [-self.producer[y]]  # the latest operation first: all that reads its results has been seen by then
        seen = set(queue)
        while queue:
            index = -heappop(queue)
            for value in self.makes[index]:
                readers = self.consumers[value]
                if value != y and (
                    value in self.results or any(r not in inside and r not in self.dead for r in readers)
                ):
                    break
            else:
                inside.add(index)
                for value in self.reads[index]:
                    key = -self.producer[value]
                    if self.producer[value] >= 0 and key not in seen:
                        seen.add(key)
                        heappush(queue, key)
        return frozenset(inside)

    def cone(self, value: int) -> set[int]:
        """All values that `value` is computed from, itself included."""
        seen, queue = {value}, [value]
        while queue:
            producer = self.producer[queue.pop()]
            for v in self.reads[producer] if producer >= 0 else ():
                if v not in seen:
                    seen.add(v)
                    queue.append(v)
        return seen


_ZERO_STAYS = {
    "clone", "_unsafe_view", "contiguous", "_to_copy", "detach", "alias", "dropout", "native_dropout", "feature_dropout",
    "relu", "gelu", "silu", "tanh", "leaky_relu", "elu", "selu", "celu", "mish", "hardswish", "relu6", "abs", "neg",
    "sin", "erf", "prelu", "_prelu_kernel", "softshrink", "hardshrink", "softsign", "sqrt", "square", "sign",
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "avg_pool1d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "max_pool3d_with_indices", "mean", "sum", "amax", "amin", "roll",
    "flip", "index_select", "gather", "repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest1d",
    "tril", "triu", "reflection_pad2d", "replication_pad2d", "cumsum", "zeros_like", "convert_element_type", "unfold",
    "im2col", "col2im",
}  # fmt: skip
_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "batch_norm_with_update", "_batch_norm_with_update", "miopen_batch_norm", "_batch_norm_no_update",
    "_native_batch_norm_legit_functional", "batch_norm", "native_layer_norm", "layer_norm", "rms_norm",
    "_fused_rms_norm", "native_group_norm", "group_norm",
}  # fmt: skip


def zeroing(op: Op) -> list[list[Any]]:
    """Alternatives: arguments that make the (first) result exactly zero when all of them are zero."""
    a = op.args
    refs = [leaf for leaf in tree_flatten(a)[0] if isinstance(leaf, Ref)]
    x = a.get("self", a.get("input", refs[0] if refs else None))
    name = op.name
    if name in ("mul", "multiply"):
        return [[a["self"]], [a["other"]]]
    if name == "div":
        return [[a["self"]]] if a.get("rounding_mode") is None else []
    if name in ("add", "sub"):
        return [[a["self"], a["other"]]]
    if name in ("cat", "stack"):
        return [list(a["tensors"])]
    if name == "copy":
        return [[a["src"]]]
    if name in ("mm", "bmm", "mv", "dot"):
        y = a.get("mat2") or a.get("vec") or a.get("tensor")
        return [[y], [x]]
    if name in ("addmm", "baddbmm", "addmv"):
        m1, m2 = a.get("mat1") or a.get("batch1") or a.get("mat"), a.get("mat2") or a.get("batch2") or a.get("vec")
        return [[m2, a["self"]], [m1, a["self"]]]
    if name in ("linear", "convolution", "_convolution"):
        bias = [a["bias"]] if a.get("bias") is not None else []
        return [[a["weight"], *bias], [a["input"], *bias]]
    if name in _NORMS:
        weight, bias = a.get("weight"), [a["bias"]] if a.get("bias") is not None else []
        own = [[weight, *bias]] if weight is not None else []
        by_batch = "batch_norm" in name and not a.get("training")  # in eval mode: instance norm is the other kind
        return own if by_batch else [*own, [a["input"], *bias]]
    if name.startswith("_scaled_dot_product") or name == "scaled_dot_product_attention":
        return [[a["value"]]]
    if name in ("_weight_norm_interface", "_weight_norm"):
        return [[a["g"]], [a["v"]]]
    if name == "constant_pad_nd":
        return [[x]] if a.get("value", 0) == 0 else []
    if name in ("hardtanh", "clamp"):
        low, high = (a.get("min_val"), a.get("max_val")) if name == "hardtanh" else (a.get("min"), a.get("max"))
        plain = all(v is None or isinstance(v, (int, float)) for v in (low, high))
        return [[x]] if plain and (low is None or low <= 0) and (high is None or high >= 0) else []
    if name == "pow":
        return [[x]] if isinstance(a.get("exponent"), (int, float)) and a["exponent"] > 0 else []
    return [[x]] if name in _ZERO_STAYS or op.is_view else []
