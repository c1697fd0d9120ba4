"""Pruned models on disk: equal after loading, and whole after a kill."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import prunewise as pw
from tests.files import X, factory, fail_at_write, pruned, same
from tests.zoo.registry import ZOO, build

# -- what is saved comes back -------------------------------------------------------------------------------------


def test_outputs_are_equal_bit_for_bit_and_only_the_two_files_are_there(saved, example):
    loaded = pw.load_pruned(saved, factory)
    assert same(loaded, example[0], X)
    assert sorted(os.listdir(saved)) == ["model.safetensors", "plan.json"]
    assert type(loaded) is nn.Sequential
    assert loaded.state_dict().keys() == example[0].state_dict().keys()
    assert pw.ChannelPlan.from_dict(json.loads((saved / "plan.json").read_text())) == example[1]


@pytest.mark.filterwarnings("ignore:the small")
@pytest.mark.parametrize(
    "name",
    ["resnet_a", "shufflenet_v2", "frozen_backbone", "vit_mha", "seq2seq", "gpt2", "model_output"],
)
def test_models_of_the_zoo_come_back(name, tmp_path):
    model, x = build(name, dtype=torch.float32)
    plan = pw.plan_channels(model, x, budget=pw.Budget(params=0.85), importance="random", seed=1)
    small = pw.apply_plan(model, plan, x).eval()
    pw.save_pruned(tmp_path, small, plan)
    loaded = pw.load_pruned(tmp_path, ZOO[name].factory)
    assert same(loaded, small, x)
    assert type(loaded).__name__ == type(small).__name__


class Baked(nn.Module):
    """A width written into the code, so that surgery gives a graph module."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.b(self.a(x).relu().reshape(-1, 8 * 36))


@pytest.mark.filterwarnings("ignore")
def test_a_graph_module_comes_back(tmp_path):
    small, plan = pruned(Baked)
    assert type(small) is not Baked
    pw.save_pruned(tmp_path, small, plan)
    loaded = pw.load_pruned(tmp_path, Baked)
    assert type(loaded).__name__ == type(small).__name__
    assert same(loaded, small, X)
    assert same(loaded.train(), small.train(), X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_mode_and_requires_grad_follow(tmp_path, example, dtype):
    small, plan = copy.deepcopy(example[0]).to(dtype), example[1]
    small.train()
    small[1].eval()
    small[0].weight.requires_grad_(False)
    pw.save_pruned(tmp_path, small, plan)
    loaded = pw.load_pruned(tmp_path, factory)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded[1].num_batches_tracked.dtype == torch.int64
    assert [m.training for m in loaded.modules()] == [m.training for m in small.modules()]
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in small.parameters()]
    assert same(loaded.eval(), small.eval(), X.to(dtype))


def test_a_model_traced_in_double_comes_back_for_a_factory_in_float(tmp_path):
    small, plan = pruned(lambda: factory().double(), X.double())
    pw.save_pruned(tmp_path, small, plan)
    assert same(pw.load_pruned(tmp_path, factory), small, X.double())


def test_mixed_dtypes_come_back(tmp_path, example):
    small, plan = copy.deepcopy(example[0]), example[1]
    small[1].double()
    pw.save_pruned(tmp_path, small, plan)
    loaded = pw.load_pruned(tmp_path, factory)
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in small.parameters()]
    assert same(loaded[0], small[0], X)


def test_memory_format_follows(tmp_path, example):
    small = copy.deepcopy(example[0]).to(memory_format=torch.channels_last)
    pw.save_pruned(tmp_path, small, example[1])
    loaded = pw.load_pruned(tmp_path, factory)
    for a, b in zip(loaded.parameters(), small.parameters(), strict=True):
        assert a.stride() == b.stride()
    assert same(loaded, small, X)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.back = nn.Embedding(11, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, scale=1.0, *, bias=None):
        x = self.head(self.back(self.mid(self.embed(ids)).relu() * scale))
        return {"logits": x if bias is None else x + bias}


def untied():
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    return model


def test_tied_parameters_are_saved_once_and_tied_again(tmp_path):
    ids = torch.arange(6).view(2, 3)
    small, plan = pruned(Tied, (ids, 2.0))
    pw.save_pruned(tmp_path, small, plan)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "embed.weight" in file.keys()  # noqa: SIM118
        assert "head.weight" not in file.keys()  # noqa: SIM118
    for make in (Tied, untied):
        loaded = pw.load_pruned(tmp_path, make)
        assert loaded.head.weight is loaded.embed.weight
        assert same(loaded, small, (ids, 2.0))


def test_parameters_untied_since_the_factory_stay_so(tmp_path):
    ids = torch.arange(6).view(2, 3)
    small, plan = pruned(untied, {"ids": ids, "bias": None, "scale": 0.5})
    pw.save_pruned(tmp_path, small, plan)
    loaded = pw.load_pruned(tmp_path, Tied)
    assert loaded.head.weight is not loaded.embed.weight
    assert same(loaded, small, {"ids": ids, "scale": 0.5})


class Recurrent(nn.Module):
    """An LSTM holds its parameters a second time, in a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.lstm = nn.Linear(4, 8), nn.Linear(8, 5), nn.LSTM(5, 3, batch_first=True)
        self.register_buffer("offset", torch.rand(1), persistent=False)

    def forward(self, x):
        return self.lstm(self.b(self.a(x).relu()))[0] + self.offset


def test_flat_weights_of_an_lstm_and_buffers_outside_the_state_dict_follow(tmp_path):
    x = torch.randn(2, 6, 4)
    small, plan = pruned(Recurrent, x)
    pw.save_pruned(tmp_path, small, plan)
    torch.manual_seed(5)
    assert same(pw.load_pruned(tmp_path, Recurrent), small, x)


def test_a_buffer_that_forward_makes_anew_comes_back_as_it_was(tmp_path):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.register_buffer("grid", torch.zeros(1), persistent=False)

        def forward(self, x):
            h = self.a(x).relu()
            if self.grid.numel() != h.shape[-1]:
                self.grid = torch.arange(h.shape[-1], dtype=h.dtype)
            return self.b((h * self.grid).mean((2, 3)))

    model = Lazy()
    model(X)
    plan = pw.plan_channels(model, X, budget=pw.Budget(macs=0.5))
    small = pw.apply_plan(model, plan, X).eval()
    pw.save_pruned(tmp_path, small, plan)
    assert same(pw.load_pruned(tmp_path, Lazy), small, X)


def test_nan_weights_and_views_of_larger_storages_come_back(tmp_path, example):
    small = copy.deepcopy(example[0])
    wide = torch.randn(9, *small[5].weight.shape)
    small[5].weight = nn.Parameter(wide[4])
    with torch.no_grad():
        small[5].bias[0] = torch.nan
        small[5].bias[1] = -torch.inf
    pw.save_pruned(tmp_path, small, example[1])
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * wide.numel()
    assert same(pw.load_pruned(tmp_path, factory), small, X)


def test_a_model_of_a_gate_session_comes_back(tmp_path):
    torch.manual_seed(0)
    model = factory()
    gates = pw.attach_gates(model, X, budget=pw.Budget(macs=0.5), total_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        (model(X).square().mean() + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
    with pytest.raises(pw.AlreadyGatedError, match="finish"):
        pw.save_pruned(tmp_path, model, gates.harden())
    plan = gates.harden()
    small = gates.finish()
    pw.save_pruned(tmp_path, small, plan)
    assert same(pw.load_pruned(tmp_path, factory).eval(), small.eval(), X)


def test_compiled_and_parallel_wrappers_are_taken_off(tmp_path, example):
    pw.save_pruned(tmp_path, torch.compile(nn.DataParallel(example[0])), example[1])
    assert same(pw.load_pruned(tmp_path, factory), example[0], X)


def test_inputs_that_cannot_be_described_are_asked_for(tmp_path):
    class Own:
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = factory()

        def forward(self, x, own):
            return self.net(x)

    small, plan = pruned(Model, (X, Own()))
    pw.save_pruned(tmp_path, small, plan)
    with pytest.raises(pw.CheckpointError, match="give example_inputs"):
        pw.load_pruned(tmp_path, Model)
    assert same(pw.load_pruned(tmp_path, Model, example_inputs=(X, Own())), small, (X, Own()))


# -- saving -------------------------------------------------------------------------------------------------------


def test_saving_over_an_older_model_replaces_it_and_sweeps(saved):
    (saved / ".weights.123456.tmp").mkdir()
    (saved / ".weights.123456.tmp" / ".tmpAbC123").write_bytes(b"left by a killed process")
    (saved / ".model-0123.safetensors").write_bytes(b"left by a killed process")
    os.utime(saved / ".weights.123456.tmp", (0, 0))
    small, plan = pruned(seed=3)
    pw.save_pruned(saved, small, plan)
    assert sorted(os.listdir(saved)) == ["model.safetensors", "plan.json"]
    assert same(pw.load_pruned(saved, factory), small, X)


@pytest.mark.parametrize("stop", range(1, 9))
def test_stopped_at_any_write_the_folder_holds_one_whole_model(saved, example, monkeypatch, stop):
    other = pruned(seed=4)
    fail_at_write(monkeypatch, stop, KeyboardInterrupt)
    try:
        pw.save_pruned(saved, *other)
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    loaded = pw.load_pruned(saved, factory)
    old, new = same(loaded, example[0], X), same(loaded, other[0], X)
    assert old != new
    assert new or not finished


KILLED = """
import sys, torch
import prunewise as pw
sys.path.insert(0, {root!r})
from tests.files import factory, pruned
models = [pruned(seed=1), pruned(seed=2)]
pw.save_pruned({folder!r}, *models[1])
print("saved", flush=True)
while True:
    for small, plan in models:
        pw.save_pruned({folder!r}, small, plan)
"""


def test_killed_while_saving_the_folder_holds_one_whole_model(tmp_path):
    root = str(Path(__file__).parents[2])
    code = KILLED.format(root=root, folder=str(tmp_path / "m"))
    outputs = [pruned(seed=s)[0](X) for s in (1, 2)]
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"saved\n"
    time.sleep(0.3)
    child.kill()
    child.wait()
    loaded = pw.load_pruned(tmp_path / "m", factory)
    assert sum(torch.equal(loaded(X), y) for y in outputs) == 1
    for left in (tmp_path / "m").glob(".*.tmp"):
        os.utime(left, (0, 0))
    pw.save_pruned(tmp_path / "m", *pruned(seed=1))
    assert sorted(os.listdir(tmp_path / "m")) == ["model.safetensors", "plan.json"]


def test_a_plan_of_another_model_is_not_saved(tmp_path, example):
    with pytest.raises(pw.PlanError, match="parameters"):
        pw.save_pruned(tmp_path / "x", factory(), example[1])
    assert not (tmp_path / "x").exists()


def test_what_safetensors_cannot_hold_is_named(tmp_path, example):
    with pytest.raises(pw.CheckpointError, match=r"'0\.weight' is on the meta device"):
        pw.save_pruned(tmp_path, copy.deepcopy(example[0]).to("meta"), example[1])
    small = copy.deepcopy(example[0])
    small.register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(pw.CheckpointError, match="'odd' is"):
        pw.save_pruned(tmp_path, small, example[1])
    assert os.listdir(tmp_path) == []


def test_a_mask_in_force_is_refused(tmp_path, example):
    small = copy.deepcopy(example[0])
    prune.l1_unstructured(small[5], "weight", 0.5)
    with pytest.raises(pw.CheckpointError, match="mask is in force on 'weight' of module '5'.*make_permanent_ first"):
        pw.save_pruned(tmp_path / "x", small, example[1])
    assert not (tmp_path / "x").exists()
    pw.save_pruned(tmp_path, pw.make_permanent_(small), example[1])
    assert same(pw.load_pruned(tmp_path, factory), small, X)


def test_an_extra_state_is_refused(tmp_path, example):
    class Keeps(nn.Identity):
        def get_extra_state(self):
            return {"any": object()}

    small = copy.deepcopy(example[0])
    small.append(Keeps())
    with pytest.raises(pw.CheckpointError, match=r"'6' \(Keeps\)"):
        pw.save_pruned(tmp_path, small, example[1])


def test_a_folder_that_cannot_be_made(tmp_path, example):
    (tmp_path / "file").write_text("")
    with pytest.raises(pw.CheckpointError, match="cannot be made"):
        pw.save_pruned(tmp_path / "file", *example)
