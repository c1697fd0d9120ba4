"""States of runs on disk: what goes in comes back, and no objects."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import prunewise as pw
from prunewise import _files, _state, io


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
