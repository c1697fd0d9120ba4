"""Residual blocks dropped as a whole: the gated model equals the small one, and costs are exact."""

from __future__ import annotations

import copy
import gc
import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunewise as pw
from prunewise.channels.oneshot import make_plan
from prunewise.core.branches import Branch, Dropped
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from tests.zoo import ZOO, build, call, flat_tensors

# Model of the zoo -> how many of its residual branches can be dropped.
DROPPABLE = {
    "resnet_a": 2, "resnet_b": 2, "resnet_bottleneck": 2, "resnext": 2, "preact_resnet": 3, "mobilenet_v2": 2,
    "efficientnet": 2, "convnext": 3, "groupnorm_cnn": 1, "tcn": 1, "c2f": 2, "partial_conv_slice": 1, "vit_mha": 4,
    "vit_sdpa": 4, "swin": 6, "bert": 2, "encoder_layer": 4, "encoder_layer_prenorm": 4, "llama": 4, "gpt2": 4,
    "residual_mlp": 3,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def offered(surgeon: Surgeon) -> list[Branch]:
    return [b for b in surgeon.grouping.branches if not b.reason]


def outputs(model: nn.Module, inputs: Any, *, training: bool = False) -> list[Tensor]:
    model.train(training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return flat_tensors(call(model, inputs))


def assert_same(want: list[Tensor], got: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape
        if a.is_floating_point():
            scale = max(float(a.abs().max()), 1e-300)
            assert float((a - b).abs().max()) <= tolerance * scale
        else:
            assert torch.equal(a, b)


def draw(surgeon: Surgeon, model: nn.Module, seed: int) -> ChannelPlan:
    """A random plan; seed 0 drops every block, others about half of them."""
    rng = random.Random(seed)
    keep: dict[str, tuple[int, ...]] = {}
    for group in surgeon.costs.groups:
        n = max(1, round(group.size * rng.uniform(0.2, 1.0)))
        keep[group.name] = tuple(sorted(rng.sample(range(group.size), n)))
    blocks = offered(surgeon)
    gone = [b for b in blocks if seed == 0 or rng.random() < 0.5] or [rng.choice(blocks)]
    for branch in gone:
        keep.update(dict.fromkeys(branch.groups, ()))
    return make_plan(fingerprint(model), surgeon.costs, keep, {})


SLOW = {"resnet_a", "resnext", "groupnorm_cnn", "tcn", "c2f", "vit_mha", "swin", "encoder_layer_prenorm", "gpt2"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in sorted(DROPPABLE)]
)
def test_gated_is_pruned(name: str) -> None:
    model, inputs = build(name)
    surgeon = Surgeon.of(model, inputs, blocks=True)
    blocks = offered(surgeon)
    assert len(blocks) == DROPPABLE[name], [(b.name, b.reason) for b in surgeon.grouping.branches]
    assert surgeon.costs({}) == pw.measure(model, inputs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for seed in range(2):
        plan = draw(surgeon, model, seed)
        again = ChannelPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
        assert again.keep == plan.keep
        assert plan.drops_blocks
        gc.collect()  # what a rebuilt model leaves behind must not count as another user of the parameters
        small = pw.apply_plan(model.eval(), again, inputs)
        cost = pw.measure(small, inputs)
        assert (cost.macs, cost.params) == (plan.cost_after["macs"], plan.cost_after["params"])
        assert cost.params == sum(p.numel() for p in small.parameters())
        if "attention" not in ZOO[name].tags and name != "shufflenet_v1":
            # With one head left, copies that the trace of the original has are views: fewer bytes than predicted.
            assert cost.as_dict() == plan.cost_after
        kept = torch.tensor([float(len(plan.keep.get(g.name, range(g.size)))) for g in surgeon.costs.groups])
        for kind, value in plan.cost_after.items():
            assert round(float(surgeon.costs.tensor(kind, kept))) == value
        for training in (False, True):
            gated = copy.deepcopy(model)
            with masked(gated, surgeon.grouping, plan.keep):
                want = outputs(gated, inputs, training=training)
            assert_same(want, outputs(copy.deepcopy(small), inputs, training=training))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["resnet_b", "efficientnet", "llama", "encoder_layer_prenorm"])
def test_session(name: str) -> None:
    model, inputs = build(name)
    plain = copy.deepcopy(model)
    surgeon = Surgeon.of(model, inputs, blocks=True)
    session = pw.attach_gates(model, inputs, budget=pw.Budget(macs=1.0), total_steps=10, drop_blocks=True)
    assert_same(outputs(plain, inputs), outputs(model, inputs))
    plan = draw(surgeon, plain, 0)
    session.set_plan(plan)
    assert session.cost().as_dict() == plan.cost_after
    want = {t: outputs(copy.deepcopy(model), inputs, training=t) for t in (False, True)}
    small = session.finish()
    assert any(isinstance(m, Dropped) for m in small.modules())
    for training, tensors in want.items():
        assert_same(tensors, outputs(copy.deepcopy(small), inputs, training=training))
    for (key, value), (other, same) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, same)


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        nn.init.constant_(self.bn2.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return F.relu(y)


def tower(scales: tuple[float, ...] = (1.0, 1e-4, 1.0)) -> nn.Sequential:
    """Blocks that add more or less to their input."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(*stem, *map(Block, scales), *head)


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(n)]


INNER = [f"{i}.conv1" for i in (3, 4, 5)]


def test_the_block_that_does_nothing_goes_first() -> None:
    model = tower()
    x = batches()[0][0]
    budget = pw.Budget(macs=0.6)
    plan = pw.plan_channels(
        model, x, budget=budget, importance="taylor", data=batches(), include=INNER, drop_blocks=True
    )
    assert plan.keep["4.conv1"] == ()
    assert all(plan.keep.get(name, (0,)) for name in INNER if name != "4.conv1")
    small = pw.apply_plan(model, plan, x)
    assert pw.measure(small, x).as_dict() == plan.cost_after
    assert plan.cost_after["macs"] <= 0.6 * plan.cost_before["macs"]
    kept = pw.plan_channels(model, x, budget=budget, importance="taylor", data=batches(), include=INNER)
    assert all(kept.keep.values())


@pytest.mark.parametrize("shrink_every", [None, 5])
def test_trained_gates_drop_it_and_shrink(shrink_every: int | None) -> None:
    model = tower()
    x = batches()[0][0]
    plain = Surgeon.of(copy.deepcopy(model), x)
    gates = pw.attach_gates(
        model, x, budget=pw.Budget(macs=0.6), total_steps=30, include=INNER, drop_blocks=True, shrink_every=shrink_every
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(30):
        inputs, targets = batches()[step % 6]
        optimizer.zero_grad()
        (F.cross_entropy(model(inputs), targets) + gates.penalty()).backward()
        optimizer.step()
        gates.step(optimizer if shrink_every else None)
    want = outputs(model, x)
    small = gates.finish()
    assert gates.plan.keep["4.conv1"] == ()
    assert_same(want, outputs(small, x), 1e-5)
    assert pw.measure(small, x).as_dict() == gates.plan.cost_after
    assert gates.plan.cost_after == plain_cost(gates.plan, small, x)
    assert plain.costs({}).as_dict() == gates.plan.cost_before


def plain_cost(plan: ChannelPlan, small: nn.Module, x: Tensor) -> dict[str, int]:
    again = pw.apply_plan(tower(), plan, x)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
    return pw.measure(again, x).as_dict()


def test_optimizer_and_files_follow(tmp_path: Any) -> None:
    model, x = tower(), batches()[0][0]
    surgeon = Surgeon.of(model, x, blocks=True)
    plan = make_plan(fingerprint(model), surgeon.costs, {"3.conv1": (), "4.conv1": (1, 2)}, {}, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(x), batches()[0][1]).backward()
    optimizer.step()
    small = pw.apply_plan(model, plan, x)
    pw.migrate_optimizer(optimizer, model, small, plan, x)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert [id(p) for p in held] == [id(p) for p in small.parameters()]
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in held)
    F.cross_entropy(small(x), batches()[0][1]).backward()
    optimizer.step()
    pw.save_pruned(tmp_path, small, plan)
    assert_same(outputs(small, x), outputs(pw.load_pruned(tmp_path, tower), x), 0.0)


def test_plans_that_leave_half_a_block() -> None:
    model, inputs = build("partial_conv_slice")
    surgeon = Surgeon.of(model, inputs, blocks=True)
    (branch,) = offered(surgeon)
    assert len(branch.groups) == 2
    half = {branch.cuts[0]: ()}
    plan = ChannelPlan(half, {branch.cuts[0]: surgeon.costs.widths[branch.cuts[0]]}, fingerprint(model))
    with pytest.raises(pw.PlanError, match="whole block"):
        pw.apply_plan(model, plan, inputs)
    model, inputs = build("vgg")
    group = pw.channel_groups(model, inputs)[0]
    prunable = next(g for g in pw.channel_groups(model, inputs) if g.prunable)
    assert group is not None
    plan = ChannelPlan({prunable.name: ()}, {prunable.name: prunable.size}, fingerprint(model))
    with pytest.raises(pw.PlanError, match="at least one unit"):
        pw.apply_plan(model, plan, inputs)


def test_not_asked_not_offered() -> None:
    model, x = tower(), batches()[0][0]
    session = pw.attach_gates(model, x, budget=pw.Budget(macs=0.6), total_steps=5)
    assert all(session.control.limits.floors.values())
    plan = ChannelPlan({"3.conv1": ()}, {"3.conv1": 8}, fingerprint(tower()))
    with pytest.raises(pw.PlanError, match="at least one unit"):
        session.set_plan(plan)
    session.detach()
    with pytest.raises(pw.PlanError, match="min_keep"):
        pw.attach_gates(model, x, budget=pw.Budget(macs=0.6), total_steps=5, drop_blocks=True, min_keep=2)
    with pytest.raises(pw.PlanError, match="global"):
        pw.plan_channels(model, x, budget=pw.Budget(macs=0.6), drop_blocks=True)


class Odd(nn.Module):
    """Residual forms that have to be refused, one a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inp, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.w = nn.Parameter(torch.randn(16, 8) * 0.3)

    def forward(self, x: Tensor) -> Any:
        x = self.inp(x)
        h = F.relu(self.a(x))
        if self.kind == "raw":
            y = self.b(F.relu(F.linear(x, self.w)))
        elif self.kind == "sigmoid":
            y = torch.sigmoid(self.b(h))
        elif self.kind == "read":
            y = self.b(h)
            return self.out(x + y), y.detach().mean()
        elif self.kind == "tied":
            y = self.b(F.relu(self.a(self.b(h))))
        elif self.kind == "inner":
            y = self.b(h)
            x = x + h[:, :8]
        elif self.kind == "train":
            y = self.b(h)
            if self.training:
                return self.out(x + y) + h.sum()
        else:
            y = self.b(h)
        return self.out(x + y)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("raw", "computes between its modules"),
        ("sigmoid", "stay zero"),
        ("read", None),
        ("tied", ""),
        ("inner", None),
        ("train", None),
        ("plain", ""),
    ],
)
def test_refused_with_a_reason(kind: str, why: str | None) -> None:
    torch.manual_seed(0)
    model, x = Odd(kind).double(), torch.randn(4, 6, dtype=torch.float64)
    surgeon = Surgeon.of(model, x, blocks=True)
    reasons = [b.reason for b in surgeon.grouping.branches]
    if why is None:
        assert all(reasons)
    else:
        assert any(why in r if why else not r for r in reasons), reasons
    for branch in offered(surgeon):
        keep = dict.fromkeys(branch.groups, ())
        small = surgeon.cut(model, keep)
        with masked(model, surgeon.grouping, keep):
            want = outputs(model, x)
        assert_same(want, outputs(small, x))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fast_path_of_torch_encoder_layers(padded: bool) -> None:
    """Dropped parts must not be reached by the fused kernel that torch takes in eval mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model, x = nn.TransformerEncoder(layer, 2).eval(), {"src": torch.randn(2, 5, 16, dtype=torch.float64)}
    if padded:  # torch leaves the padding out: its layers get nested tensors
        x["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    surgeon = Surgeon.of(model, x, blocks=True)
    blocks = offered(surgeon)
    assert len(blocks) == 4
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        for branch in blocks:
            keep = dict.fromkeys(branch.groups, ())
            small = surgeon.cut(model, keep).eval()
            with masked(model, surgeon.grouping, keep):
                want = outputs(model, x)
            assert_same(want, outputs(small, x))
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
