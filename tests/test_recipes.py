"""compress: the whole job, and going on with it after a kill."""

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunewise as pw
from prunewise._loops import cosine
from tests.files import fail_at_write

HALF = pw.Budget(macs=0.5)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12), nn.ReLU(),
                         nn.Linear(12, 3))  # fmt: skip


class Residual(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.a, self.bn = nn.Linear(16, 12), nn.BatchNorm1d(12)
        self.b = nn.Linear(12, 16)
        nn.init.normal_(self.b.weight, std=scale)
        nn.init.zeros_(self.b.bias)

    def forward(self, x):
        return x + self.b(self.bn(self.a(x)).relu())


def make_residual():
    """The second block adds next to nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Residual(0.3), Residual(1e-6), nn.Linear(16, 3))


SHRINKING = {"shrink_every": 4, "drop_blocks": True, "budget": pw.Budget(macs=0.4)}


class Noisy(TensorDataset):
    """Draws from all three global generators."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.random()), y


def make_data(batch_size=16, n=96, **options):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=g)
    return DataLoader(Noisy(x, x[:, :3].argmax(1)), batch_size, shuffle=True, **options)


def make_val():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(50, 6, generator=g)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16)


def run(model=None, loader=None, **options):
    options = {"budget": HALF, "epochs": 3, "progress": False, **options}
    model = make_model() if model is None else model
    return pw.compress(model, make_data() if loader is None else loader, **options)


def equal(a, b):
    assert a.plan == b.plan
    assert a.history == b.history
    assert a.report == b.report
    for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    return True


class Killed(BaseException):
    pass


def killed_at(step):
    """A loss that stops the process, as it were, at the n-th call in training mode."""
    calls = 0

    def function(model, batch):
        nonlocal calls
        calls += model.training
        if model.training and calls == step:
            raise Killed
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return function


# -- the result ---------------------------------------------------------------------------------------------------


def test_the_budget_is_met_and_nothing_is_lost_at_the_cut():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    result = run(model, val_loader=make_val(), epochs=8)
    assert result.plan.cost_after["macs"] <= 0.5 * result.plan.cost_before["macs"]
    assert result.report.after == result.plan.cost_after
    assert result.report.gated.correct == result.report.small.correct
    assert result.report.small.total == 50
    assert result.history[-1].loss < result.history[0].loss
    assert result.history[-1].metric == result.report.small.value
    assert [row.epoch for row in result.history] == list(range(1, 9))
    assert result.history[-1].macs_share <= 0.5
    assert not result.model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    table = str(result.report)
    assert "accuracy" in table
    assert f"{result.report.after['macs']:,}" in table


def test_the_result_can_be_saved_and_loaded(tmp_path):
    result = run(val_loader=make_val())
    pw.save_pruned(tmp_path, result.model, result.plan)
    x = torch.randn(4, 6)
    assert torch.equal(pw.load_pruned(tmp_path, make_model)(x), result.model(x))


def test_the_same_seed_gives_the_same_and_global_generators_are_left_alone():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    model, loader = make_model(), make_data(generator=torch.Generator().manual_seed(3))
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), loader.generator.get_state())
    a = run(model, loader)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert state[2] == np.random.get_state()[1].tolist()
    assert torch.equal(state[3], loader.generator.get_state())
    torch.rand(7)
    random.random()
    assert equal(a, run(model, make_data(generator=torch.Generator().manual_seed(8))))
    c = run(model, loader, seed=1)
    assert c.history != a.history


@pytest.mark.parametrize("method", ["magnitude", "taylor", "hybrid", "random"])
def test_one_shot_methods(method, tmp_path):
    result = run(method=method, val_loader=make_val(), checkpoint=tmp_path)
    assert result.plan.cost_after["macs"] <= 0.5 * result.plan.cost_before["macs"]
    assert equal(result, run(method=method, val_loader=make_val()))
    assert equal(result, run(method=method, val_loader=make_val(), checkpoint=tmp_path))


def test_lists_dicts_criteria_and_callables():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def forward(self, x, labels=None):
            out = self.net(x)
            return (
                {"logits": out} if labels is None else {"logits": out, "loss": nn.functional.cross_entropy(out, labels)}
            )

    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    result = run(Dict(), [{"x": x, "labels": y}] * 4, val_loader=[{"x": x, "labels": y}])
    assert result.report.metric == "loss"
    regression = [(x, torch.randn(32, 3))] * 4
    result = run(loader=regression, val_loader=regression, loss=nn.MSELoss())
    assert result.report.metric == "loss"

    def width(model, loader):
        return float(model[0].out_features)

    result = run(
        loader=regression, val_loader=regression, loss=lambda m, b: (m(b[0]) - b[1]).abs().mean(), metric=width
    )
    assert (result.report.metric, result.report.original.value) == ("width", 16.0)
    with_two = [(x, torch.tensor(2.0), y)] * 4

    class Two(Dict):
        def forward(self, x, scale):
            return self.net(x) * scale

    assert run(Two(), with_two, amp=True).plan.keep
    assert run(loader=[(x, y)] * 4, example_inputs=x[:1]).plan.cost_before["macs"] == 16 * 6 + 16 * 12 + 36


def test_frozen_parameters_stay_and_settings_reach_the_gates():
    model = make_model()
    model[0].weight.requires_grad_(False)
    result = run(model, exclude="4", round_to=4)
    assert set(result.plan.keep) == {"0"}
    assert len(result.plan.keep["0"]) % 4 == 0
    assert torch.equal(result.model[0].weight, model[0].weight[list(result.plan.keep["0"])])


def test_progress_is_a_line_an_epoch_on_stderr(capsys):
    run(progress=True, val_loader=make_val())
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch 1/3  loss ")
    assert "accuracy" in lines[2]


def test_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(progress=True)


# -- resuming -----------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": None,
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "groups": lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], 0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("step", "every"), [(1, None), (3, 1), (7, None), (8, 2), (12, 5), (18, 4)])
def test_stopped_at_a_step_the_second_call_gives_the_same(tmp_path, step, every, optimizer):
    options = {"val_loader": make_val(), "optimizer": optimizer}
    undisturbed = run(loss=killed_at(0), **options)
    with pytest.raises(Killed):
        run(loss=killed_at(step), checkpoint=tmp_path, checkpoint_every=every, **options)
    assert equal(undisturbed, run(loss=killed_at(0), checkpoint=tmp_path, checkpoint_every=every, **options))
    assert len(os.listdir(tmp_path)) == 2
    assert equal(undisturbed, run(loss=killed_at(-1), checkpoint=tmp_path, **options))  # nothing is left to do


@pytest.mark.parametrize(("step", "optimizer"), [*zip((3, 6, 15), OPTIMIZERS.values(), strict=True)])
def test_stopped_after_a_block_was_dropped_the_second_call_gives_the_same(tmp_path, step, optimizer):
    options = {"model": make_residual(), "optimizer": optimizer, "checkpoint_every": 1, **SHRINKING}
    undisturbed = run(loss=killed_at(0), **options)
    assert undisturbed.plan.drops_blocks
    with pytest.raises(Killed):
        run(loss=killed_at(step), checkpoint=tmp_path, **options)
    assert equal(undisturbed, run(loss=killed_at(0), checkpoint=tmp_path, **options))
    pw.save_pruned(tmp_path / "small", undisturbed.model, undisturbed.plan)
    x = torch.randn(4, 6)
    assert torch.equal(pw.load_pruned(tmp_path / "small", make_residual)(x), undisturbed.model(x))


def test_shrinking_makes_the_network_smaller_while_it_trains():
    sizes = []

    def loss(model, batch):
        sizes.append(sum(p.numel() for p in model.parameters()))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    run(loss=loss, shrink_every=4)
    assert sizes[-1] < sizes[0]


def test_stopped_again_and_again(tmp_path):
    undisturbed = run(loss=killed_at(0))
    for _ in range(40):
        try:
            result = run(loss=killed_at(3), checkpoint=tmp_path, checkpoint_every=1)
            break
        except Killed:
            pass
    assert equal(undisturbed, result)


@pytest.mark.parametrize("stop", range(1, 13))
def test_stopped_at_any_write_the_second_call_gives_the_same(tmp_path, monkeypatch, stop):
    undisturbed = run(epochs=2)
    with monkeypatch.context() as patch:
        writes = fail_at_write(patch, stop, Killed)
        try:
            run(epochs=2, checkpoint=tmp_path)
        except Killed:
            pass
        else:
            assert len(writes) < stop
    assert equal(undisturbed, run(epochs=2, checkpoint=tmp_path))


@pytest.mark.slow
def test_workers_do_not_change_what_is_resumed(tmp_path):
    options = {"epochs": 2, "loader": make_data(num_workers=1)}
    undisturbed = run(**options)
    with pytest.raises(Killed):
        run(loss=killed_at(9), checkpoint=tmp_path, checkpoint_every=4, **options)
    resumed = run(loss=killed_at(0), checkpoint=tmp_path, checkpoint_every=4, **options)
    assert undisturbed.plan == resumed.plan


SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.test_recipes import KINDS, make_data, make_val, run
result = run(loader=make_data(n=384), val_loader=make_val(), epochs=4, checkpoint={folder!r}, checkpoint_every=3, progress=True,
             **KINDS[{kind!r}]())
print(json.dumps(result.plan.to_dict()))
"""


KINDS = {"whole": dict, "shrinking": lambda: {"model": make_residual(), **SHRINKING}}


@pytest.mark.parametrize("kind", [pytest.param("whole", marks=pytest.mark.slow), "shrinking"])
def test_a_process_that_is_killed_is_gone_on_with(tmp_path, kind):
    torch.set_num_threads(1)
    undisturbed = run(loader=make_data(n=384), val_loader=make_val(), epochs=4, **KINDS[kind]())
    code = SCRIPT.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path / "c"), kind=kind)
    killed = 0
    for attempt in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if attempt < 2:  # killed some steps after it has begun
            seen = (tmp_path / "c" / "run.json").stat().st_mtime_ns if attempt else 0
            while child.poll() is None:
                state = tmp_path / "c" / "run.json"
                if state.exists() and state.stat().st_mtime_ns != seen:
                    time.sleep(0.02 * attempt)
                    child.kill()
                time.sleep(0.001)
        out, err = child.communicate()
        assert child.returncode in (0, -9), err
        killed += child.returncode != 0
        if child.returncode == 0:
            break
    assert killed, "the process was too fast to be killed"
    assert "resumed after" in err
    assert pw.ChannelPlan.from_dict(json.loads(out)) == undisturbed.plan


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"epochs": 4}, "epochs"),
        ({"seed": 1}, "seed"),
        ({"budget": pw.Budget(macs=0.6)}, "budget"),
        ({"exclude": "4"}, "groups"),
        ({"round_to": 2}, "limits"),
        ({"method": "magnitude"}, "method"),
        ({"shrink_every": 3}, "shrink_every"),
        ({"drop_blocks": True}, "drop_blocks"),
        ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}, "optimizer"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.02)}, "rates"),
        ({"loader": make_data(batch_size=8)}, "steps|inputs"),
        ({"model": nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))}, "model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, name):
    run(checkpoint=tmp_path, epochs=2)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(pw.CheckpointError, match=f"holds another run: its ({name}) is"):
        run(**{"checkpoint": tmp_path, "epochs": 2, **change})
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_going_on_from_other_weights_is_said(tmp_path):
    first = run(checkpoint=tmp_path, epochs=2)
    other = make_model()
    torch.nn.init.normal_(next(other.parameters()))
    with pytest.warns(UserWarning, match="started from other weights than this model's"):
        again = run(other, checkpoint=tmp_path, epochs=2)
    assert again.plan == first.plan


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(checkpoint=tmp_path, epochs=2)
    (weights,) = tmp_path.glob("*.safetensors")
    content = weights.read_bytes()
    for damaged in (content[:-3], content[:9], b"", bytes([*content[:-1], content[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(pw.CheckpointError, match=r"damaged|SHA-256"):
            run(checkpoint=tmp_path, epochs=2)
    weights.write_bytes(content)
    state = json.loads((tmp_path / "run.json").read_text())
    pairs = dict(map(tuple, ((k, i) for i, (k, _) in enumerate(state["state"]["dict"]))))
    for key, value in (
        ("epoch", None),
        ("history", 3),
        ("model", {"dict": []}),
        ("gates", {"dict": []}),
        ("optimizer", []),
    ):
        other = copy.deepcopy(state)
        other["state"]["dict"][pairs[key]][1] = value
        (tmp_path / "run.json").write_text(json.dumps(other))
        with pytest.raises(pw.PrunewiseError):
            run(checkpoint=tmp_path, epochs=2)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def loss(m, batch):
        nonlocal calls
        calls += 1
        value = m(batch[0]).square().mean()
        return value * torch.nan if calls == 8 else value

    with pytest.raises(pw.NonFiniteError, match="the loss is nan at epoch 2, step 2"):
        run(model, loss=loss, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(hasattr(m, "parametrizations") for m in model.modules())
    calls = 100
    assert len(run(model, loss=loss, checkpoint=tmp_path).history) == 3


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path):
    def poisoned(m, batch):
        return (m(batch[0]).sum() * 1e30).square().sqrt()

    with pytest.raises(pw.NonFiniteError):
        run(loss=poisoned, checkpoint=tmp_path, checkpoint_every=1, optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    assert not (tmp_path / "run.json").exists()


X, Y = torch.randn(8, 6), torch.randint(0, 3, (8,))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 0}, pw.DataError, "epochs=0"),
        ({"epochs": 2.0}, pw.DataError, r"epochs=2\.0"),
        ({"epochs": True}, pw.DataError, "epochs=True"),
        ({"seed": -1}, pw.DataError, "seed=-1"),
        ({"checkpoint_every": 1.5}, pw.DataError, "checkpoint_every"),
        ({"loader": iter([(X, Y)])}, pw.DataError, "iterator"),
        ({"loader": []}, pw.DataError, "empty"),
        ({"loader": DataLoader(TensorDataset(X, Y), 100, drop_last=True)}, pw.DataError, "empty"),
        ({"loader": 3}, pw.DataError, "no length"),
        ({"loader": [X]}, pw.DataError, r"not \(inputs, targets\)"),
        ({"loader": [{"input": X}]}, pw.DataError, "no 'loss' for a batch"),
        ({"loader": [(X[:, :5], Y)]}, pw.TraceError, "could not be run"),
        ({"val_loader": []}, pw.DataError, "val_loader is empty"),
        ({"loss": lambda m, b: m(b[0])}, pw.DataError, "should be one number"),
        ({"loss": lambda m, b: 3.0}, pw.DataError, "should be one number"),
        ({"loss": lambda m, b: torch.zeros((), requires_grad=True) * 1}, pw.PrunewiseError, "gradient"),
        ({"optimizer": lambda p: 3}, pw.DataError, "optimizer= gave a int"),
        ({"optimizer": "sgd"}, pw.DataError, "optimizer='sgd' should be a callable"),
        ({"loss": "ce"}, pw.DataError, "loss='ce' should be a callable"),
        ({"metric": "accuracy"}, pw.DataError, "metric='accuracy' should be a callable"),
        ({"lr_schedule": lambda share: None}, pw.DataError, "lr_schedule gave None at 0 of the run"),
        ({"checkpoint": __file__}, pw.CheckpointError, "is a file: name a folder"),
        ({"method": "guess"}, pw.PlanError, "unknown importance 'guess'"),
        ({"method": "magnitude", "shrink_every": 5}, pw.PlanError, "needs method='gates'"),
        ({"method": "magnitude", "drop_blocks": True}, pw.PlanError, "importance='taylor'"),
        ({"shrink_every": 0}, pw.PlanError, "shrink_every=0"),
        ({"budget": pw.Budget(macs=1)}, pw.BudgetError, "cannot come below"),
        ({"exclude": "*"}, pw.NoPrunableGroupError, "can be removed"),
    ],
)
def test_bad_input(options, error, match):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    options = {"model": model, "loader": [(X, Y)] * 3, **options}
    with pytest.raises(error, match=match):
        run(**options)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_models_that_cannot_be_trained_are_refused():
    model = make_model()
    with pytest.raises(pw.DataError, match="nothing can be trained"):
        run(copy.deepcopy(model).requires_grad_(False))
    pw.attach_gates(model, X, budget=HALF, total_steps=5)
    with pytest.raises(pw.AlreadyGatedError):
        run(model)


def test_an_epoch_without_batches_is_an_error():
    class Odd(list):
        def __iter__(self):
            self.times = getattr(self, "times", 0) + 1
            return iter([]) if self.times > 2 else super().__iter__()

    with pytest.raises(pw.DataError, match="no batch"):
        run(loader=Odd([(X, Y)]))


def test_cosine():
    assert [round(cosine(p), 6) for p in (0, 0.5, 1, 2)] == [1, 0.5, 0, 0]
