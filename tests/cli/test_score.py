"""`prunewise score`: trains, saves the scores, and shows what `prunewise report` shows."""

import json
import sys
from pathlib import Path

import pytest

import prunewise as pw
from prunewise.cli.main import main

pytest.importorskip("pyarrow")
MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader

import prunewise

def model():
    return nn.Linear(4, 2)

def data():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    samples = list(zip(x, (x[:, 0] > 0).long()))
    return DataLoader(prunewise.track(samples), 8, shuffle=True)

def noisy():  # every fifth label is wrong
    wrong = torch.arange(40) % 5 == 0
    samples = [(x, y ^ int(w)) for (x, y), w in zip(data().dataset.dataset, wrong)]
    return DataLoader(prunewise.track(samples), 8, shuffle=True)

def noisy_labels():
    return torch.stack([y for _, y in noisy().dataset.dataset])

def untracked():
    return DataLoader([(torch.zeros(4), 0)] * 9, 3)
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A user's folder with a module of factories, as the working directory."""
    (tmp_path / "my_samples.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "my_samples", raising=False)


RUN = ["score", "--model", "my_samples:model", "--data", "my_samples:data", "--epochs", "3", "--lr", "0.1"]


def test_saved_and_shown(capsys):
    assert main([*RUN, "--out", "deep/scores.parquet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_samples"], result["observed"], result["out"]) == (40, 40, "deep/scores.parquet")
    scores = pw.SampleScores.from_parquet("deep/scores.parquet")
    assert scores.observations.tolist() == [3] * 40
    assert result["mean_learnability"] == pytest.approx(scores.learnability.mean())
    assert main([*RUN, "--out", "again.parquet"]) == 0
    printed = capsys.readouterr().out
    assert "my_samples:model: 40 samples" in printed
    assert "saved in again.parquet" in printed
    assert Path("again.parquet").read_bytes() == Path("deep/scores.parquet").read_bytes(), "the seed decides"
    assert main(["report", "again.parquet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {k: v for k, v in result.items() if k != "out"}


def test_labels_of_the_suspects(capsys):
    noisy = ["--data", "my_samples:noisy", "--targets", "my_samples:noisy_labels", "--epochs", "8"]
    assert main([*RUN, *noisy, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["suspects"]["first"]
    assert found and all(row["label"] == 1 - row["proposed_label"] for row in found)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "my_samples:untracked"], 1, "prunewise.track(dataset)"),
        (["--lr", "0"], 2, "--lr 0.0: expected a number above 0"),
        (["--out", "my_samples.py/scores.parquet"], 2, "--out my_samples.py/scores.parquet: "),
        (["--out", "scores.csv"], 2, "--out scores.csv: scores are saved as Parquet"),
        (["--out", "."], 2, "--out .: a folder"),
        (["--suspects", "-1"], 2, "argument --suspects: -1 is no whole number"),
        (["--epochs", "0"], 2, "argument --epochs: 0 is no"),
    ],
)
def test_bad_usage(capsys, arguments, code, message):
    assert main([*RUN, *arguments]) == code
    assert message in capsys.readouterr().err
    assert not list(Path().glob("*.parquet"))


def test_no_data(capsys):
    assert main(["score", "--model", "my_samples:model"]) == 2
    assert "give --data, a loader over prunewise.track(dataset)" in capsys.readouterr().err
