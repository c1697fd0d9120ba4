"""What is asked of one model of the zoo, stage by stage. Runs in a process of its own."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import random
import re
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from bench import without_folders
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES
from torch.utils.flop_counter import FlopCounterMode
from zoo_models import Entry, vary_

import prunewise as pw
from prunewise.channels.oneshot import make_plan
from prunewise.core.graph import RebuiltModule
from prunewise.core.plan import fingerprint
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from tests.zoo import call, cast, flat_tensors

FLOAT32, FLOAT64 = 1e-4, 1e-9  # largest difference of gated and small, relative to the largest output
WIDE = 3 << 30  # bytes of parameters above which there is no float64 copy

Facts = dict[str, Any]


class Examination:
    """The stages of one model. Each returns what it found; `right` in it says whether that is as it should be."""

    def __init__(self, entry: Entry, seed: int) -> None:
        self.entry, self.seed = entry, seed
        self.want: dict[bool, list[Tensor]] = {}

    def build(self) -> Facts:
        torch.manual_seed(self.seed)
        self.model = self.entry.build()
        vary_(self.model)
        self.inputs = self.entry.inputs()
        params = list(self.model.parameters())
        with torch.random.fork_rng():
            self.plain = outputs(self.model.eval(), self.inputs)
        return {"params": sum(p.numel() for p in params), "mib": sum(p.nbytes for p in params) / 2**20}

    def trace(self) -> Facts:
        """Analysis, and what it says: which share can be pruned, and what holds the rest."""
        before = peak_mib()
        start = time.process_time()
        self.surgeon = Surgeon.of(self.model, self.inputs)
        seconds = time.process_time() - start
        return {"seconds_analysis": seconds, "mib_analysis": peak_mib() - before, **shares(self.model, self.surgeon)}

    def measure(self) -> Facts:
        return self._measured(self.model)

    def _measured(self, model: nn.Module) -> Facts:
        cost = pw.measure(model, self.inputs)
        counted, params = counted_macs(model, self.inputs), sum(p.numel() for p in model.parameters())
        return {
            "macs": cost.macs, "counted": counted, "params": cost.params,
            "right": cost.macs == counted and cost.params == params,
        }  # fmt: skip

    def gates(self) -> Facts:
        """Attach gates, set them at random, and note what the gated model computes."""
        self.session = pw.attach_gates(self.model, self.inputs, budget=pw.Budget(macs=1.0), total_steps=10)
        costs = self.surgeon.costs
        self.keep = draw(costs.groups, random.Random(self.seed))
        plan = make_plan(fingerprint(self.entry.build()), costs, self.keep, {"seed": str(self.seed)}, self.inputs)
        self.session.set_plan(plan)
        self.want[False] = outputs(self.model, self.inputs)
        self.effect = difference(self.plain, self.want[False])
        facts: Facts = {
            "cut": len(plan.keep), "macs_after": plan.cost_after["macs"] / plan.cost_before["macs"],
            "effect": self.effect,
        }  # fmt: skip
        try:
            # Random draws (dropout) differ with the number of channels: compare only where there are none.
            first, second = (outputs(self.model, self.inputs, training=True, seed=s) for s in (0, 1))
            if difference(first, second) == 0.0:
                self.want[True] = first
            facts["train_mode"] = "compared" if True in self.want else "draws random numbers"
        except Exception as error:
            facts["train_mode"] = f"does not run: {first_line(error)}"
        return facts

    def finish(self) -> Facts:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.model.eval()
            self.small = self.session.finish()
        self.plan = self.session.plan
        told = [str(w.message) for w in caught if "graph module" in str(w.message)]
        return {
            "class_kept": type(self.small) is type(self.model),
            "graphs": sum(isinstance(m, RebuiltModule) for m in self.small.modules()),
            "why_graph": without_folders(told[0].partition("because ")[2][:300]) if told else "",
        }

    def equal(self) -> Facts:
        """Gated against small in float32, in the modes that can be compared; and masked against small in float64."""
        facts: Facts = {}
        for training, want in self.want.items():
            got = outputs(self.small, self.inputs, training=training)
            facts["float32_train" if training else "float32"] = difference(want, got)
        rounding = False
        if sum(p.nbytes for p in self.model.parameters()) * 2 <= WIDE:
            try:
                facts["float64"] = self._difference_float64()
                rounding = facts["float64"] <= FLOAT64 * min(1.0, self.effect)
            except Exception as error:  # a dtype written into the model's code
                facts["no_float64"] = first_line(error)
        worst = max(v for k, v in facts.items() if k.startswith("float32"))
        # Where closing gates hardly changes the outputs, being close to them proves little.
        facts["right"] = worst <= FLOAT32 * min(1.0, self.effect) or rounding
        return facts

    def _difference_float64(self) -> float:
        inputs = cast(self.inputs, torch.float64)
        model, small = (copy.deepcopy(m).double() for m in (self.model, self.small))
        worst = 0.0
        for training in self.want:
            with masked(model, self.surgeon.grouping, self.keep):
                want = outputs(model, inputs, training=training)
            worst = max(worst, difference(want, outputs(small, inputs, training=training)))
        return worst

    def backward(self) -> Facts:
        small = copy.deepcopy(self.small).train()
        loss = sum(t.float().square().mean() for t in flat_tensors(call(small, self.inputs)) if t.requires_grad)
        assert isinstance(loss, Tensor), "no output has a gradient"
        loss.backward()
        gradients = [p.grad for p in small.parameters() if p.requires_grad]
        without = sum(g is None for g in gradients)
        finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
        return {"parameters": len(gradients), "without_gradient": without, "right": finite and without < len(gradients)}

    def small_measure(self) -> Facts:
        facts = self._measured(self.small)
        after = self.plan.cost_after
        predicted = after["macs"] == facts["counted"] and after["params"] == facts["params"]
        return {**facts, "predicted": after["macs"], "right": facts["right"] and predicted}

    def save(self) -> Facts:
        self.small.eval()
        with tempfile.TemporaryDirectory() as folder:
            pw.save_pruned(folder, self.small, self.plan)
            asks = bool(self.surgeon.grouping.structure.trace.asks_at)  # for values, which no plan holds
            loaded = pw.load_pruned(folder, self.entry.build, example_inputs=self.inputs if asks else None)
        # Weights that modules keep as plain attributes are not part of any checkpoint: judge by the outputs.
        worst = difference(outputs(self.small, self.inputs), outputs(loaded, self.inputs))
        return {"difference": worst, "right": worst == 0.0}

    def export(self) -> Facts:
        """Through torch.export and back; where it does not take the original either, nothing is asked."""
        args, kwargs = as_call(self.inputs)
        if self.surgeon.grouping.structure.trace.asks_at:
            try:
                torch.export.export(self.entry.build().eval(), args, kwargs, strict=False)
            except Exception as error:
                return {"original": first_line(error)}
        self.small.eval()
        with torch.no_grad():
            register_outputs(self.small(*args, **kwargs))
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(self.small, args, kwargs, strict=False), buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        with torch.no_grad():
            got = flat_tensors(loaded(*args, **kwargs))
        worst = difference(outputs(self.small, self.inputs), [t.clone() for t in got])
        return {"difference": worst, "right": worst <= FLOAT32}

    def oneshot(self) -> Facts:
        """Half of the MACs by magnitude; where the floor is above half, nothing is asked."""
        costs = self.surgeon.costs
        full, floor = costs({}).macs, costs(dict.fromkeys(costs.widths, 1)).macs
        if floor > full / 2:
            return {"floor": floor / full}
        plan = pw.plan_channels(self.model, self.inputs, budget=pw.Budget(macs=0.5), importance="magnitude")
        small = pw.apply_plan(self.model, plan, self.inputs)
        share = counted_macs(small, self.inputs) / full
        kept = {name: len(units) for name, units in plan.keep.items()}
        step = {g.name: g.multiple for g in costs.groups}
        tight = all(costs({**kept, name: n + step[name]}).macs > full / 2 for name, n in kept.items())
        return {
            "floor": floor / full,
            "share": share,
            "tight": tight,
            "right": 0.48 <= share <= 0.5 or (share <= 0.5 and tight),
        }


def register_outputs(output: Any) -> None:
    """Tell torch of a dataclass that a model returns, as torch.export asks its users to."""
    kind: Any = type(output)
    if dataclasses.is_dataclass(kind) and kind not in SUPPORTED_NODES:
        torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")


# Each stage and the stages that it builds on.
STAGES: dict[str, tuple[str, ...]] = {
    "build": (), "trace": ("build",), "measure": ("build",), "gates": ("trace",), "finish": ("gates",),
    "equal": ("finish",), "backward": ("finish",), "small_measure": ("finish",), "save": ("finish",),
    "oneshot": ("trace",), "export": ("finish",),
}  # fmt: skip


def examine(entry: Entry, options: argparse.Namespace, report: Callable[[str, Facts], None]) -> None:
    """Run all stages; `report` gets what each found as soon as it is known, and {} when it starts."""
    run = Examination(entry, options.seed)
    done: set[str] = set()
    for stage, needs in STAGES.items():
        if not done.issuperset(needs) or stage in options.skip.split(","):
            continue
        report(stage, {})
        start = time.process_time()
        try:
            facts = {"right": True, **getattr(run, stage)()}
            done.add(stage)
        except Exception as error:
            facts = {"right": False, **failure(error)}
        report(stage, {**facts, "seconds": time.process_time() - start, "peak_mib": peak_mib()})


def outputs(model: nn.Module, inputs: Any, *, training: bool = False, seed: int = 0) -> list[Tensor]:
    """What the model gives; statistics that a pass in train mode moves are put back."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    before = model.training
    try:
        model.train(training)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = [t.clone() for t in flat_tensors(call(model, inputs))]
    finally:
        model.train(before)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    assert found, "the model gives no tensor"
    return found


def difference(want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to the largest value; infinite where they do not compare."""
    if len(want) != len(got) or any(a.shape != b.shape for a, b in zip(want, got, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if torch.equal(a, b) or not a.numel():
            continue
        if not a.is_floating_point() and not a.is_complex():
            return float("inf")
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        if finite.any():
            worst = max(worst, float((a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=1e-30)))
    return worst


def draw(groups: Sequence[pw.ChannelGroup], rng: random.Random) -> dict[str, tuple[int, ...]]:
    """Random units of every prunable group; at least half of the groups lose some."""
    sizes = {g.name: g.size for g in groups if g.prunable}
    step = {g.name: g.multiple for g in groups}
    keep = {name: tuple(range(size)) for name, size in sizes.items()}
    names = [name for name, size in sizes.items() if size > step[name]]
    for name in rng.sample(names, -(-3 * len(names) // 4)):
        count = min(sizes[name] - 1, max(1, round(sizes[name] * rng.uniform(0.1, 0.9))))
        count = max(count - count % step[name], step[name])
        keep[name] = tuple(sorted(rng.sample(range(sizes[name]), count)))
    return keep


def shares(model: nn.Module, surgeon: Surgeon) -> Facts:
    """How much of the model is within reach, and which operation holds what is not.

    A layer's MACs count as prunable where they fall when groups do, a parameter where some prunable group slices it;
    the floors are what is left with one unit in every group. What a pin holds: parameters that no prunable group slices,
    and the MACs of their layers, booked to the first pinned group that owns a part of them.
    """
    groups, costs = surgeon.grouping.groups, surgeon.costs
    full, floor = costs({}), costs(dict.fromkeys(costs.widths, 1))
    lowest = {row.name: row.macs for row in floor.by_layer()}
    fixed = {row.name: row.macs for row in full.by_layer() if lowest[row.name] == row.macs}
    touched = {m.name for g in groups if g.prunable for m in g.members}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    pins: dict[str, dict[str, int]] = {}
    for group in groups:
        if group.prunable:
            continue
        held = pins.setdefault(cause(group.reason), {"groups": 0, "params": 0, "macs": 0})
        held["groups"] += 1
        for member in group.members:
            if member.name not in touched:
                touched.add(member.name)
                held["params"] += sizes.pop(member.name, 0)
                held["macs"] += fixed.pop(member.name.rpartition(".")[0], 0)
    total = sum(p.numel() for p in model.parameters())
    prunable = sum(sizes[name] for name in sizes if name in touched)
    fixed_macs = sum(row.macs for row in full.by_layer() if lowest[row.name] == row.macs)
    return {
        "macs": full.macs,
        "groups": len(groups),
        "prunable_groups": sum(g.prunable for g in groups),
        "params_share": prunable / total if total else 0.0,
        "macs_share": 1 - fixed_macs / full.macs if full.macs else 0.0,
        "params_floor": floor.params / full.params if full.params else 1.0,
        "macs_floor": floor.macs / full.macs if full.macs else 1.0,
        "macs_unbooked": sum(fixed.values()),
        "pins": dict(sorted(pins.items(), key=lambda p: -p[1]["params"])),
    }


def cause(reason: str) -> str:
    """A pin's reason without the place: the module and the line of the user's code."""
    return re.sub(r" in [\w.]+(?= at |$)| at \S+", "", reason)


def counted_macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-adds by torch's own counter, with attention computed in the open (it misses the fused kernel on the CPU).

    The counter does not know grouped products of experts; it is told what they take.
    """
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)
    experts = {} if grouped is None else {grouped: lambda x, y, *rest, **more: 2 * x[0] * x[1] * y[-1]}
    fast, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # it computes an LSTM in one operation that the counter does not know
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:  # the counter fails on a module that is called with a trained parameter
            p.requires_grad_(False)
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=experts) as counter,
        ):
            outputs(model, inputs)
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(fast)
        for p in trained:
            p.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as (positional, keyword) arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def failure(error: BaseException) -> Facts:
    """What went wrong and where: the first line, the deepest frame, and the deepest one of prunewise."""
    chain = [error]
    while (before := chain[-1].__cause__) is not None:
        chain.append(before)
    frames = [f for e in reversed(chain) for f in reversed(traceback.extract_tb(e.__traceback__))]
    places = [f"{without_folders(f.filename)}:{f.lineno} {f.name}" for f in frames]
    ours = [p for p, f in zip(places, frames, strict=True) if "/prunewise/" in f.filename]
    found = {"error": f"{type(error).__name__}: {first_line(error)}", "at": places[:1], "in_prunewise": ours[:1]}
    return found | ({"cause": f"{type(chain[-1]).__name__}: {first_line(chain[-1])}"} if len(chain) > 1 else {})


def first_line(error: BaseException) -> str:
    return without_folders((str(error).strip().splitlines() or [type(error).__name__])[0])[:400]


def peak_mib() -> float:
    """Peak resident memory of this process so far, what it was born with included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
