"""One forward pass, recorded as ATen operations.

The model runs on fake tensors: shapes and dtypes flow, nothing is computed and no memory is taken, so a model on the
meta device is traced as easily as one on a GPU. Where its code asks for values (`x[mask]`, `.item()`), it runs on copies of
the real ones instead. Whatever Python the user's `forward` runs, the operations that reach
the dispatcher are recorded, with the parameter names, the module that called, and the line of the user's code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from prunewise.core.checks import require_module
from prunewise.core.errors import TraceError
from prunewise.core.lines import line_here, line_of
from prunewise.core.untouched import (
    attributes_kept,
    drop_cached_fakes,
    forget_caches,
    in_mode,
    nothing_converted,
    nothing_fused,
    quiet,
    seeded,
)

Inputs = Any  # a tensor, a tuple of positional arguments, or a dict of keyword arguments


@dataclass(frozen=True)
class Ref:
    """Stands for tensor number `id` of a trace, in the arguments of an operation."""

    id: int


@dataclass(frozen=True)
class TensorInfo:
    """What is known of one tensor: `kind` is op, param, buffer, input or constant; `name` of the first two kinds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    name: str = ""
    value: Any = None  # of a constant that is a single number, where it is known


@dataclass(frozen=True)
class Op:
    """One recorded call. `args` are bound by the names of the operator's schema, tensors replaced by `Ref`."""

    index: int
    func: torch._ops.OpOverload
    args: dict[str, Any]
    outputs: tuple[int, ...]
    module: str  # path of the module whose forward made the call
    where: str  # file:line of the user's code

    @property
    def name(self) -> str:
        """The operator's name without namespace, overload and in-place mark: `add` for `aten::add_.Tensor`."""
        name = self.func._schema.name.split("::")[1]
        return name[:-1] if name.endswith("_") and not name.startswith("__") else name

    @property
    def is_view(self) -> bool:
        """True where a result shares memory with an argument that stays as it is."""
        return any(r.alias_info is not None and not r.alias_info.is_write for r in self.func._schema.returns)

    @property
    def writes(self) -> bool:
        """True where an argument is changed in place."""
        return bool(self._write_arguments)

    @property
    def written(self) -> list[int]:
        """Ids of the tensors that are changed in place."""
        leaves = tree_flatten([self.args.get(name) for name in self._write_arguments])[0]
        return [leaf.id for leaf in leaves if isinstance(leaf, Ref)]

    @property
    def _write_arguments(self) -> list[str]:
        return [a.name for a in self.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    @property
    def computes(self) -> bool:
        """False for views and copies: what they do shows in the operations that read them."""
        return not self.is_view and self.name not in ("clone", "_unsafe_view", "contiguous", "as_strided")

    @property
    def tells(self) -> bool:
        """True where Python sees values: a number, or a size that depends on them."""
        return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(self.func.tags))

    @property
    def inputs(self) -> list[int]:
        """Ids of all tensor arguments, in order."""
        return [leaf.id for leaf in tree_flatten(self.args)[0] if isinstance(leaf, Ref)]


@dataclass
class Trace:
    """The operations of one forward pass, in order."""

    ops: list[Op] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    state: dict[str, int] = field(default_factory=dict)  # parameter or buffer name -> tensor id (tied names share it)
    unsaved: set[str] = field(default_factory=set)  # names of buffers that are not in the state_dict
    replaced: set[str] = field(default_factory=set)  # names of buffers that forward puts another tensor in the place of
    told: set[int] = field(default_factory=set)  # ids of tensors that Python read as a whole: tolist(), numpy()
    asks_at: str = ""  # the line where the code asked for a value, in a pass on real values; "" on fake tensors

    def live_ops(self) -> set[int]:
        """Indices of the operations that an output depends on, that write in place, or that tell Python a value."""
        wanted = set(self.outputs) | self.told
        live = set()
        for op in reversed(self.ops):
            if op.writes or (self.asks_at and op.tells) or not wanted.isdisjoint(op.outputs):
                live.add(op.index)
                wanted.update(op.inputs)
        return live

    def draws_random_numbers(self) -> bool:
        """True where two passes on the same inputs may differ."""
        return any(torch.Tag.nondeterministic_seeded in op.func.tags for op in self.ops)

    def used_state(self) -> set[int]:
        """Ids of the parameters and buffers that some operation reads."""
        return {i for op in self.ops for i in op.inputs if self.tensors[i].kind in ("param", "buffer")}


def as_call(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as (positional, keyword) arguments: a tuple is positional, a dict keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return example_inputs, {}
    if isinstance(example_inputs, list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


class Recorder(TorchDispatchMode):
    """Writes every operation that reaches the dispatcher into a `Trace`."""

    def __init__(self, trace: Trace, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self._stack = stack
        self._ids: Any = WeakIdKeyDictionary()
        self._alive: list[Tensor] = []

    def register(self, tensor: Tensor, kind: str, name: str = "") -> int:
        """The id of `tensor`, new if it was not seen before."""
        known = self._ids.get(tensor)
        shape = tuple(int(s) for s in tensor.shape)
        # In-place views (`transpose_`) give a known tensor another shape: a new id from there on.
        if known is not None and self.trace.tensors[known].shape == shape:
            return int(known)
        index = len(self.trace.tensors)
        value = _number(tensor) if kind == "constant" else None
        self.trace.tensors.append(TensorInfo(shape, tensor.dtype, kind, name, value))
        self._ids[tensor] = index
        self._alive.append(tensor)  # an id must never be reused for another tensor
        return index

    def let_go(self) -> list[weakref.ref[Tensor]]:
        """Hold the recorded tensors no longer; weak references tell which of them somebody else holds."""
        alive = [weakref.ref(t) for t in self._alive]
        self._alive.clear()
        return alive

    def known(self, tensor: Tensor) -> int | None:
        """The id of a tensor that was seen; None for any other."""
        index = self._ids.get(tensor)
        return None if index is None else int(index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def ref(leaf: Any) -> Any:
            return Ref(self.register(leaf, "constant")) if isinstance(leaf, Tensor) else leaf

        if func.namespace == "prim":  # asks for a device or a layout: no data flows
            return func(*args, **kwargs)
        schema = func._schema.arguments
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound.update({a.name: tree_map(ref, v) for a, v in zip(schema, args, strict=False)})
        bound.update({k: tree_map(ref, v) for k, v in kwargs.items()})
        out = _SHAPES[func](*args, **kwargs) if func in _SHAPES else func(*args, **kwargs)
        outputs = tuple(self.register(t, "op") for t in tree_flatten(out)[0] if isinstance(t, Tensor))
        module = self._stack[-1] if self._stack else ""
        self.trace.ops.append(Op(len(self.trace.ops), func, bound, outputs, module, line_here()))
        return out


def _number(tensor: Tensor) -> Any:
    """What a tensor with one element holds that is no fake."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() != 1:
        return None
    with _disable_current_modes():
        return tensor.item()


def _grouped_mm(x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `torch._grouped_mm` returns; torch's own shape function takes bfloat16 alone, as its GPU kernel does."""
    if x.dim() == 2 and y.dim() == 3:
        return x.new_empty(x.shape[0], y.shape[2])
    result: Tensor = torch.ops.aten._grouped_mm.default(x, y, *args, **kwargs)
    return result


_SHAPES: dict[Any, Any] = {torch.ops.aten._grouped_mm.default: _grouped_mm} if hasattr(torch, "_grouped_mm") else {}


class _Listener(TorchFunctionMode):
    """Notes the tensors that Python reads past the dispatcher."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = self._recorder.known(args[0]) if func in _READ_WHOLE else None
        if known is not None:
            self._recorder.trace.told.add(known)
        return func(*args, **(kwargs or {}))


_READ_WHOLE = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """While active, the returned list holds the path of the module whose forward runs, innermost last."""
    names = {id(m): name for name, m in model.named_modules(remove_duplicate=True)}
    stack: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            stack.append(names[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in names and stack:
            stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, example_inputs: Inputs, *, training: bool = False) -> Trace:
    """Record one forward pass of `model` on `example_inputs`, on fake tensors or, where its code asks for values, real ones.

    Args:
        model: any module; left as it was (buffers and modes included).
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments). Only shapes, dtypes
            and devices of tensors are read, unless the code asks for values.
        training: record in train mode instead of eval mode.

    Raises:
        TraceError: the forward pass fails on these inputs.
    """
    require_module(model)
    trace, error = record_partly(model, example_inputs, training=training)
    if error is not None and asks_for_values(error) and not _on_meta(model, example_inputs):
        asks_at = (line_of(error.__cause__) if error.__cause__ else "") or "a line that is not known"
        trace, error = record_partly(model, example_inputs, training=training, asks_at=asks_at)
    if error is not None:
        raise error
    return trace


def record_partly(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    training: bool = False,
    watch: Callable[[Recorder], AbstractContextManager[None]] | None = None,
    asks_at: str = "",
) -> tuple[Trace, TraceError | None]:
    """As `record`; where the forward pass fails, what was recorded so far and the error.

    `watch` is entered around the forward pass, to look on as the recorder works. With `asks_at`, the line where the code is
    known to ask for values, the pass runs on copies of the real tensors, random numbers seeded.
    """
    args, kwargs = as_call(example_inputs)
    trace = Trace(asks_at=asks_at)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Tensor] = {}

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in memo:
            memo[id(leaf)] = leaf.detach().clone() if asks_at else fake.from_tensor(leaf.detach())
        return memo[id(leaf)]

    # A module that is registered under two names must be swapped once: `functional_call` would put the fake back.
    named = [
        (f"{path}.{leaf}" if path else leaf, tensor, kind)
        for kind in ("param", "buffer")
        for path, module in model.named_modules()
        for leaf, tensor in (module._parameters if kind == "param" else module._buffers).items()
        if tensor is not None
    ]
    trace.unsaved.update(
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
    )
    with (
        _module_stack(model) as stack,
        attributes_kept(model),
        in_mode(model, training),
        nothing_fused(),
        nothing_converted(),
        quiet(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        forget_caches(model)
        recorder = Recorder(trace, stack)
        state = {}
        for name, tensor, kind in named:
            state[name] = stand_in(tensor)
            trace.state[name] = recorder.register(state[name], kind, name)
        args, kwargs = tree_map(stand_in, (args, kwargs))
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        while given:  # no name may hold a fake tensor after the trace
            recorder.register(given.pop(0), "input")
        try:
            with (
                seeded(model) if asks_at else fake,
                _Listener(recorder) if asks_at else nullcontext(),
                recorder,
                watch(recorder) if watch else nullcontext(),
            ):
                before = dict(state)  # what forward assigns to its buffers comes back in `state`
                out = torch.func.functional_call(model, state, args, kwargs, tie_weights=False)
                trace.replaced.update(name for name, tensor in state.items() if tensor is not before[name])
                before.clear()
        except Exception as error:
            failure = TraceError(_what_failed(model, example_inputs, error))
            failure.__cause__ = error
            return trace, failure
        trace.outputs.extend(recorder.register(leaf, "constant") for leaf in tensors_of(out))
    alive = recorder.let_go()
    del out, state, args, kwargs
    memo.clear()
    named.clear()
    drop_cached_fakes(alive)
    return trace, None


_ASKS = (DynamicOutputShapeException, DataDependentOutputException)


def asks_for_values(failure: TraceError) -> bool:
    """True where a pass on fake tensors failed because the code wants a value."""
    cause = failure.__cause__
    return isinstance(cause, _ASKS) or (isinstance(cause, RuntimeError) and ".numpy() is not supported" in str(cause))


def _on_meta(model: nn.Module, example_inputs: Inputs) -> bool:
    leaves = [*model.parameters(), *model.buffers(), *tree_flatten(example_inputs)[0]]
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)


def tensors_of(out: Any) -> list[Tensor]:
    """All tensors in a model's output, whatever containers or plain objects hold them."""
    leaves, seen, queue = [], set(), [out]
    while queue:
        item = queue.pop()
        if isinstance(item, Tensor):
            leaves.append(item)
        elif isinstance(item, Mapping):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            queue.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)) and id(item) not in seen:
            seen.add(id(item))
            queue.extend(vars(item).values())
    return leaves


def _what_failed(model: nn.Module, example_inputs: Inputs, error: Exception) -> str:
    """The message of a forward pass that could not be recorded, with a remedy that fits."""
    if not isinstance(error, _ASKS):
        return (
            f"{type(model).__name__} could not be run on the example inputs ({_shapes(example_inputs)}): "
            f"{type(error).__name__}: {error}. Give inputs that `model(...)` accepts: a tensor, a tuple of "
            "positional arguments, or a dict of keyword arguments."
        )
    line = line_of(error)
    where = f" at {line}" if line else ""
    if isinstance(error, DynamicOutputShapeException):
        why = "the size of its result depends on the values of tensors"
        remedy = "keep the size fixed (`x * mask` or `torch.where(mask, x, 0)` instead of `x[mask]`)"
    else:
        why = "it makes a Python number of a tensor's value"
        remedy = "compute with the tensor itself (`torch.where` instead of `if`), or pass the number to `model(...)`"
    return (
        f"{type(model).__name__} cannot be traced: {error.func}{where}: {why}, and on the meta device there are shapes only. In "
        f"forward, {remedy}; or do that step outside the model, in the loss, say."
    )


def _shapes(example_inputs: Inputs) -> str:
    args, kwargs = as_call(example_inputs)
    shown = [str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args]
    shown += [f"{k}={tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in kwargs.items()]
    return ", ".join(shown)
