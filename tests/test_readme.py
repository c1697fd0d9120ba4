"""The Python code in the README runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

import prunewise

README = Path(__file__).parents[1] / "README.md"


def _blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def _factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )


def test_training_loop_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, *_, whole = _blocks()
    torch.manual_seed(0)
    model = _factory()
    names = {
        "torch": torch,
        "model": model,
        "weights": list(model.parameters()),
        "factory": _factory,
        "example_inputs": torch.randn(1, 3, 8, 8),
        "loader": [(torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))) for _ in range(5)],
        "criterion": nn.CrossEntropyLoss(),
        "epochs": 2,
    }
    exec(code, names)
    pw = names["pw"]
    macs = pw.measure(_factory(), names["example_inputs"]).macs
    assert pw.measure(names["small"], names["example_inputs"]).macs <= 0.5 * macs
    assert len(re.findall("# \\+$", code, re.MULTILINE)) == 3

    names |= {"model": _factory(), "val_loader": names["loader"]}
    exec(whole, names)
    assert pw.measure(pw.load_pruned("small", _factory), names["example_inputs"]).macs <= 0.5 * macs


@pytest.mark.filterwarnings("ignore:runs 0 and 1")  # of so small a network
def test_samples_of_the_readme(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    _, recorded, trained, _ = _blocks()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    labels = torch.arange(60) % 2
    images = 0.5 * torch.randn(60, 3, 8, 8) + 2.0 * labels[:, None, None, None] - 1
    labels[:6] = 1 - labels[:6]  # wrong ones
    other = prunewise.LearnabilityRecorder(60)
    for _ in range(9):
        other.update(torch.arange(60), model(images) + torch.randn(60, 2), labels)
    names = {
        "pw": prunewise, "DataLoader": DataLoader, "Subset": Subset, "cross_entropy": cross_entropy, "epochs": 9, "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.02), "dataset": list(zip(images, labels, strict=True)),
        "labels": labels, "of_another_network": other.scores(labels),
    }  # fmt: skip
    exec(recorded, names)
    assert recorded.count("  # + ") == 2
    assert sorted(names["suspects"].number) == list(range(6))
    exec(trained, names)
    assert not np.isin(names["kept"], names["suspects"].number).any() and len(names["half"]) == 30
