"""Run a model in another way for a moment, and leave nothing of it behind."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from prunewise.core.lines import is_users


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever `forward` stores on modules (caches, counters, weights made by hooks) is put back.

    Containers in attributes get their former contents back as well: fake tensors must not leak into a user's cache.
    """
    before = [(m, dict(vars(m))) for m in model.modules()]
    contents: dict[int, tuple[Any, Any]] = {}
    for _, attributes in before:
        for name, value in attributes.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                _note_contents(value, contents)
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in set(now) - set(attributes):
                del now[name]
            now.update(attributes)
        for container, content in contents.values():
            if type(container) is list:
                container[:] = content
            else:
                container.clear()
                container.update(content)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """`forward` writes into copies of the buffers while this is active; afterwards the buffers themselves are back."""
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]  # theirs cannot be exchanged
    values = [(b, b.detach().clone()) for m in scripted for b in m.buffers(recurse=False)]
    before = [(m._buffers, dict(m._buffers)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    copies: dict[int, Tensor] = {}
    for buffers, held in before:
        for name, buffer in held.items():
            if buffer is not None and not is_lazy(buffer):
                buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        yield
    finally:
        for buffers, held in before:
            buffers.clear()
            buffers.update(held)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode while active; afterwards modes, buffers and whatever `forward` stored on modules are as they were."""
    with evaluating(model), attributes_kept(model), buffers_kept(model):
        yield


def _note_contents(value: Any, contents: dict[int, tuple[Any, Any]], depth: int = 4) -> None:
    """Shallow copies of dicts, lists and sets, and of those inside them."""
    if depth and type(value) in (dict, list, set, OrderedDict, defaultdict) and id(value) not in contents:
        contents[id(value)] = (value, copy.copy(value) if value else ())  # of the many hooks, most are none
        for item in list(value.values()) if isinstance(value, dict) else list(value):
            _note_contents(item, contents, depth - 1)


def drop_cached_fakes(alive: list[weakref.ref[Tensor]]) -> None:
    """Clear the user's `functools` caches where a fake tensor of the trace has got into one."""
    if not any(isinstance(ref(), FakeTensor) for ref in alive):
        return
    gc.collect()
    if not any(isinstance(ref(), FakeTensor) for ref in alive):
        return
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper:
            module = sys.modules.get(getattr(thing, "__module__", "") or "")
            if is_users(str(getattr(module, "__file__", "") or "")):
                thing.cache_clear()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while active; every module goes back into its own mode afterwards."""
    with in_mode(model, False):
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module is put back into its own mode afterwards."""
    before = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, was in before:
            m.training = was


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in train or eval mode, and each back into its own afterwards."""
    with modes_kept(model):
        for module in model.modules():
            module.training = training
        yield


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that hold tensors with a history (left by hooks, or cached); without gradients."""
    held = tree_leaves([vars(module) for module in model.modules()])
    made = [leaf for leaf in held if isinstance(leaf, Tensor) and not leaf.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in made})


def forget_caches(model: nn.Module) -> None:
    """Clear what the model's own `train` clears when training begins: biases that were cached in eval mode, say.

    A cache that was made of full-size parameters would hide them from a trace, and would not fit the smaller model. Where
    `train` changes parameters or buffers as well (adapters that are merged for eval mode), nothing is done.
    """
    if any(map(_own_train, model.modules())) and _only_forgets(model):
        _begin_training(model)


def _own_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train and not isinstance(module, fx.GraphModule)


def _begin_training(model: nn.Module) -> None:
    with modes_kept(model):
        for module in filter(_own_train, model.modules()):
            module.train(True)


def _only_forgets(model: nn.Module) -> bool:
    """True where the model's own `train` leaves all tensors of its state as they are: tried on a copy."""
    probe = copied(model)
    try:
        _begin_training(probe)
    except Exception:  # a `train` of another kind
        return False
    tensors, tried = ([*m.named_parameters(), *m.named_buffers()] for m in (model, probe))
    return len(tensors) == len(tried) and all(
        m == n and a.requires_grad == b.requires_grad and a.shape == b.shape and (a.is_meta or torch.equal(a, b))
        for (m, a), (n, b) in zip(tensors, tried, strict=True)
    )


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """The same random numbers every time, and the random state put back."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(0)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without the stack that torch logs for every operation that fails on fake tensors: ours are expected."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def nothing_fused() -> Iterator[None]:
    """Fused paths of nn.MultiheadAttention and nn.LSTM are one opaque operation each: switched off while tracing."""
    before, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # the public context manager warns of Intel GPUs
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def nothing_converted() -> Iterator[None]:
    """A module that converts itself to the dtype and device that it has already (`self.layer.to(x.dtype)`) is left as it is.

    torch would swap the tensors of a fake parameter, which it cannot.
    """
    convert: Any = nn.Module._apply

    def unless_same(module: nn.Module, fn: Any, recurse: bool = True) -> Any:
        tensors = [t for t in itertools.chain(module.parameters(), module.buffers()) if isinstance(t, FakeTensor)]
        same = all((t.dtype, t.device) == ((made := fn(t)).dtype, made.device) for t in tensors)
        return module if tensors and same else convert(module, fn, recurse)

    nn.Module._apply = unless_same  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = convert  # type: ignore[method-assign]
