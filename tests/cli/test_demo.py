"""The demo, with little training: what it promises holds after any number of epochs."""

import json

import pytest

from prunewise.cli.main import main

pytest.importorskip("sklearn")


def test_demo_halves_the_macs_and_the_small_model_equals_the_gated_one(tmp_path, capsys):
    assert main(["demo", "--epochs", "2", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["macs"] <= 0.5 * result["before"]["macs"]
    assert result["after"]["params"] < result["before"]["params"]
    assert result["check"]["correct_gated"] == result["check"]["correct_small"]
    assert json.loads((tmp_path / "demo.json").read_text()) == result
    for name in result["files"]:
        assert (tmp_path / name).is_file()


def test_a_folder_that_cannot_be_is_told_before_any_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err


def test_a_difference_between_the_models_is_reported():
    import torch

    from prunewise.cli.demo import _compare
    from prunewise.core.errors import VerificationError

    logits = torch.eye(4, 10)
    targets = torch.arange(4)
    assert _compare(logits, logits.clone(), targets, "itself")["max_abs_difference"] == 0
    for wrong in (logits + 0.01, -logits, logits * torch.nan):
        with pytest.raises(VerificationError, match="differs from itself"):
            _compare(logits, wrong, targets, "itself")
