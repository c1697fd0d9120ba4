"""Pruned models and the state of runs on disk: JSON and safetensors, no pickle.

A pruned model is a folder with `plan.json` (the plan, and how the weights are to be put back) and `model.safetensors`. The plan
records the SHA-256 of the weights and is the last to change, so a reader never meets a mixed pair: a process killed while it
overwrites a folder leaves the old model or the new one.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunewise._files import (
    TensorFile,
    is_sha256,
    opened,
    read_json,
    stage_tensors,
    write_json,
)
from prunewise.core import inputs as _inputs
from prunewise.core.checks import built_by
from prunewise.core.errors import (
    AlreadyGatedError,
    CheckpointError,
    PlanError,
    PrunewiseError,
    TraceError,
    VerificationError,
)
from prunewise.core.graph import RebuiltModule
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.surgery import Surgeon, is_gated
from prunewise.core.trace import Inputs
from prunewise.layers.weights import masked_tensors

_FORMAT = 1
PLAN_FILE, WEIGHTS_FILE = "plan.json", "model.safetensors"


# -- pruned models ------------------------------------------------------------------------------------------------


def save_pruned(directory: str | os.PathLike[str], small: nn.Module, plan: ChannelPlan) -> None:
    """Save a pruned model as `plan.json` and `model.safetensors` in `directory`, which is made if it is not there.

    Saved are all parameters and buffers (those that `state_dict` leaves out, too) with dtypes, memory layout, ties and
    `requires_grad`, and the train or eval mode of every module. Other attributes are the factory's when the model is
    loaded. An older model in the folder is replaced at one stroke.

    Args:
        directory: a folder.
        small: the pruned model, trained further or not; wrapped by `torch.compile` or DistributedDataParallel or not.
        plan: the plan that it was made by.

    Raises:
        PlanError: the model is not one that the plan makes (another number of parameters).
        AlreadyGatedError: the model has gates; save what `gates.finish()` returns.
        CheckpointError: a tensor is of a kind that safetensors cannot hold, a mask of torch.nn.utils.prune is in force, or a
            module has an extra state of its own.

    Example:
        >>> import tempfile
        >>> from prunewise import Budget, apply_plan, plan_channels
        >>> def factory():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.zeros(1, 4)
        >>> model = factory()
        >>> plan = plan_channels(model, x, budget=Budget(macs=0.5))
        >>> small = apply_plan(model, plan, x)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_pruned(directory, small, plan)
        ...     loaded = load_pruned(directory, factory)
        >>> torch.equal(loaded(x), small(x))
        True
    """
    if not isinstance(small, nn.Module) or not isinstance(plan, ChannelPlan):
        raise PlanError(
            f"expected (directory, model, ChannelPlan), got a {type(small).__name__} and a {type(plan).__name__}"
        )
    small = _unwrapped(small)
    tensors, tied = _tensors(small)
    _require_savable(small, plan, tensors)
    weights = _described(small, tensors, tied)
    folder = _made(directory)
    # The plan's replacement is the moment of change: until then the new weights lie beside the old pair under a name of their own.
    staged, weights["sha256"] = stage_tensors(folder, tensors, _staged_name)
    write_json(folder / PLAN_FILE, {**plan.to_dict(), "weights": weights})
    os.replace(staged, folder / WEIGHTS_FILE)
    for old in folder.glob(_staged_name("*")):
        old.unlink(missing_ok=True)  # left by a process that was killed


def _require_savable(small: nn.Module, plan: ChannelPlan, tensors: Mapping[str, Tensor]) -> None:
    """Raise where the model is not one that the plan makes, or holds what no factory would give back."""
    if is_gated(small):
        raise AlreadyGatedError("the model has gates: save what gates.finish() returns")
    count = sum(p.numel() for p in small.parameters())  # of scripted modules too, which give plain tensors
    expected = plan.cost_after.get("params")
    if expected is not None and count != expected:
        raise PlanError(
            f"the model has {count:,} parameters and the plan makes one of {expected:,}: save the model that was made by "
            "this plan, or the plan that made it"
        )
    for path, module in small.named_modules():
        masked = masked_tensors(module)
        if masked:
            raise CheckpointError(
                f"a mask is in force on {masked[0]!r} of module {path!r}, which is not saved: call make_permanent_ first (or "
                "torch.nn.utils.prune.remove)"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"module {path!r} ({type(module).__name__}) has an extra state (get_extra_state), which may be anything and "
                "is not saved: keep that state in buffers"
            )


def _described(small: nn.Module, tensors: Mapping[str, Tensor], tied: list[list[str]]) -> dict[str, Any]:
    """The section `weights` of plan.json, but for the SHA-256: what the tensors alone do not tell."""
    return {
        "format": _FORMAT,
        "strides": {
            n: list(t.stride()) for n, t in tensors.items() if not _is_plain(t) and _is_dense(t.shape, t.stride())
        },
        "tied": tied,
        "frozen": [n for n, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad],
        "graph": isinstance(small, RebuiltModule),
        "training": small.training,
        "other_mode": [path for path, module in small.named_modules() if module.training != small.training],
    }


def load_pruned(
    directory: str | os.PathLike[str], factory: Callable[[], nn.Module], *, example_inputs: Inputs = None
) -> nn.Module:
    """The model that `save_pruned` saved in `directory`; its outputs are bit for bit those of the saved one.

    The original architecture is built, cut by the plan, and filled with the saved tensors after each was checked against
    it. A damaged or hostile folder gives an error and no model; nothing of it is executed.

    Args:
        directory: the folder.
        factory: called without arguments; builds the original, unpruned architecture (its weights do not matter) on
            the device where the model is wanted.
        example_inputs: needed only where the plan does not record what the inputs look like (they held objects of
            other classes than tensors, containers, numbers and strings), and where the model's code asks for the values
            of tensors (a plan holds shapes).

    Raises:
        CheckpointError: a file is missing, damaged, hostile or of another version, or was saved for another architecture.
    """
    folder = Path(directory)
    data = read_json(folder / PLAN_FILE)
    try:
        plan = ChannelPlan.from_dict(data)
        weights = _checked_weights(data.get("weights"))
    except PlanError as error:
        raise CheckpointError(f"{folder / PLAN_FILE}: {error}") from error
    with _weights_file(folder, weights["sha256"]) as file:
        saved = TensorFile(file, str(folder / WEIGHTS_FILE))
        model = built_by(factory, "original")
        small = _rebuilt(folder, model, plan, weights, saved, example_inputs)
        _fill(small, weights, saved)
    _set_modes(small, weights)
    return small


def _rebuilt(
    folder: Path,
    model: nn.Module,
    plan: ChannelPlan,
    weights: Mapping[str, Any],
    saved: TensorFile,
    example_inputs: Inputs,
) -> nn.Module:
    """The small model with the factory's values, and the dtypes and ties of the saved one."""
    where = folder / PLAN_FILE
    if plan.fingerprint != fingerprint(model):
        raise CheckpointError(
            f"{where} was saved for another architecture than this {type(model).__name__}: names or shapes of parameters "
            "differ. The factory should build the original, unpruned model"
        )
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    made_up = example_inputs is None
    if made_up:
        if plan.inputs is None:
            raise CheckpointError(f"{where} does not record what the model's inputs look like: give example_inputs")
        try:
            example_inputs = _inputs.blank(plan.inputs, device)
        except PlanError as error:
            raise CheckpointError(f"{where}: {error}") from error
    model = _tied_as(model, weights["tied"])
    wanted = {n: e.dtype for n, e in saved.entries.items() if e.dtype.is_floating_point}
    cast = _cast(model, wanted)
    dtype = next((t.dtype for t in cast.parameters() if t.is_floating_point()), torch.float32)
    # The plan was made in the saved dtype, or the model was converted since, or in part only.
    attempts = [(cast, example_inputs), (cast, _as_dtype(example_inputs, dtype)), (model, example_inputs)]
    for number, (candidate, inputs) in enumerate(attempts):
        try:
            surgeon = Surgeon.of(candidate, inputs, blocks=plan.drops_blocks)
            plan.check(candidate, surgeon.grouping.groups, surgeon.grouping.branches)
            if weights["graph"]:
                return _cast(surgeon.rebuilt(candidate, plan.keep), wanted)
            return _cast(surgeon.cut(candidate, plan.keep), wanted)
        except Exception as error:  # the user's forward runs here, on inputs that a file describes
            if not isinstance(error, PlanError) and number + 1 < len(attempts):
                continue
            why = error if isinstance(error, PrunewiseError) else f"{type(error).__name__}: {str(error)[:500]}"
            ran = isinstance(error, (TraceError, VerificationError))
            remedy = (
                ". It ran on made-up values: give example_inputs= where it needs real ones" if made_up and ran else ""
            )
            raise CheckpointError(
                f"{where} does not fit the {type(model).__name__} that the factory builds: {why}{remedy}"
            ) from error
    raise AssertionError


def _tied_as(model: nn.Module, tied: list[list[str]]) -> nn.Module:
    """A model with the ties of the saved one: the given model where it has them."""
    tensors = dict(_named(model))
    if {frozenset(t) for t in _tensors(model)[1]} == {frozenset(t) for t in tied if set(t) <= set(tensors)}:
        return model
    model = copy.deepcopy(model)
    first = {name: group[0] for group in tied for name in group}
    for group in tied:
        if len({tensors[n].shape for n in group if n in tensors}) > 1:
            raise CheckpointError(
                f"tensors {_some(group)} were saved as one, and have different shapes in this architecture"
            )
    made: dict[str, Tensor] = {}
    for name, tensor in _named(model):
        origin = first.get(name, name)
        if origin not in made:
            copied = tensor.detach().clone()
            made[origin] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
        _put(model, name, made[origin])
    return model


def _cast(model: nn.Module, wanted: Mapping[str, torch.dtype]) -> nn.Module:
    """A model with these dtypes of its floating tensors: the given model where it has them."""
    changes = {n for n, t in _named(model) if t.is_floating_point() and wanted.get(n, t.dtype) != t.dtype}
    if not changes:
        return model
    model = copy.deepcopy(model)
    if len(set(wanted.values())) == 1:
        model.to(next(iter(wanted.values())))
    for name, tensor in _named(model):
        if name in changes:
            tensor.data = tensor.data.to(wanted[name])
    return model


def _as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def _fill(small: nn.Module, weights: Mapping[str, Any], saved: TensorFile) -> None:
    """Put the saved tensors into the rebuilt model, once every one is known to fit."""
    tensors, _ = _tensors(small)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"the factory builds {name!r} on the meta device: build the model where it is wanted")
    missing, extra = (
        sorted(tensors.keys() - saved.entries.keys()),
        sorted(saved.entries.keys() - tensors.keys()),
    )
    if missing or extra:
        raise CheckpointError(
            f"{WEIGHTS_FILE} does not hold this model's tensors: {_some(missing)} missing, {_some(extra)} too many. The "
            "factory should build the architecture that was pruned"
        )
    made_anew = tensors.keys() - small.state_dict().keys()
    for name, tensor in tensors.items():
        entry = saved.entries[name]
        # A buffer that code makes anew in forward, as the inputs ask for it, is what it was.
        if entry.shape != tuple(tensor.shape) and name not in made_anew:
            raise CheckpointError(
                f"tensor {name!r} was saved with shape {entry.shape}; the plan makes {tuple(tensor.shape)}"
            )
        if entry.dtype != tensor.dtype:
            raise CheckpointError(f"tensor {name!r} was saved as {entry.dtype}; the architecture has {tensor.dtype}")
    parameters = {n for n, t in tensors.items() if isinstance(t, nn.Parameter)}
    if not set(weights["frozen"]) <= parameters:
        raise CheckpointError(f"{PLAN_FILE}: 'frozen' names no parameter: {_some(set(weights['frozen']) - parameters)}")
    for name, strides in weights["strides"].items():
        if name not in tensors or not _is_dense(tensors[name].shape, strides):
            raise CheckpointError(
                f"{PLAN_FILE}: 'strides' of {name[:80]!r} are not those of a dense tensor of its shape"
            )
    values = saved.read(weights["sha256"])
    for name, tensor in tensors.items():
        value = values.pop(name)
        strides = weights["strides"].get(name)
        if strides is not None:
            value = torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)
        tensor.data = value.to(tensor.device)  # the same object: ties, and whatever else refers to it, stay
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in weights["frozen"])


def _set_modes(small: nn.Module, weights: Mapping[str, Any]) -> None:
    small.train(weights["training"])
    other = set(weights["other_mode"])
    for path, module in small.named_modules():
        if path in other:
            module.training = not weights["training"]


def _checked_weights(data: Any) -> dict[str, Any]:
    """The section `weights` of plan.json."""

    def strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    if not isinstance(data, dict):
        raise PlanError(
            "the section 'weights' is missing: this is a plan without its model. Name a folder of save_pruned"
        )
    if data.get("format") != _FORMAT:
        raise PlanError(
            f"format {str(data.get('format'))[:20]} of the weights; this prunewise reads format {_FORMAT}: use the version that "
            "saved the model"
        )
    strides, tied = data.get("strides"), data.get("tied")
    counts = isinstance(strides, dict) and all(
        isinstance(s, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in s) for s in strides.values()
    )
    groups = isinstance(tied, list) and all(strings(t) and len(set(t)) == len(t) >= 2 for t in tied)
    if groups and len({n for t in tied or () for n in t}) != sum(len(t) for t in tied or ()):
        groups = False
    valid = counts and groups and strings(data.get("frozen")) and strings(data.get("other_mode"))
    valid = valid and type(data.get("training")) is bool and type(data.get("graph")) is bool
    if not valid or not is_sha256(data.get("sha256")):
        raise PlanError("the section 'weights' is damaged: its strides, ties, names, mode or SHA-256 are not valid")
    return data


@contextlib.contextmanager
def _weights_file(folder: Path, sha256: str) -> Iterator[Any]:
    """The weights that belong to the plan: those not yet renamed when a process was killed, if there are any."""
    staged = folder / _staged_name(sha256)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(opened(staged if staged.exists() else folder / WEIGHTS_FILE))
        except CheckpointError:
            file = stack.enter_context(opened(folder / WEIGHTS_FILE))  # renamed in between
        yield file


def _staged_name(sha256: str) -> str:
    return f".model-{sha256[:32]}.safetensors"


def _made(directory: str | os.PathLike[str]) -> Path:
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be made: {error.strerror or error}") from error
    return folder


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every name of every parameter and buffer."""
    pairs: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    return pairs + list(model.named_buffers(remove_duplicate=False))


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Each tensor once, under its first name; and the names of those that have several."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in _named(model):
        if name not in names.setdefault(id(tensor), []):
            names[id(tensor)].append(name)
        tensors[id(tensor)] = tensor
    return {n[0]: tensors[i] for i, n in names.items()}, [n for n in names.values() if len(n) > 1]


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _is_dense(shape: torch.Size, strides: Any) -> bool:
    """True where the strides place the elements one beside the other, in some order."""
    if len(strides) != len(shape):
        return False
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return all(stride <= max(1, math.prod(shape)) for stride in strides)


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(n[:80] for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
