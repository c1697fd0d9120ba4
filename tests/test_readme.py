"""The Python code in the README runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


def _factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )


def test_training_loop_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, whole = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
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
