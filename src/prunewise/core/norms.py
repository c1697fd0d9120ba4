"""Norms over channels: an average over all channels can be made an average over those that stay.

LayerNorm, RMSNorm, and whatever module behaves like them, mix the channels that they normalise. Removing some
of these changes the average for the rest, so closing a channel must take it out of the average too. That can be
done around the module, whatever its code: let x be its input, m the mean over the open channels (zero where the
norm does not centre) and s² the share of all channels over the open ones. With x' = m + s·(x - m) where open and m
where closed, the mean of x' over all channels is m, and its variance is that of x over the open ones. So the module
computes s times what the small one does (before its bias), and dividing by s gives exactly that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.trace import Op, Trace

# Averages, which count the channels that there are. Sums and maxima do not shrink like that.
_AVERAGES = (
    "native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "rms_norm", "_fused_rms_norm", "mean", "var",
    "var_mean",
)  # fmt: skip
_PASSING = (
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "clone",
    "_to_copy", "contiguous", "alias", "detach", "ones", "zeros", "full", "scalar_tensor",
)  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """A module that normalises its one input over channels.

    Attributes:
        path: of the module.
        dims: of the input, which are averaged; `channel` is among them.
        channel: the dimension of the channels; -1 for the last, whatever the rank.
        centred: True where the mean is subtracted (LayerNorm), False where not (RMSNorm).
        input: the input's tensor in the trace.
        ops: the operations of this call.
        then: the name of the child that gets the norm's result, where a module goes on after it (an activation); else "".
    """

    path: str
    dims: tuple[int, ...]
    channel: int
    centred: bool
    input: int
    ops: range
    then: str = ""

    def like(self, other: Norm) -> bool:
        """True where both normalise in the same way."""
        return (self.dims, self.centred) == (other.dims, other.centred)


def find_norms(model: nn.Module, trace: Trace) -> list[Norm]:
    """Every call of a module that does nothing but normalise over channels; found by what it does, not by its name."""
    modules = dict(model.named_modules())
    found: list[Norm] = []
    others: set[str] = set()  # modules of which some call is no such norm
    known: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], bool, str] | None] = {}
    makers = {out: op.module for op in reversed(trace.ops) for out in op.outputs}  # the first to make each tensor
    for path, run in groupby(trace.ops, key=lambda op: op.module):
        ops = list(run)
        module = modules.get(path)
        source = _only_input(ops, trace)
        if module is None or source is None or _is_inside(makers.get(source), path):
            others.add(path)
            continue
        shape = trace.tensors[source].shape
        key = (path, shape)
        if key not in known:
            same = any(trace.tensors[o].shape == shape for o in ops[-1].outputs)
            known[key] = _behaviour(module, shape) if same else None
        behaviour = known[key]
        if behaviour is None:
            others.add(path)
            continue
        dims, centred, then = behaviour
        found.append(Norm(path, dims, dims[0], centred, source, range(ops[0].index, ops[-1].index + 1), then))
    return [norm for norm in found if norm.path not in others]


def _is_inside(maker: str | None, path: str) -> bool:
    """True where the module that made a tensor (None: no module did) is a child of the one at `path`."""
    return maker is not None and (not path or maker.startswith(f"{path}."))


def _only_input(ops: Sequence[Op], trace: Trace) -> int | None:
    """The one tensor that these operations take from outside, if they average, and else work element by element."""
    if not any(op.name in _AVERAGES for op in ops):
        return None
    made = {o for op in ops for o in op.outputs}
    sources = set()
    for op in ops:
        if op.name in ("var", "var_mean") and (op.args.get("correction", 1) != 0 and op.args.get("unbiased", True)):
            return None  # divides by one less than the number of channels
        whole = op.name == "slice" and trace.tensors[op.outputs[0]].shape == trace.tensors[op.inputs[0]].shape
        if op.name not in (*_AVERAGES, *_PASSING) and torch.Tag.pointwise not in op.func.tags and not whole:
            return None
        for index in op.inputs:
            if index not in made and trace.tensors[index].kind not in ("param", "buffer"):
                sources.add(index)
    return sources.pop() if len(sources) == 1 else None


def _behaviour(module: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[int, ...], bool, str] | None:
    """(averaged dimensions, the channels' first; whether it centres; the child that comes next), or None: no such norm."""
    rank = len(shape)
    candidates: list[tuple[int, ...]] = [(-1,)] if rank else []
    if rank > 2:
        candidates += [(1,), tuple(range(1, rank))]
    probe: nn.Module | None = None
    called: list[tuple[str, Tensor]] = []
    for dims in candidates:
        if shape[dims[0]] < 2:
            continue
        small = [n if d == dims[0] % rank else min(n, 3) for d, n in enumerate(shape)]
        try:
            probe, called = _probe(module) if probe is None else (probe, called)
            for centred in (True, False):
                if _normalises(probe, small, dims, centred):
                    return dims, centred, _next(probe, called, small)
        except Exception:  # whatever a user's forward raises on an input of another size
            continue
    return None


def _probe(module: nn.Module) -> tuple[nn.Module, list[tuple[str, Tensor]]]:
    """A copy on the CPU, in double precision, with random parameters; of a module on the meta device too.

    Its children do nothing; the list gets their names, and what they are called with.
    """
    draw = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module)
    probe = (
        (probe.to_empty(device="cpu") if any(p.is_meta for p in probe.parameters()) else probe.cpu()).double().eval()
    )
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=draw, dtype=parameter.dtype))
    called: list[tuple[str, Tensor]] = []
    for name in [name for name, _ in probe.named_children()]:
        stub = nn.Identity()
        stub.register_forward_pre_hook(partial(_note, called, name))
        setattr(probe, name, stub)
    return probe, called


def _note(called: list[tuple[str, Tensor]], name: str, module: nn.Module, args: Any) -> None:
    called.append((name, args[0]))


@torch.no_grad()
def _next(probe: nn.Module, called: list[tuple[str, Tensor]], shape: list[int]) -> str:
    """The child that is the first to get something else than the input; "" where there is none."""
    called.clear()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probe.forward(x.clone())
    return next((name for name, given in called if not torch.equal(given, x)), "")


@torch.no_grad()
def _normalises(module: nn.Module, shape: list[int], dims: tuple[int, ...], centred: bool) -> bool:
    """True where module(x) - module(0) is w · (x - m) · r, with w of the channel alone and r the same along `dims`."""
    draw = torch.Generator().manual_seed(1)
    others = [d for d in range(len(shape)) if d != dims[0] % len(shape)]
    bias = module.forward(torch.zeros(shape, dtype=torch.float64))
    weight = None
    for scale in (1e3, 1e3, 1.0):  # the large one makes any epsilon negligible, so that r is the inverse deviation
        # drawn anew: where there is one position only, some weight fits any one input
        x = scale * (torch.randn(shape, generator=draw, dtype=torch.float64) + 0.5)
        y = module.forward(x).double() - bias
        deviation = x - x.mean(dims, keepdim=True) if centred else x
        n = deviation / deviation.square().mean(dims, keepdim=True).sqrt()
        if weight is None:
            weight = (y * n).mean(others, keepdim=True) / n.square().mean(others, keepdim=True)
        z = weight * deviation
        r = (y * z).sum(dims, keepdim=True) / z.square().sum(dims, keepdim=True)
        expected = z * r if scale == 1.0 else weight * n
        if y.shape != x.shape or not float((y - expected).abs().max()) <= 1e-3 * float(y.abs().max()):
            return False
    return True


class MaskedNorm:
    """Two hooks around a norm that leave closed channels out of its averages.

    Args:
        norm: the module's behaviour.
        mask: gives ones and zeros for the channels, shape (channels,), for the input it is given.
    """

    def __init__(self, norm: Norm, mask: Callable[[Tensor], Tensor]) -> None:
        self.norm = norm
        self.mask = mask
        self._whole: nn.Module | None = None  # the hooked module, where a child's hook has to call it
        self._asking = False
        self._answer: Tensor | None = None

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The input with closed channels at the mean, and the rest spread so that the variance is theirs."""
        place = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
        name = next((k for k, a in kwargs.items() if isinstance(a, Tensor)), None) if place is None else None
        x: Tensor = kwargs[name] if place is None else args[place]
        mask, opened, spread = self._opened(x)
        if self.norm.centred:
            wide = torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse to average in
            others = [d for d in self.norm.dims if d != self.norm.channel]
            mean = (x * mask).to(wide).mean(others, keepdim=True) if others else (x * mask).to(wide)
            mean = mean.sum(self.norm.channel, keepdim=True) / opened.to(wide)
            x = (mean + (x - mean) * (mask * spread)).to(x.dtype)
        else:
            x = x * (mask * spread)
        if place is None:
            return args, {**kwargs, name: x}
        return (*args[:place], x, *args[place + 1 :]), kwargs

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """The output over the spread; the bias, which was not spread, as it was."""
        return self._unspread(module, output)

    def between(self, child: nn.Module, args: Any) -> Any:
        """As `after`, where the module goes on: on what its child gets."""
        if self._asking:  # what the norm makes of zeros: its bias
            self._answer = args[0]
            return args
        assert self._whole is not None
        return (self._unspread(self._whole, args[0]), *args[1:])

    def _unspread(self, module: nn.Module, output: Tensor) -> Tensor:
        _, _, spread = self._opened(output)
        last = output.dim() - 1
        shape = [n if d in (self.norm.channel % output.dim(), last) else 1 for d, n in enumerate(output.shape)]
        self._asking = True
        try:
            bias: Tensor = module.forward(output.new_zeros(shape))
            bias = bias if self._answer is None else self._answer
        finally:
            self._asking, self._answer = False, None
        return bias + (output - bias) / spread

    def _opened(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mask along the channels of `x`, how many are open, and the spread s."""
        shape = [-1 if d == self.norm.channel % x.dim() else 1 for d in range(x.dim())]
        mask = self.mask(x).to(x.dtype).view(shape)
        opened = mask.sum().clamp(min=1)
        return mask, opened, (mask.numel() / opened).sqrt().to(x.dtype)

    def put_on(self, module: nn.Module) -> None:
        """Hook the module, and the child that goes on from the norm's result."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.norm.then:
            self._whole = module
            module.get_submodule(self.norm.then).register_forward_pre_hook(self.between, prepend=True)
        else:
            module.register_forward_hook(self.after, with_kwargs=True, prepend=True)


def unhook(module: nn.Module) -> None:
    """Remove every `MaskedNorm` of this module (or of a copy of it)."""
    for hooks, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), MaskedNorm):
                del hooks[key]
                flags.pop(key, None)


@contextmanager
def norms_masked(model: nn.Module, masks: Mapping[Norm, Tensor]) -> Iterator[None]:
    """While active, these norms average over the channels that their mask (bool, shape (channels,)) leaves."""
    modules = dict(model.named_modules())
    hooked = []
    try:
        for norm, mask in masks.items():
            if not mask.all():
                MaskedNorm(norm, partial(_beside, mask)).put_on(modules[norm.path])
                hooked.append(modules[norm.path])
        yield
    finally:
        for module in hooked:
            for part in module.modules():
                unhook(part)


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(x.device)
