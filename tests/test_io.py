"""Pruned models on disk: equal after loading, whole after a kill, and no harm from files made to harm."""

import copy
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import prunewise as pw
from prunewise import _files, _state, io
from tests.zoo.registry import ZOO, build, call, flat_tensors


def factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 5)
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(make=factory, x=X, seed=0, **choice):
    torch.manual_seed(seed)
    model = make()
    plan = pw.plan_channels(model, x, budget=pw.Budget(params=0.7), importance="random", seed=seed, **choice)
    return pw.apply_plan(model, plan, x).eval(), plan


@pytest.fixture(scope="module")
def example():
    return pruned()


@pytest.fixture
def saved(tmp_path, example):
    """A folder with a pruned model."""
    pw.save_pruned(tmp_path / "small", *example)
    return tmp_path / "small"


def same(a, b, x):
    with torch.no_grad():
        left, right = flat_tensors(call(a, x)), flat_tensors(call(b, x))
    return len(left) == len(right) and all(
        p.dtype == q.dtype and torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(left, right, strict=True)
    )


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
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
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
from tests.test_io import factory, pruned
models = [pruned(seed=1), pruned(seed=2)]
pw.save_pruned({folder!r}, *models[1])
print("saved", flush=True)
while True:
    for small, plan in models:
        pw.save_pruned({folder!r}, small, plan)
"""


def test_killed_while_saving_the_folder_holds_one_whole_model(tmp_path):
    root = str(Path(__file__).parents[1])
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


# -- damaged and hostile ------------------------------------------------------------------------------------------


def refused(folder, match, make=factory):
    with pytest.raises(pw.CheckpointError, match=match) as caught:
        pw.load_pruned(folder, make)
    assert len(str(caught.value)) < 1200


def edit(folder, change):
    """Change plan.json as data."""
    data = json.loads((folder / "plan.json").read_text())
    change(data)
    (folder / "plan.json").write_text(json.dumps(data))


def forge(folder, change=None, raw=None, body=None):
    """Rewrite the weights with another header (or body), and the hash in plan.json to match."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if change is not None:
        header = change(header) or header
    text = raw if raw is not None else json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + (body(data) if body else data)
    path.write_bytes(content)
    edit(folder, lambda d: d["weights"].update(sha256=hashlib.sha256(content).hexdigest()))


def test_missing_files(saved, tmp_path):
    refused(tmp_path / "nowhere", r"plan\.json is missing")
    os.remove(saved / "model.safetensors")
    refused(saved, r"model\.safetensors is missing")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 4)),
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3), *list(factory())[1:]),
    ],
)
def test_another_architecture(saved, make):
    refused(saved, "another architecture", make)


def test_a_factory_of_something_else(saved):
    refused(saved, "returned a int", lambda: 3)
    with pytest.raises(ZeroDivisionError):
        pw.load_pruned(saved, lambda: 1 / 0)


def test_a_factory_on_the_meta_device(saved):
    refused(saved, "on the meta device", lambda: factory().to("meta"))


def test_arguments_mixed_up(tmp_path, example):
    with pytest.raises(pw.PlanError, match="got a ChannelPlan and a Sequential"):
        pw.save_pruned(tmp_path, example[1], example[0])


def test_an_architecture_alike_in_names_and_shapes_only(saved):
    class Other(nn.Sequential):
        def forward(self, x):
            raise RuntimeError("never the same")

    refused(saved, "does not fit the Other", lambda: Other(*factory()))


@pytest.mark.parametrize("share", [0, 3, 8, 60, 0.5, 0.99])
def test_truncated_weights(saved, share):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: share if isinstance(share, int) else int(share * len(content))])
    refused(saved, "damaged|not the file that was saved")


@pytest.mark.parametrize("share", [0, 0.2, 0.7, 0.999])
def test_truncated_plans(saved, share):
    text = (saved / "plan.json").read_bytes()
    (saved / "plan.json").write_bytes(text[: int(share * (len(text) - 2))])
    refused(saved, "damaged")


def test_one_flipped_bit_and_an_added_byte(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    refused(saved, "SHA-256")
    content[-5] ^= 1
    path.write_bytes(content + b"\0")
    refused(saved, "belong to no tensor")


def test_weights_of_another_save(saved, tmp_path):
    pw.save_pruned(tmp_path / "other", *pruned(seed=7))
    shutil.copy(tmp_path / "other" / "model.safetensors", saved / "model.safetensors")
    refused(saved, "SHA-256|shape")


def set_path(*keys, to):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_path("kind", to="other"), "not a channel plan"),
        (set_path("schema_version", to=2), "schema version 2"),
        (set_path("fingerprint", to="0" * 16), "another architecture"),
        (set_path("fingerprint", to=3), "fingerprint"),
        (set_path("groups", to=[]), "groups"),
        (set_path("groups", "0", "keep", to=[]), "nothing is kept"),
        (set_path("groups", "0", "keep", to=[-1, 0]), "indices in"),
        (set_path("groups", "0", "keep", to=[0, 8]), "indices in"),
        (set_path("groups", "0", "keep", to=[1, 0]), "ascend"),
        (set_path("groups", "0", "keep", to=[0, 0]), "ascend"),
        (set_path("groups", "0", "keep", to=[True]), "indices in"),
        (set_path("groups", "0", "keep", to=[0.0]), "indices in"),
        (set_path("groups", "0", "keep", to=[10**30]), "indices in"),
        (set_path("groups", "0", "keep", to="01"), "keep"),
        (set_path("groups", "0", "size", to=-8), "size"),
        (set_path("groups", "0", "size", to=10**18), "units in the model"),
        (set_path("groups", "../../etc", to={"size": 8, "keep": [0]}), "does not have"),
        (set_path("groups", "5", to={"size": 5, "keep": [0]}), "5"),
        (set_path("groups", "0", "keep", to=[0]), "shape"),
        (set_path("inputs", to=None), "example_inputs"),
        (set_path("inputs", to={"tensor": [1 << 40], "dtype": "float32"}), "shape|GiB"),
        (set_path("inputs", to={"tensor": [1 << 20, 1 << 20], "dtype": "float32"}), "GiB"),
        (set_path("inputs", to={"tensor": [-1, 3, 8, 8], "dtype": "float32"}), "not one"),
        (set_path("inputs", to={"tensor": [2, 3, 8, 8], "dtype": "__class__"}), "dtype"),
        (set_path("inputs", to={"tensor": [2, 3, 9, 9], "dtype": "float32"}), "does not fit"),
        (set_path("inputs", to={"dict": {"self": 1}}), "does not fit"),
        (set_path("inputs", to={"import": "os"}), "not known"),
        (set_path("inputs", to={"tuple": [{"tuple": []}] * 3}), "does not fit"),
        (set_path("weights", to=None), "weights"),
        (set_path("weights", "format", to=9), "format 9"),
        (set_path("weights", "sha256", to="../../../etc/passwd"), "SHA-256"),
        (set_path("weights", "sha256", to="0" * 64), "SHA-256"),
        (set_path("weights", "tied", to=[["0.weight", "5.weight"]]), "different shapes"),
        (set_path("weights", "tied", to=[["0.weight", "0.weight"]]), "damaged"),
        (set_path("weights", "tied", to=[["a", "b"], ["b", "c"]]), "damaged"),
        (set_path("weights", "frozen", to=["nothing"]), "frozen"),
        (set_path("weights", "frozen", to=[["x"]]), "damaged"),
        (set_path("weights", "strides", to={"0.weight": [0, 0, 0, 0]}), "strides"),
        (set_path("weights", "strides", to={"0.weight": [1 << 40, 9, 3, 1]}), "strides"),
        (set_path("weights", "strides", to={"0.weight": [-1]}), "damaged"),
        (set_path("weights", "strides", to={"nothing": [1]}), "strides"),
        (set_path("weights", "training", to="yes"), "damaged"),
    ],
)
def test_plans_made_to_harm(saved, change, match):
    edit(saved, change)
    refused(saved, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "nested too deep|damaged"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deep"),
        ('{"kind": 1, "kind": 2}', "'kind' stands there twice"),
        ('{"size": NaN}', "NaN"),
        ('{"size": -Infinity}', "Infinity"),
        ('{"size": ' + "9" * 10_000 + "}", "damaged"),
        ("\ud800", "damaged"),
        ("cos\nsystem\n(S'true'\ntR.", "damaged"),
        ("", "damaged"),
    ],
)
def test_json_made_to_harm(saved, text, match):
    (saved / "plan.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(saved, match)


def test_a_plan_of_a_gigabyte_is_not_read(saved):
    with (saved / "plan.json").open("wb") as file:
        file.truncate(1 << 30)  # sparse
    refused(saved, "larger than")


def nested_inputs(data):
    value = 1
    for _ in range(40):
        value = {"tuple": [value]}
    data["inputs"] = value


def test_inputs_nested_deep(saved):
    edit(saved, nested_inputs)
    refused(saved, "nested deeper")


def with_entry(**fields):
    def change(header):
        header["0.weight"] = {**header["0.weight"], **fields}

    return change


def renamed(header):
    header["other"] = header.pop("0.weight")


def dropped(header):
    del header["__metadata__"]
    del header["0.weight"]


def overlapping(header):
    names = [n for n in header if n != "__metadata__"]
    alike = {}
    for name in names:  # two tensors of one size, the second on top of the first
        start, end = header[name]["data_offsets"]
        if end - start in alike and end > start:
            header[name]["data_offsets"] = header[alike[end - start]]["data_offsets"]
            return
        alike[end - start] = name
    raise AssertionError


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_entry(shape=[1 << 60, 1 << 60]), "0.weight"),
        (with_entry(shape=[1 << 70]), "has the shape"),
        (with_entry(shape=[-3, -3, 3, 3]), "has the shape"),
        (with_entry(shape=[0, 1 << 61]), "does not take"),
        (with_entry(shape=[3.0]), "has the shape"),
        (with_entry(shape=[1] * 1000), "has the shape"),
        (with_entry(dtype="F16"), "does not take"),
        (with_entry(dtype="PICKLE"), "unknown dtype"),
        (with_entry(dtype=7), "lacks"),
        (with_entry(data_offsets=[0, 1 << 60]), "outside"),
        (with_entry(data_offsets=[-8, 0]), "outside"),
        (with_entry(data_offsets=[8, 0]), "outside"),
        (with_entry(data_offsets=[0]), "lacks"),
        (with_entry(more=1), "lacks"),
        (overlapping, "overlaps"),
        (renamed, "0.weight missing, other too many"),
        (dropped, "hole|overlaps"),
        (lambda h: {**h, "extra": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "extra too many"),
        (lambda h: {**h, "../../x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "too many"),
        (lambda h: {"__metadata__": 3}, "metadata"),
        (lambda h: [1], "expected a JSON object"),
    ],
)
def test_headers_made_to_harm(saved, change, match):
    forge(saved, change)
    refused(saved, match)


def test_headers_that_are_no_json(saved):
    forge(saved, raw=b"\x80\x04pickle")
    refused(saved, "damaged")
    forge_again = b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'
    path = saved / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(forge_again)) + forge_again + b"\0" * 4)
    refused(saved, "NaN")
    twice = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + b"\0" * 4)
    refused(saved, "twice")
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    refused(saved, "claims")


def test_dtype_of_another_kind(saved):
    def change(header):
        for name, entry in header.items():
            if name == "0.weight":
                entry["dtype"] = "I32"

    forge(saved, change)
    refused(saved, "int32")


def test_shape_of_the_same_size(saved):
    forge(saved, lambda h: h["5.weight"].update(shape=h["5.weight"]["shape"][::-1]))
    refused(saved, "5.weight' was saved with shape")


def test_symbolic_links_pipes_and_folders_are_not_read(saved, tmp_path):
    for name in ("plan.json", "model.safetensors"):
        path, away = saved / name, tmp_path / name
        shutil.move(path, away)
        path.symlink_to(away)
        refused(saved, "symbolic link")
        path.unlink()
        os.mkfifo(path)
        refused(saved, "not a regular file")
        path.unlink()
        path.mkdir()
        refused(saved, "regular file|cannot be read")
        path.rmdir()
        shutil.move(away, path)
    pw.load_pruned(saved, factory)


def test_saving_does_not_write_through_a_symbolic_link(saved, tmp_path, example):
    target = tmp_path / "precious"
    target.write_text("kept")
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").symlink_to(target)
    pw.save_pruned(saved, *example)
    assert target.read_text() == "kept"
    assert same(pw.load_pruned(saved, factory), example[0], X)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gives_anything_but_the_model_or_a_checkpoint_error(saved, example, data):
    name = data.draw(st.sampled_from(["plan.json", "model.safetensors"]))
    content = bytearray((saved / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = (content[at] + data.draw(st.integers(1, 255))) % 256
    folder = saved.parent / "damaged"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        loaded = pw.load_pruned(folder, factory)
    except pw.CheckpointError:
        return
    assert name == "plan.json"
    assert same(loaded, example[0], X)


# -- states of runs -----------------------------------------------------------------------------------------------


def test_states_come_back(tmp_path):
    state = {
        "a": [1, 2.5, float("inf"), None, True, "x"], 3: (torch.arange(3), torch.tensor(2.0)), "empty": torch.zeros(0, 4),
        "bits": torch.tensor([True, False]), "half": torch.ones(2, dtype=torch.bfloat16), "nest": {"a": {"tuple": ()}},
    }  # fmt: skip
    assert _state.load_state(tmp_path, "run") is None
    for _ in range(2):
        _state.save_state(tmp_path, "run", state)
    assert len(os.listdir(tmp_path)) == 2
    back = _state.load_state(tmp_path, "run")
    assert back["a"] == state["a"]
    assert back["nest"] == state["nest"]
    assert torch.equal(back[3][0], state[3][0])
    assert back[3][1].shape == ()
    assert back["empty"].shape == (0, 4)
    assert back["bits"].tolist() == [True, False]
    assert back["half"].dtype == torch.bfloat16


def test_states_hold_no_objects(tmp_path):
    with pytest.raises(pw.CheckpointError, match=r"state\['a'\]\[1\] is a object"):
        _state.save_state(tmp_path, "run", {"a": [1, object()]})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["", "{}", '{"kind": "prunewise/run-state", "format": 1, "sha256": "../x", "state": 1}', "[1"]
)
def test_damaged_states(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(pw.CheckpointError):
        _state.load_state(tmp_path, "run")


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    device = torch.device("cpu")
    np.random.normal()
    random.gauss(0, 1)
    _state.save_state(tmp_path, "rng", _state.rng_state(device))
    first = (torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random())
    _state.set_rng_state(_state.load_state(tmp_path, "rng"), device)
    assert first == (torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random())


def test_threads_write_different_files_into_one_folder(tmp_path):
    def write(number):
        tensors = {"a": torch.full((1000,), float(number))}
        _files.stage_tensors(tmp_path, tensors, lambda sha256: f"{number}.safetensors")
        _files.write_json(tmp_path / f"{number}.json", number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    assert len(os.listdir(tmp_path)) == 128


def test_dtypes_agree_with_safetensors(tmp_path):
    tensors = {str(d): torch.zeros(3).to(d) for d in _files.DTYPES.values()}
    path, digest = _files.stage_tensors(tmp_path, tensors, lambda sha256: "all.safetensors")
    with _files.opened(path) as file:
        back = _files.TensorFile(file, "all").read(digest)
    assert {n: t.dtype for n, t in back.items()} == {n: t.dtype for n, t in tensors.items()}
    assert io.WEIGHTS_FILE == "model.safetensors"
