"""Gates in the user's own loop."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import prunewise as pw
from prunewise.channels.control import Schedule
from prunewise.channels.gate import sigmoid_slope
from prunewise.core.plan import fingerprint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Conv2d(10, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))


X = torch.zeros(2, 3, 5, 5)
STEPS = 20
HALF = pw.Budget(macs=0.5)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 5, 5, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    x, y = data(step)
    return nn.functional.cross_entropy(model(x), y)


def attach(model: nn.Module, **kwargs: Any) -> pw.GateSession:
    return pw.attach_gates(model, X, **{"budget": HALF, "total_steps": STEPS, **kwargs})


def train(
    model: nn.Module, gates: pw.GateSession, optimizer: torch.optim.Optimizer, steps: range, shrinking: bool = False
) -> None:
    for step in steps:
        loss = loss_of(model, step) + gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step(optimizer if shrinking else None)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def check(gates: pw.GateSession, model: nn.Module) -> nn.Module:
    """Finish, and compare before and after to the sample."""
    model.eval()
    gates.harden()
    x = torch.randn(200, 3, 5, 5)
    with torch.no_grad():
        want = model(x)
        small = gates.finish()
        got = small(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.argmax(1), want.argmax(1))
    full = pw.measure(net(), X)
    assert pw.measure(small, X).macs <= 0.5 * full.macs
    assert type(small) is Net
    return small


def test_three_lines() -> None:
    model = net()
    gates = attach(model)
    optimizer = sgd(model)
    train(model, gates, optimizer, range(STEPS))
    assert gates.cost().macs <= 0.5 * pw.measure(net(), X).macs
    plan = gates.harden()
    assert plan.cost_after["macs"] == gates.cost().macs
    assert float(gates.penalty()) == 0
    small = check(gates, model)
    assert gates.plan == plan
    assert not any("parametrizations" in n for n, _ in small.named_parameters())


def test_costs_at_the_start_and_penalty_on_the_way() -> None:
    model = net()
    gates = attach(model)
    assert gates.cost() == pw.measure(net(), X)
    assert float(gates.penalty()) == 0
    assert gates.attached
    assert all((p >= 0).all() for p in gates.parameters())
    assert {id(p) for p in gates.parameters()}.isdisjoint({id(p) for p in model.parameters()})


@pytest.mark.parametrize("options", [{"shaping": sigmoid_slope}, {"initial": 0.3}, {"control": "descent"}])
def test_options(options: dict[str, Any]) -> None:
    model = net()
    gates = attach(model, **options)
    train(model, gates, sgd(model), range(STEPS))
    check(gates, model)


def test_autocast() -> None:
    model = net()
    gates = attach(model)
    optimizer = sgd(model)
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step) + gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step()
    check(gates, model)


def test_whole_model_in_bfloat16() -> None:
    model = net().bfloat16()
    gates = pw.attach_gates(model, X.bfloat16(), budget=HALF, total_steps=STEPS)
    optimizer = sgd(model)
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()
        gates.step()
    small = gates.finish()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    model, plain = net(), net()
    gates, reference = attach(model), attach(plain)
    compiled = torch.compile(model, backend=backend)
    train(compiled, gates, sgd(model), range(STEPS))
    train(plain, reference, sgd(plain), range(STEPS))
    assert gates.control.keep == reference.control.keep
    check(gates, model)
    torch._dynamo.reset()


def test_gradient_accumulation() -> None:
    model = net()
    gates = attach(model)
    optimizer = sgd(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(3):
            (loss_of(model, 10 * step + micro) / 3).backward()
        optimizer.step()
        gates.step()
    check(gates, model)


def test_clipping_does_not_see_the_gates() -> None:
    model = net()
    gates = attach(model)
    optimizer = sgd(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        held = [g for g in gates.parameters() if g.grad is not None]
        assert step > 0 or len(held) == len(list(gates.parameters()))
        before = [g.grad.clone() for g in held]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert all(torch.equal(a, g.grad) for a, g in zip(before, held, strict=True))
        optimizer.step()
        gates.step()
    check(gates, model)


def test_gates_at_rest_need_no_gradient_and_stay() -> None:
    model = net()
    gates = attach(model)
    optimizer = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.3)
    train(model, gates, optimizer, range(3))
    plan = gates.harden()
    for step in range(3):  # the user trains on, and calls gates.step() no more
        optimizer.zero_grad()
        loss_of(model, step).backward()
        assert all(g.grad is None for g in gates.parameters())
        optimizer.step()
    assert gates.harden() == plan
    check(gates, model)


def test_an_optimizer_that_holds_the_gates_does_not_move_them() -> None:
    model = net()
    gates = attach(model)
    optimizer = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.3)
    train(model, gates, optimizer, range(STEPS))
    check(gates, model)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_average_of_weights(use_buffers: bool) -> None:
    model = net()
    gates = attach(model)
    optimizer = sgd(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    for step in range(STEPS):
        train(model, gates, optimizer, range(step, step + 1))
        ema.update_parameters(model)
    ema.eval()
    x = torch.randn(50, 3, 5, 5)
    with torch.no_grad():
        want = ema(x)
        small = gates.finish(ema.module)
        torch.testing.assert_close(small(x), want, rtol=1e-4, atol=1e-5)
    assert not torch.equal(small.fc.bias, model.fc.bias)
    model(x)  # the model is whole again
    assert model.a.weight.shape[0] == 10
    assert not any("parametrizations" in n for n, _ in model.named_parameters())


def test_steps_that_overflow_do_not_count() -> None:
    """What a gradient scaler does: infinite gradients, the step skipped, gates.step() called all the same."""
    model = net()
    gates = attach(model)
    optimizer = sgd(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step % 4 == 1:
            (loss * float("inf")).backward()
        else:
            loss.backward()
            optimizer.step()
        gates.step()
    check(gates, model)


@pytest.mark.parametrize("control", ["fisher", "descent"])
def test_a_scale_that_changes_changes_nothing(control: str) -> None:
    """The scale is doubled after every step: the last ones would count for everything if the gates were not told."""
    plain = net()
    reference = attach(plain, control=control)
    train(plain, reference, sgd(plain), range(STEPS))

    model = net()
    gates = attach(model, control=control)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step) + gates.penalty()).backward()
        scaler.step(optimizer)
        gates.step(grad_scale=scaler.scale(torch.ones(())))
        scaler.update()
    assert scaler.get_scale() == 2.0**STEPS
    for mass, want in zip(gates.state_dict()["mass"], reference.state_dict()["mass"], strict=True):
        torch.testing.assert_close(mass, want)
    assert gates.harden() == reference.harden()


def test_a_scale_as_a_number() -> None:
    scaled, plain = attach(net()), attach(net())
    (8 * loss_of(scaled.model, 0)).backward()
    loss_of(plain.model, 0).backward()
    scaled.step(grad_scale=8.0)
    plain.step()
    for mass, want in zip(scaled.state_dict()["mass"], plain.state_dict()["mass"], strict=True):
        assert torch.equal(mass, want)


def test_a_loss_that_is_never_finite_is_an_error() -> None:
    model = net()
    gates = attach(model)
    with pytest.raises(pw.NonFiniteError):
        for step in range(STEPS):
            (loss_of(model, step) * float("nan")).backward()
            gates.step()
    gates.detach()
    assert model.fc.weight.isfinite().all()


def test_resuming_equals_an_undisturbed_run(tmp_path: Any) -> None:
    whole = net()
    gates = attach(whole)
    train(whole, gates, sgd(whole), range(STEPS))

    first = net()
    one = attach(first)
    optimizer = sgd(first)
    train(first, one, optimizer, range(3))
    torch.save([first.state_dict(), optimizer.state_dict(), one.state_dict()], tmp_path / "state.pt")
    model_state, optimizer_state, gate_state = torch.load(tmp_path / "state.pt", weights_only=True)

    second = net(1)
    two = attach(second)
    second.load_state_dict(model_state)
    optimizer = sgd(second)
    optimizer.load_state_dict(optimizer_state)
    two.load_state_dict(gate_state)
    train(second, two, optimizer, range(3, STEPS))
    assert two.harden().keep == gates.harden().keep
    for a, b in zip(gates.finish().state_dict().values(), two.finish().state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused() -> None:
    gates = attach(net())
    state = gates.state_dict()
    state["keep"] = {"other": [0]}
    with pytest.raises(pw.PlanError, match="another model"):
        gates.load_state_dict(state)


def test_detach_gives_the_same_parameters_back() -> None:
    model = net()
    names, ids = [n for n, _ in model.named_parameters()], [id(p) for p in model.parameters()]
    kinds, before = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    optimizer = sgd(model)
    gates = attach(model)
    assert {id(p) for p in model.parameters()} == set(ids)
    assert gates.detach() is model
    assert [n for n, _ in model.named_parameters()] == names
    assert [id(p) for p in model.parameters()] == ids
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not gates.attached
    loss_of(model, 0).backward()
    optimizer.step()
    assert not torch.equal(model.a.weight, before["a.weight"])
    attach(model).detach()


def test_an_optimizer_from_before_works_through_the_whole_run() -> None:
    model = net()
    optimizer = sgd(model)
    gates = attach(model)
    train(model, gates, optimizer, range(STEPS))
    check(gates, model)


def test_attached_twice() -> None:
    model = net()
    gates = attach(model)
    with pytest.raises(pw.AlreadyGatedError, match=r"finish\(\) or detach\(\)"):
        attach(model)
    assert gates.attached
    gates.detach()
    gates.detach()
    attach(model)


def test_step_without_backward() -> None:
    gates = attach(net())
    with pytest.raises(pw.PrunewiseError, match=r"loss\.backward\(\)"):
        gates.step()


@pytest.mark.parametrize("call", ["step", "finish", "harden"])
def test_a_session_that_has_ended(call: str) -> None:
    model = net()
    gates = attach(model)
    gates.finish()
    with pytest.raises(pw.PrunewiseError, match="has ended"):
        getattr(gates, call)()


def test_finish_without_training_meets_the_budget() -> None:
    model = net()
    check(attach(model), model)


def test_finish_where_gradients_are_off() -> None:
    with torch.no_grad():
        small = attach(net()).finish()
    assert pw.measure(small, X).macs <= 0.5 * pw.measure(net(), X).macs


def test_finish_leaves_the_full_model() -> None:
    model = net()
    gates = attach(model)
    train(model, gates, sgd(model), range(STEPS))
    small = gates.finish()
    assert model.a.weight.shape[0] == 10
    assert (model.b.weight != 0).all()
    again = pw.apply_plan(model, gates.plan, X)
    for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_set_plan() -> None:
    model = net()
    plan = pw.plan_channels(model, X, budget=HALF, importance="random")
    gates = attach(model)
    gates.set_plan(plan)
    assert gates.cost().as_dict() == plan.cost_after
    assert dict(gates.harden().keep) == dict(plan.keep)


def changed(plan: pw.ChannelPlan, kept: Any) -> pw.ChannelPlan:
    return dataclasses.replace(plan, keep={**plan.keep, "a": kept})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: dataclasses.replace(p, fingerprint="0" * 16), "for another model"),
        (lambda p: dataclasses.replace(p, sizes={**p.sizes, "a": 11}), "'a' of 11 units, which has no gates here"),
        (lambda p: dataclasses.replace(p, keep={"x": (0,)}), "'x' of None units, which has no gates here"),
        (lambda p: changed(p, (0, 10)), r"'a': kept units should be indices in \[0, 10\)"),
        (lambda p: changed(p, (-1, 3)), r"'a': kept units should be indices in \[0, 10\)"),
        (lambda p: changed(p, (3, 3)), "'a': .* without repetition"),
        (lambda p: changed(p, (3, 2)), "'a': .* ascending"),
        (lambda p: changed(p, ()), "'a': nothing is kept"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(
    spoil: Callable[[pw.ChannelPlan], pw.ChannelPlan], message: str
) -> None:
    plan = pw.plan_channels(net(), X, budget=HALF, importance="random")
    model = net()
    gates = attach(model)
    gates.set_plan(plan)
    want = model(data(0)[0])
    with pytest.raises(pw.PlanError, match=message):
        gates.set_plan(spoil(plan))
    assert torch.equal(model(data(0)[0]), want)
    assert gates.harden().keep == plan.keep


def test_no_plan_opens_what_was_shrunk() -> None:
    model, optimizer, gates = start(0)
    train(model, gates, optimizer, range(STEPS), shrinking=True)
    with pytest.raises(pw.PlanError, match="has been shrunk"):
        gates.set_plan(gates.harden())


def test_frozen_weights_learn_gates_all_the_same() -> None:
    model = net().requires_grad_(False)
    model.fc.bias.requires_grad_(True)
    gates = attach(model)
    train(model, gates, torch.optim.SGD([model.fc.bias], lr=0.1), range(STEPS))
    small = check(gates, model)
    assert not small.a.weight.requires_grad
    assert small.fc.bias.requires_grad


def test_include_exclude_min_keep_round_to() -> None:
    model = net()
    gates = attach(model, exclude="b", min_keep=2, round_to=2)
    assert [g.name for g in gates.groups] == ["a"]
    train(model, gates, sgd(model), range(STEPS))
    plan = gates.harden()
    assert set(plan.keep) == {"a"}
    assert len(plan.keep["a"]) % 2 == 0


@pytest.mark.parametrize("every", [2, 5])
def test_shrinking_while_training(every: int) -> None:
    model = net()
    modules = [id(m) for m in model.modules()]
    gates = attach(model, shrink_every=every)
    train(model, gates, sgd(model), range(STEPS), shrinking=True)
    assert model.a.weight.shape[0] < 10 or model.b.weight.shape[0] < 8
    plan = gates.harden()
    small = check(gates, model)
    assert [id(m) for m in model.modules()] == modules
    whole = pw.apply_plan(net(), plan, X)  # the plan is one for the original
    assert {k: v.shape for k, v in whole.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}


def test_a_width_in_the_code_is_no_reason_to_change_classes_while_training() -> None:
    class Baked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu().reshape(-1, 10))

    model = Baked()
    x = torch.randn(4, 6)
    gates = pw.attach_gates(model, x, budget=pw.Budget(macs=0.5), total_steps=4, shrink_every=2)
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match="cannot be shrunk while it trains.*a and b must have same reduction dim"):
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            gates.step(optimizer)
    with pytest.warns(UserWarning, match="graph module, not your class"):
        small = gates.finish()
    assert type(model) is Baked
    assert type(model.a) is nn.Linear
    torch.testing.assert_close(small(x).shape, model(x).shape)


def start(seed: int, **kwargs: Any) -> tuple[Net, torch.optim.Optimizer, pw.GateSession]:
    """A model that is shrunk while its gates close, and an optimizer made before the gates that holds them as well."""
    model = net(seed)
    optimizer = sgd(model)
    gates = attach(model, **{"shrink_every": 2, "schedule": Schedule(close=0.6), **kwargs})
    optimizer.add_param_group({"params": list(gates.parameters()), "weight_decay": 0.0})
    return model, optimizer, gates


@pytest.mark.parametrize("control", ["fisher", "descent"])
@pytest.mark.parametrize(("stop", "macs"), [(7, 0.5), (15, 0.5), (15, 0.1)])  # to a tenth: a group of one unit is none
def test_resuming_a_shrunk_model_equals_an_undisturbed_run(tmp_path: Any, stop: int, macs: float, control: str) -> None:
    options = {"budget": pw.Budget(macs=macs), "control": control}
    whole, optimizer, gates = start(0, **options)
    train(whole, gates, optimizer, range(STEPS), shrinking=True)

    first, optimizer, one = start(0, **options)
    train(first, one, optimizer, range(stop), shrinking=True)
    assert first.a.weight.shape[0] < 10
    torch.save([first.state_dict(), optimizer.state_dict(), one.state_dict()], tmp_path / "state.pt")
    model_state, optimizer_state, gate_state = torch.load(tmp_path / "state.pt", weights_only=True)

    second, optimizer, two = start(1, **options)
    two.load_state_dict(gate_state, optimizer)
    second.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    assert two.cost() == one.cost()
    train(second, two, optimizer, range(stop, STEPS), shrinking=True)
    assert two.harden() == gates.harden()
    for a, b in zip(gates.finish().state_dict().values(), two.finish().state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_shrunk_state_that_cannot_be_loaded_changes_nothing() -> None:
    model, optimizer, gates = start(0)
    train(model, gates, optimizer, range(STEPS), shrinking=True)
    state = gates.state_dict()
    fresh, optimizer, session = start(1)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(pw.PlanError, match=r"gates\.load_state_dict\(state, optimizer\)"):
        session.load_state_dict(state)
    with pytest.raises(pw.PlanError, match=r"indices in \[0, 10\)"):
        session.load_state_dict({**state, "units": {**state["units"], "a": [3, 99]}}, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), fresh.state_dict().values(), strict=True))
    session.load_state_dict(state, optimizer)
    session.load_state_dict(state)  # nothing is left to shrink
    with pytest.raises(pw.PlanError, match="on the original model"):
        session.load_state_dict(start(0)[2].state_dict(), optimizer)


def test_shrinking_takes_the_gates_in_the_optimizer_along() -> None:
    model, optimizer, gates = start(0)
    train(model, gates, optimizer, range(STEPS), shrinking=True)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in [*model.parameters(), *gates.parameters()])


def test_shrinking_where_every_group_keeps_several_units() -> None:
    model, optimizer, gates = start(0, min_keep=2)
    train(model, gates, optimizer, range(STEPS), shrinking=True)
    assert model.a.weight.shape[0] < 10


class Flattened(Net):
    """A width that is written into forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.bn(self.a(x)).relu()).view(-1, 8 * 9))


@pytest.mark.filterwarnings("ignore:the small")
def test_a_model_that_would_lose_its_class_is_not_shrunk_while_it_trains() -> None:
    model = Flattened()
    gates = attach(model, shrink_every=2, include="b", budget=pw.Budget(params=0.7))
    with pytest.warns(UserWarning, match="cannot be shrunk while it trains") as seen:
        train(model, gates, sgd(model), range(STEPS), shrinking=True)
    assert sum("while it trains" in str(w.message) for w in seen) == 1
    assert model.b.weight.shape[0] == 8
    small = gates.finish()
    assert type(model) is Flattened
    assert pw.measure(small, X).as_dict() == gates.plan.cost_after


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


def test_a_block_with_one_open_unit_may_still_go_after_shrinking() -> None:
    model, x = nn.Sequential(nn.Linear(3, 6), Residual(), nn.Linear(6, 4)), torch.randn(5, 3)
    architecture = fingerprint(model)
    gates = pw.attach_gates(model, x, budget=pw.Budget(macs=0.9), total_steps=STEPS, drop_blocks=True)
    optimizer = sgd(model)
    plan = pw.ChannelPlan({"1.a": (3,)}, {"1.a": 8}, architecture)
    gates.set_plan(plan)
    want, cost = model(x), gates.cost()
    assert gates.shrink(optimizer)
    assert model.get_submodule("1.a").weight.shape == (2, 6)
    assert [b.name for b in gates.control.limits.branches] == ["1"]
    torch.testing.assert_close(model(x), want)
    assert gates.cost() == cost
    assert not gates.shrink(optimizer)
    assert gates.harden().keep == plan.keep
    assert gates.shrink(optimizer)  # frozen: now it stays
    assert model.get_submodule("1.a").weight.shape == (1, 6)
    torch.testing.assert_close(gates.finish()(x), want)
    assert gates.plan.keep == plan.keep


def test_shrinking_needs_the_optimizer() -> None:
    model = net()
    gates = attach(model, shrink_every=1)
    optimizer = sgd(model)
    with pytest.raises(pw.PlanError, match=r"gates\.step\(optimizer\)"):
        train(model, gates, optimizer, range(STEPS))


def test_weights_that_forward_finds_elsewhere_are_noticed() -> None:
    """A weight read otherwise than by its name is not gated: that must not go unnoticed."""

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = next(p for p in self.b.parameters() if p.dim() == 2)
            return nn.functional.linear(self.a(x).relu(), weight, self.b.bias)

    model = Elsewhere()
    x = torch.randn(2, 6)
    try:
        gates = pw.attach_gates(model, x, budget=HALF, total_steps=3)
    except pw.PrunewiseError:
        assert not any("parametrizations" in n for n, _ in model.named_parameters())
        return
    gates.harden()
    want = model(x)
    torch.testing.assert_close(gates.finish()(x), want)
