"""nn.MultiheadAttention reads its weights itself, without calling a module: what they are multiplied with, and masks on them.

The layer `out_proj` is a module like others for all but that: its own hooks are never called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunewise.core.attention import apply_masks
from prunewise.layers.weights import PROJECTIONS, Layer, masked_tensors

_ATTEND = nn.functional.multi_head_attention_forward
_CALL = inspect.signature(nn.MultiheadAttention.forward)
_ATTEND_CALL = inspect.signature(_ATTEND)

_MULTIPLIED = dict(zip(PROJECTIONS, (("query", "key", "value"), ("query",), ("key",), ("value",)), strict=True))


def projected_inputs(layer: Layer, args: Any, kwargs: Any) -> list[Tensor] | None:
    """What a projection multiplies in one call of its attention, one tensor (N, positions, inputs) a group.

    Where the attention is given one tensor for several, that is one tensor here, too. None where it is not called like torch's own.
    """
    module: Any = layer.module
    try:
        given = _CALL.bind(module, *args, **kwargs).arguments
    except TypeError:
        return None
    values = [given[name] for name in _MULTIPLIED[layer.tensor]]
    moved = {id(x): _samples_first(x.detach(), module.batch_first) for x in values}
    return [moved[id(x)] for x in values]


def projected_outputs(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """What a projection makes of them, (N, positions, outputs); where keys are fewer or more than queries, of as many each."""
    made = [nn.functional.linear(x, weight) for x, weight in zip(inputs, layer.as_matrix(layer.weight), strict=True)]
    shortest = min(y.shape[1] for y in made)
    return torch.cat([y[:, :shortest] for y in made], -1)


class WatchOutputProjections(TorchFunctionMode):
    """While active, hands on what the `out_proj` of attentions multiply, and what they make of it."""

    def __init__(self, watched: Mapping[nn.Module, Callable[[Tensor, Tensor], None]]) -> None:
        super().__init__()
        self._watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's attention is asked for the joined heads by an identity in place of out_proj's weight, then they go through it.

        Ours, which has lost heads, hands them to `linear` itself, as does who calls the module.
        """
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            output = func(*args, **kwargs)
            inputs, weight = _operands(*args, **kwargs)
            take = self._of(weight)
            if take is not None:
                take(inputs, output)
            return output
        if func is not _ATTEND:
            return func(*args, **kwargs)
        call = _ATTEND_CALL.bind(*args, **kwargs)
        weight, bias = call.arguments["out_proj_weight"], call.arguments["out_proj_bias"]
        take = self._of(weight)
        if take is None:
            return func(*args, **kwargs)
        call.arguments["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        call.arguments["out_proj_bias"] = None
        joined, attention = func(*call.args, **call.kwargs)
        output = nn.functional.linear(joined, weight, bias)
        take(_samples_first(joined), _samples_first(output))
        return output, attention

    def _of(self, weight: Tensor) -> Callable[[Tensor, Tensor], None] | None:
        return next((take for module, take in self._watched.items() if module.weight is weight), None)


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which of the arguments of `linear` is which."""
    return input, weight


def _samples_first(values: Tensor, batch_first: bool = False) -> Tensor:
    """(positions, N, C), or with `batch_first` (N, positions, C), or (positions, C) of one sample, as (N, positions, C)."""
    if values.dim() == 2:
        return values.unsqueeze(0)
    return values if batch_first else values.transpose(0, 1)


def keep_in_force_(model: nn.Module) -> None:
    """See to it that masks on `out_proj` are put on its weight before every call of its attention, as those elsewhere are."""
    for module in model.modules():
        release_(module)
        if isinstance(module, nn.MultiheadAttention) and masked_tensors(module.out_proj):
            module.register_forward_pre_hook(_mask_output_projection)


def release_(module: nn.Module) -> None:
    """Take back what `keep_in_force_` did to one module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _mask_output_projection:
            del module._forward_pre_hooks[key]


def _mask_output_projection(module: nn.Module, args: Any) -> None:
    """What torch.nn.utils.prune's own hook on out_proj would do, were it called; nothing where the mask is gone."""
    apply_masks(module.out_proj)  # type: ignore[arg-type]
