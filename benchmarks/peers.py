"""Torch-Pruning, set up as its documentation says, at the same count of multiply-adds as the rest.

Its graph takes channel i of a stage to meet channel i of the next, where the zero-padded shortcut of these ResNets makes it meet
channel i + padding; pruned residual streams would be added shifted. So they are in `ignored_layers`, its own way of leaving
layers alone, and it removes inner channels of the blocks, as `--inner-only` makes every other method do.
"""

from __future__ import annotations

import copy
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ITERATIVE_STEPS = 400  # of group sparsity: the published recipe prunes in small steps until the target is met


def torch_pruning() -> ModuleType | None:
    """The package, or None where it is not installed."""
    try:
        version("torch-pruning")
    except PackageNotFoundError:
        return None
    import torch_pruning

    return torch_pruning


def counted_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one forward pass, by torch's own counter."""
    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(example)
    model.train(training)
    return counter.get_total_flops() // 2


def ignored_layers(model: nn.Module) -> list[nn.Module]:
    """The classifier, and what writes to the residual streams: the stem and the second convolution of every block."""
    modules = dict(model.named_modules())
    return [m for path, m in modules.items() if path in ("conv1", "linear") or path.endswith(".conv2")]


def magnitude(
    model: nn.Module, example: Tensor, limit: float, *, global_pruning: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """MagnitudePruner with group L2 importance in one step, at the smallest pruning ratio that meets `limit` MACs.

    Where all layers share one ratio, rounding to whole channels can leave it several percent under the limit; so, through
    `pruning_ratio_dict`, as many of the first layers as fit get the next lower ratio.

    Returns:
        The pruned copy, and the settings found.
    """
    tp = torch_pruning()
    assert tp is not None
    names = [path for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and path.endswith(".conv1")]

    def pruned(ratio: float, looser: float = 0.0, count: int = 0) -> nn.Module | None:
        small = copy.deepcopy(model).eval()
        tp.pruner.MagnitudePruner(
            small,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=global_pruning,
            pruning_ratio=ratio,
            pruning_ratio_dict={small.get_submodule(name): looser for name in names[:count]},
            iterative_steps=1,
            ignored_layers=ignored_layers(small),
        ).step()
        return small if counted_macs(small, example) <= limit else None

    low, high = 0.0, 1.0
    best = None
    for _ in range(12):
        ratio = (low + high) / 2
        small = pruned(ratio)
        if small is None:
            low = ratio
        else:
            best, high = small, ratio
    if best is None:
        raise RuntimeError(f"no pruning ratio brings the model to {limit:,.0f} MACs")
    count, too_many = 0, len(names)
    while not global_pruning and too_many - count > 1:
        middle = (count + too_many) // 2
        small = pruned(high, low, middle)
        if small is None:
            too_many = middle
        else:
            best, count = small, middle
    notes = {"pruning_ratio": high, "global_pruning": global_pruning, "importance": "GroupMagnitude p=2"}
    return best, notes | ({"first_layers": count, "their_ratio": low} if count else {})


class GroupSparsity:
    """GroupNormPruner: train with its group regulariser, then prune in small steps to `limit` MACs, in place.

    As in its published CIFAR recipe: importance of the group's L2 norm over the maximum of the layer, global ranking, no weight
    decay while the regulariser acts.
    """

    def __init__(self, model: nn.Module, example: Tensor, reg: float) -> None:
        tp = torch_pruning()
        assert tp is not None
        training = model.training
        self.model, self.example = model.eval(), example
        self.pruner = tp.pruner.GroupNormPruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
            reg=reg,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=ITERATIVE_STEPS,
            ignored_layers=ignored_layers(model),
        )
        model.train(training)

    def regularize(self) -> None:
        """Add the regulariser's gradient; between backward() and the optimizer's step."""
        self.pruner.regularize(self.model)

    def prune(self, limit: float) -> None:
        """Remove channels until the limit is met."""
        self.model.eval()
        for _ in range(ITERATIVE_STEPS):
            if counted_macs(self.model, self.example) <= limit:
                return
            self.pruner.step()
        if counted_macs(self.model, self.example) > limit:
            raise RuntimeError(f"{ITERATIVE_STEPS} steps did not bring the model to {limit:,.0f} MACs")


def fit_shapes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give convolutions and batch norms the widths that `state` has (to go on from a checkpoint of a pruned model)."""
    for path, module in model.named_modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{path}.{leaf}" if path else leaf
            if tensor is None or tensor.shape == state[name].shape:
                continue
            new = torch.empty(state[name].shape, dtype=tensor.dtype, device=tensor.device)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(new)
            else:
                module._buffers[leaf] = new
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
