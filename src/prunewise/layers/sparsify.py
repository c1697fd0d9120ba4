"""`sparsify_`: a sparsity plan put in force on a model, by any pruning method, as masks of torch.nn.utils.prune."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from prunewise.core.batch import Loss
from prunewise.core.errors import DataError, MethodError, NonFiniteError, NoPrunableGroupError, PlanError
from prunewise.core.sparsity import SparsityPlan
from prunewise.layers import importance as imp
from prunewise.layers.attention import keep_in_force_, release_
from prunewise.layers.masks import put_mask_, top
from prunewise.layers.methods import Method, asked_by, find_method
from prunewise.layers.statistics import HESSIAN, SQUARES, gather
from prunewise.layers.weights import Layer, check_finite, counted, find_layers, masked_tensors

# Hessians gathered in one pass over the data take no more than this (or one layer's, if that is larger).
_HESSIAN_BYTES = 1 << 30


def sparsify_(
    model: nn.Module,
    plan: SparsityPlan,
    method: str | Method = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Remove weights of `model`, in place, so that each layer of the plan keeps exactly as many as it says.

    Masks are left as torch.nn.utils.prune leaves them (`weight_orig`, `weight_mask`, and a hook that multiplies them before
    every forward pass), so that removed weights stay zero while the model is trained further, whatever the
    optimizer's momentum or weight decay; an optimizer made before goes on with the same parameters. `make_permanent_` takes
    the masks off. A weight that the model's code reads without calling its module keeps the values it has now; in an
    nn.MultiheadAttention that is a part of `model` it does not. A tied weight has the same mask wherever it is used. A layer
    with a mask in force can lose more weights, and gets none back.

    Args:
        model: changed in place; where something is wrong, not at all.
        plan: from `allocate`, or your own.
        method: "magnitude", "random", "channel_l1" (whole filters), "taylor", "movement", "wanda", "sparsegpt" (changes the
            weights that stay), "2:4" (any n:m), a class of torch.nn.utils.prune, or a callable (`layers.methods`).
        data: batches, for "taylor" and "movement" (with targets), "wanda", "sparsegpt", and callables that ask.
        loss: loss(model, batch) for those that need gradients; default as for `allocate`.
        seed: of "random".
        progress: show how far passes over the data are, on stderr.

    Returns:
        `model`.

    Raises:
        PlanError: the plan does not fit the model, the method is unknown, or a layer has fewer weights left than planned.
        DataError: the method needs data, the loader is empty, or a layer is never called.
        MethodError: the method gave a wrong count or shape, or does not suit a layer.
        NonFiniteError: weights, activations, gradients or what the method gave are not finite; names the layer.

    Example:
        >>> from prunewise import allocate
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = sparsify_(model, allocate(model, 0.75, "erk"))
        >>> sum(int((m.weight != 0).sum()) for m in (model[0], model[2]))
        12
    """
    with torch.inference_mode(False):  # masks that are made in it could not be trained with
        layers = planned_layers(model, plan)
        masks = Masks(model, layers, method, data, loss, seed, progress)
        _put(layers, masks.choose(plan.keep, progress))
        keep_in_force_(model)
    return model


def planned_layers(model: nn.Module, plan: SparsityPlan) -> list[Layer]:
    """The layers of a plan, found in the model, fit and finite.

    Raises:
        PlanError: the plan does not fit the model, or keeps more of a layer than a mask in force leaves, or that mask
            cannot be gone on from.
        NonFiniteError: a weight is not finite.
    """
    if not isinstance(plan, SparsityPlan):
        raise PlanError(f"a plan should be a SparsityPlan, as allocate makes it, and is a {type(plan).__name__}")
    # Layers that are not in the plan need not be sound; what the plan names must be there.
    layers: list[Layer] = []
    with contextlib.suppress(NoPrunableGroupError):  # the check says which one is missing
        layers = find_layers(model, include=lambda layer: layer.name in plan)
    plan.check({layer.name: layer.shape for layer in layers})
    for layer in layers:
        if layer.parameter.is_meta:
            raise PlanError(f"{layer.name!r} is on the meta device: load the weights before they are pruned")
        _check_masks(layer)
        left = layer.size if layer.keep_mask is None else int(torch.count_nonzero(layer.keep_mask))
        if left < plan.keep[layer.name]:
            raise PlanError(
                f"{layer.name!r} has {left} weights left under the mask in force, and the plan keeps "
                f"{plan.keep[layer.name]}: make a sparser plan, or start from the dense model"
            )
    check_finite(layers)
    return layers


def _check_masks(layer: Layer) -> None:
    """What is in force on a layer can be gone on from: a mask of 0 and 1, the same for all modules that share the weight."""
    for owner in layer.owners:
        mask = owner.keep_mask
        if isinstance(owner.module, (nn.ParameterList, nn.ParameterDict)):
            raise PlanError(
                f"{layer.name!r} shares its weight with {owner.layer_name!r}, where no mask can stand since it is never called: "
                f"exclude {layer.name!r}"
            )
        if mask is None and hasattr(owner.module, f"{owner.tensor}_mask"):
            raise PlanError(
                f"{owner.layer_name!r} has a {owner.tensor}_mask of its own, which a mask would replace: exclude it"
            )
        if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
            raise PlanError(
                f"the mask in force on {owner.layer_name!r} has values other than 0 and 1: call make_permanent_ first"
            )
        first = layer.owners[0].keep_mask
        same = mask is first or (mask is not None and first is not None and torch.equal(mask, first))
        if not same:
            raise PlanError(
                f"{layer.name!r} and {owner.layer_name!r} share a weight, with different masks: call make_permanent_ first"
            )


class Masks:
    """Keep masks of some layers by one method, for as many plans as are wanted: what the method asks for is gathered once."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        method: str | Method,
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        shown: bool = False,
    ) -> None:
        self.name, self._method = find_method(method)
        self._model, self._layers, self._data, self._seed = model, layers, data, seed
        self._asked = asked_by(self._method)
        what = f"method {self.name!r}"
        self._given: dict[str, dict[str, Any]] = {layer.name: {} for layer in layers}
        if "input_norms" in self._asked:
            found = gather(model, layers, data, (SQUARES,), what=what, shown=shown)
            for layer in layers:
                squares = found[layer.name].squares
                assert squares is not None
                norms = squares.sqrt().unsqueeze(1).expand(-1, layer.rows, -1)
                self._given[layer.name]["input_norms"] = layer.from_matrix(norms)
        if "gradient" in self._asked:
            gradients = imp.mean_gradients(model, layers, data, loss=loss, what=what, shown=shown)
            for layer in layers:
                self._given[layer.name]["gradient"] = gradients[layer.name]

    @property
    def identity(self) -> str:
        """The method and its settings, as a text: masks can differ where this does."""
        partial = self._method if isinstance(self._method, functools.partial) else functools.partial(self._method)
        kind = getattr(partial.func, "__qualname__", self.name)
        return f"{self.name};{kind};{partial.args};{sorted(partial.keywords.items())};{self._seed}"

    @property
    def gathered(self) -> dict[str, Tensor]:
        """What the data said of each layer, as far as it is kept: masks can differ where this does."""
        return {f"{layer} {what}": value for layer, given in self._given.items() for what, value in given.items()}

    def choose(self, keep: Mapping[str, int], shown: bool = False) -> dict[str, tuple[Tensor, Tensor | None]]:
        """For each layer in `keep`, its keep mask, and its weights where the method changes them. Nothing of the model changes."""
        layers = [layer for layer in self._layers if layer.name in keep]
        result = {}
        for some in self._portions(layers):
            hessians = {}
            if "hessian" in self._asked:
                data = self._data
                if data is not None and iter(data) is data and len(some) < len(layers):
                    raise DataError(
                        f"method {self.name!r} reads the data several times: give a loader, not an iterator"
                    )
                found = gather(self._model, some, data, (HESSIAN,), what=f"method {self.name!r}", shown=shown)
                hessians = {name: statistics.hessian for name, statistics in found.items()}
            for layer in some:
                given = dict(self._given[layer.name])
                if "hessian" in self._asked:
                    given["hessian"] = hessians.pop(layer.name)
                if "layer" in self._asked:
                    given["layer"] = layer
                if "alive" in self._asked:
                    mask = layer.keep_mask
                    given["alive"] = torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask.bool()
                if "rng" in self._asked:
                    digest = hashlib.sha256(f"{self._seed}:{layer.name}".encode()).digest()
                    given["rng"] = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                result[layer.name] = self._one(layer, keep[layer.name], given)
        return result

    def _portions(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Layers whose Hessians fit into memory together."""
        if "hessian" not in self._asked:
            return [list(layers)]
        portions: list[list[Layer]] = []
        room = 0
        for layer in layers:
            size = layer.groups * layer.columns**2 * 8
            if size > room or not portions:
                portions.append([])
                room = _HESSIAN_BYTES
            portions[-1].append(layer)
            room -= size
        return portions

    def _one(self, layer: Layer, keep: int, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        weight = layer.weight
        in_force = layer.keep_mask
        if keep in (0, layer.size):  # nothing to choose, and many a method cannot
            return torch.full(layer.shape, keep > 0, device=weight.device), None
        with torch.no_grad():
            found = self._method(weight.clone(), keep, **given)
        mask, updated = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        mask = self._checked(layer, mask, keep)
        if updated is not None:
            if not isinstance(updated, Tensor) or updated.shape != weight.shape:
                raise MethodError(
                    f"method {self.name!r} gave weights of another shape than {layer.shape} for {layer.name!r}"
                )
            if not bool(torch.isfinite(updated).all()):
                raise NonFiniteError(
                    f"method {self.name!r} gave weights for {layer.name!r} that are not finite: look at the data (too large?)"
                )
            updated = updated.detach().to(weight)
        if in_force is not None and bool((mask & ~in_force.bool()).any()):
            mask = self._within(layer, mask, in_force.bool(), updated, keep)
        return mask, updated

    def _within(self, layer: Layer, mask: Tensor, alive: Tensor, updated: Tensor | None, keep: int) -> Tensor:
        """A mask that takes back no weight that is gone: those it wanted make room for others, the largest first."""
        if updated is not None:
            raise MethodError(
                f"method {self.name!r} cannot go on from the mask in force on {layer.name!r}: call make_permanent_ first, or start "
                "from the dense model"
            )
        size = layer.weight.abs().double()
        rank = torch.where(mask, size + size.max() + 1, size)
        return top(torch.where(alive, rank, torch.full_like(rank, -1.0)), keep)

    def _checked(self, layer: Layer, mask: Any, keep: int) -> Tensor:
        """The mask as booleans on the layer's device."""
        if not isinstance(mask, Tensor) or tuple(mask.shape) != layer.shape:
            shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise MethodError(
                f"method {self.name!r} gave {shown} for {layer.name!r}: it should return a keep mask of shape {layer.shape}"
            )
        result = mask.detach().to(layer.parameter.device, torch.bool)
        if mask.dtype != torch.bool and not bool((mask == result.to(mask)).all()):
            raise MethodError(f"method {self.name!r} gave values other than 0 and 1 for {layer.name!r}")
        if int(result.sum()) != keep:
            raise MethodError(
                f"method {self.name!r} keeps {int(result.sum())} weights of {layer.name!r} and was asked for {keep}: it must "
                "return exactly so many (`layers.masks.top` does)"
            )
        return result


def _put(layers: Sequence[Layer], chosen: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Put masks and weights in force; the one place that edits modules."""
    for layer in layers:
        mask, updated = chosen[layer.name]
        parameter = layer.parameter
        with torch.no_grad():
            if updated is not None:
                parameter.copy_(torch.where(mask, updated, parameter))
            for _, module, tensor in layer.owners:
                put_mask_(module, tensor, mask)


def make_permanent_(model: nn.Module) -> nn.Module:
    """Take the masks off, in place: removed weights become plain zeros of plain parameters. Returns `model`.

    Nothing holds them at zero from then on, so do it after the last training step. Masks of torch.nn.utils.prune on
    tensors that do not count for sparsity, such as biases, stay.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> plan = SparsityPlan({"": 1}, {"": (2, 2)})
        >>> sorted(make_permanent_(sparsify_(layer, plan)).state_dict())
        ['bias', 'weight']
    """
    masked = [(module, tensor) for module in model.modules() for tensor in masked_tensors(module)]
    # A weight that counts may be tied to a tensor of any name.
    weights = {id(module._parameters[f"{tensor}_orig"]) for module, tensor in masked if tensor in counted(module)}
    for module, tensor in masked:
        if id(module._parameters[f"{tensor}_orig"]) in weights:
            prune.remove(module, tensor)
    for module in model.modules():
        release_(module)
    return model


def attach_masks_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Make a dense model, in place, ready for `load_state_dict` of a sparse one: all masks in `state_dict` are put in force.

    Raises:
        PlanError: a mask belongs to no weight of this model, or one of another shape.

    Example:
        >>> sparse = sparsify_(nn.Linear(2, 2), SparsityPlan({"": 1}, {"": (2, 2)}))
        >>> state = sparse.state_dict()
        >>> attach_masks_(nn.Linear(2, 2), state).load_state_dict(state)
        <All keys matched successfully>
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for key, mask in state_dict.items():
        path, _, leaf = key.rpartition(".")
        tensor = leaf.removesuffix("_mask")
        if leaf == tensor or f"{key.removesuffix('_mask')}_orig" not in state_dict:
            continue
        module = modules.get(path)
        weight = None if module is None else module._parameters.get(tensor, module._parameters.get(f"{tensor}_orig"))
        if module is None or weight is None or weight.shape != mask.shape:
            raise PlanError(
                f"{key!r} is a mask of shape {tuple(mask.shape)}, for which the model has no weight: build the same model"
            )
        found.append((module, tensor, mask.to(weight.device)))
    for module, tensor, mask in found:
        put_mask_(module, tensor, mask)
    keep_in_force_(model)
    return model
