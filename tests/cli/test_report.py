"""`prunewise report`: the numbers are those of the library, for people and for machines."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import prunewise as pw
from prunewise.cli.main import main
from tests.samples.test_suspects import scores_of

pytest.importorskip("pyarrow")
N = 40
SHARE = np.round(np.linspace(0, 1, N), 3)
MARGINS = np.where(np.arange(N) < 3, -0.9 - np.arange(N) / 100, 0.8)
LABELS = np.arange(N) % 2


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with scores and their labels, as the working directory."""
    scores = scores_of(SHARE, labels=LABELS, margins=MARGINS, last_wrong=np.where(np.arange(N) == 1, -1, 7))
    scores.to_parquet(tmp_path / "scores.parquet")
    np.save(tmp_path / "labels.npy", LABELS)
    (tmp_path / "my_labels.py").write_text(f"def labels(): return {LABELS.tolist()}\ndef wrong(): return [0] * {N}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "my_labels", raising=False)
    return scores


@pytest.mark.parametrize("targets", ["labels.npy", "my_labels:labels"])
def test_as_json_and_in_a_file(project, capsys, targets):
    arguments = ["report", "scores.parquet", "--targets", targets, "--suspects", "2"]
    assert main([*arguments, "--json", "--out", "deep/result.json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == "" and json.loads(Path("deep/result.json").read_text()) == result
    found = pw.suspects(project, LABELS)
    assert (result["num_samples"], result["observed"], result["mode"]) == (N, N, "train")
    assert result["mean_learnability"] == pytest.approx(project.learnability.mean())
    assert result["learnability"]["counts"] == np.histogram(project.learnability, 10, (0, 1))[0].tolist()
    assert result["triage"] == pw.triage(project, LABELS).counts()
    suspects = result["suspects"]
    assert (suspects["count"], suspects["estimated_count"]) == (len(found), found.estimated_count) == (3, 3)
    assert [(s["sample_id"], s["label"], s["proposed_label"]) for s in suspects["first"]] == [(2, 0, 7), (1, 1, None)]


def test_as_text(project, capsys):
    assert main(["report", "scores.parquet", "--targets", "labels.npy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"scores.parquet: {N} samples" and lines[2].endswith("#" * 40)
    assert [int(line.split()[3]) for line in lines[2:12]] == np.histogram(SHARE, 10, (0, 1))[0].tolist()
    assert any(line.split()[:2] == ["suspect", "3"] for line in lines)
    assert any(line.startswith("3 suspects") and "about 3 labels are wrong" in line for line in lines)
    assert [line.split() for line in lines[-3:]] == [
        ["2", "0.920", "0", "7"],
        ["1", "0.910", "1", "-"],
        ["0", "0.900", "0", "7"],
    ]


def test_without_labels_the_suspects_are_the_same(project, capsys):
    assert main(["report", "scores.parquet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["suspects"]
    assert [(s["sample_id"], s["label"]) for s in found["first"]] == [(2, None), (1, None), (0, None)]
    assert main(["report", "scores.parquet", "--suspects", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 suspects")


def test_hostile_ids_and_labels_stay_in_their_cells(project, capsys):
    ids = np.array([f"\x1b[2J\n{i}" for i in range(N)])
    scores_of(SHARE, margins=MARGINS, sample_id=ids).to_parquet("hostile.parquet")
    np.save("names.npy", ids)
    assert main(["report", "hostile.parquet", "--targets", "names.npy"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.splitlines()[-1].count("\\x1b[2J\\n0") == 2


def test_scores_of_nothing_observed(project, capsys):
    zeros = np.zeros(N, int)
    scores_of(SHARE, observations=zeros, hits=zeros).to_parquet("empty.parquet")
    assert main(["report", "empty.parquet"]) == 0
    out = capsys.readouterr().out
    assert f"0 samples observed of {N}" in out and "0 suspects" in out
    assert main(["report", "empty.parquet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_learnability"] is None


def test_a_warning_is_one_line_and_comes_once(project, capsys):
    margins = np.random.default_rng(0).normal(0, 0.1, 400).clip(-0.9, 0.9)  # of a training that learned nothing
    scores_of((1 + margins) / 2, margins=margins).to_parquet("little.parquet")
    assert main(["report", "little.parquet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prunewise: warning: wrong labels cannot be told from hard samples: ")


def test_damaged_files_and_other_labels_exit_1(project, tmp_path, capsys):
    scores_of(SHARE, margins=np.full(N, np.nan)).to_parquet("nan.parquet")
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "scores.parquet").read_bytes()[:-9])
    (tmp_path / "broken.parquet.json").write_bytes((tmp_path / "scores.parquet.json").read_bytes())
    for arguments, message in [
        (["nan.parquet"], "40 observed samples have no finite aum_softmax"),
        (["broken.parquet"], "not the table that was saved"),
        (["absent.parquet"], "absent.parquet is missing"),
        (["."], "is missing"),
        (["scores.parquet", "--targets", "my_labels:wrong"], "not the labels that the scores were recorded with"),
    ]:
        assert main(["report", *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.startswith("prunewise: error: ")


def test_bad_usage_exits_2(project, tmp_path, capsys):
    np.savez(tmp_path / "many.npz", LABELS)
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for arguments, message in [
        ([], "SCORES"),
        (["scores.parquet", "--suspects", "-1"], "argument --suspects: -1 is no whole number"),
        (["scores.parquet", "--targets", "absent.npy"], "absent.npy: cannot be read"),
        (["scores.parquet", "--targets", "objects.npy"], "objects.npy: cannot be read"),
        (["scores.parquet", "--targets", "many.npy"], "archive of several arrays"),
        (["scores.parquet", "--targets", "labels"], "expected a .npy file, or MODULE:FACTORY"),
    ]:
        assert main(["report", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err
