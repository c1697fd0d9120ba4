"""The command line: verbs, options, the configuration file, exit codes, what goes where."""

import json
import subprocess
import sys

import pytest

from prunewise.cli.main import VERBS, main

MODULE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

def data():
    return [(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))]

def small():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def pair():
    batches = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))] * 3
    return batches, batches

def not_a_model():
    return 3

a_number = 3
"""
MACS = 6 * 6 * 8 * 27 + 4 * 4 * 4 * 72  # both convolutions, for one image of 8x8
PARAMS = 8 * 27 + 8 + 16 + 4 * 72 + 4


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder with a module of factories, as the working directory."""
    (tmp_path / "my_project.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    return tmp_path


MODEL = ("--model", "my_project:model", "--input", "1,3,8,8")


@pytest.mark.parametrize("arguments", [["--help"], *[[verb, "--help"] for verb in VERBS], ["--version"]])
def test_help_and_version_import_no_torch(arguments):
    script = f"""
import sys
from prunewise.cli.main import main
code = main({arguments!r})
print(code, "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "prunewise" in done.stdout
    assert done.stderr.split() == ["0", "False"]


def test_python_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "prunewise", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("prunewise ")


def test_no_verb_is_bad_usage(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: prunewise" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shrink"], "shrink"),
        (["cost"], "--model"),
        (["cost", "--modle", "a:b"], "--model"),
        (["cost", "--model", "my_project"], "expected MODULE:FACTORY"),
        (["cost", "--model", "my_projct:model"], "no module 'my_projct'"),
        (["cost", "--model", "my_project:modle"], "did you mean 'model'?"),
        (["cost", "--model", "my_project:a_number"], "expected a callable"),
        (["cost", "--model", "my_project:not_a_model"], "expected a torch.nn.Module"),
        (["cost", "--model", "my_project:model"], "no example input"),
        (["cost", "--model", "my_project:model", "--input", "1,x"], "expected sizes above 0"),
        (["cost", "--model", "my_project:model", "--input", "1,0"], "expected sizes above 0"),
        (["cost", "--model", "my_project:model", "--input", "1,3:floot"], "no dtype 'floot'"),
        (["cost", "--config", "absent.toml"], "absent.toml"),
        (["prune", *MODEL], "no budget"),
        (["prune", *MODEL, "--macs", "0.5"], "--method gates trains and needs --data"),
        (["prune", *MODEL, "--macs", "half"], "--macs"),
        (["prune", *MODEL, "--macs", "0.5", "--method", "magnitude", "--drop-blocks"], "go with --method gates"),
    ],
)
def test_bad_usage_exits_2_and_says_what(project, capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_failing_import_inside_the_users_module_is_not_hidden(project):
    (project / "broken_project.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        main(["cost", "--model", "broken_project:model"])


def test_errors_of_prunewise_exit_1(monkeypatch, capsys):
    from prunewise.core.errors import BudgetError

    def fail(args):
        raise BudgetError("the floor is 0.7, pinned by fc")

    monkeypatch.setattr(VERBS["cost"], "run", fail)
    assert main(["cost", "--model", "a:b"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "prunewise: error: the floor is 0.7, pinned by fc\n"


@pytest.fixture
def parsed(monkeypatch):
    """Runs a verb and returns the options it was called with."""

    def parse(*arguments):
        seen = []
        for verb in VERBS.values():
            monkeypatch.setattr(verb, "run", seen.append)
        assert main(arguments) == 0
        return seen[0]

    return parse


def test_config_sets_options_and_the_command_line_wins(tmp_path, parsed):
    config = tmp_path / "run.toml"
    config.write_text('model = "m:f"\nmacs = 0.25\nepochs = 3\nexclude = ["fc", "stem*"]\njson = true\n')
    args = parsed("prune", "--config", str(config), "--epochs", "5")
    assert (args.model, args.macs, args.epochs, args.exclude, args.json) == (
        "m:f",
        0.25,
        5,
        ["fc", "stem*"],
        True,
    )


def test_config_serves_all_verbs(tmp_path, parsed):
    config = tmp_path / "run.toml"
    config.write_text('model = "m:f"\nmacs = 100_000\nby_layer = false\n')
    assert not hasattr(parsed("list", f"--config={config}"), "macs")
    assert parsed("cost", f"--config={config}").by_layer is False
    macs = parsed("prune", f"--config={config}").macs
    assert macs == 100_000
    assert isinstance(macs, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs = 3", "unknown key 'epohcs'; did you mean 'epochs'?"),
        ("[prune]\nmacs = 1", "unknown key 'prune'"),
        ("config = 'x'", "unknown key 'config'"),
        ("json = 1", "expected true or false"),
        ("model = ['a', 'b']", "expected a string or a number"),
        ("epochs = 'many'", "invalid int value: 'many'"),
        ("method = 'guess'", "invalid choice: 'guess'"),
        ("macs = ", "not a TOML file"),
    ],
)
def test_bad_config_exits_2_and_says_what(tmp_path, capsys, text, message):
    config = tmp_path / "run.toml"
    config.write_text(text)
    assert main(["prune", "--config", str(config), "--model", "m:f"]) == 2
    assert message in capsys.readouterr().err


def test_cost_as_json(project, capsys):
    assert main(["cost", *MODEL, "--json", "--by-layer"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["macs"], result["params"]) == (MACS, PARAMS)
    assert sum(layer["macs"] for layer in result["by_layer"]) == MACS


def test_cost_as_table_on_inputs_from_the_data(project, capsys):
    assert main(["cost", "--model", "my_project:model", "--data", "my_project:data", "--by-layer"]) == 0
    captured = capsys.readouterr()
    assert f"{2 * MACS:,}" in captured.out  # the batch holds two images
    assert captured.err == ""


def test_list_names_groups_and_what_pins_them(project, capsys):
    assert main(["list", *MODEL, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)
    assert [group["size"] for group in groups if group["prunable"]] == [8]
    assert all(group["reason"] for group in groups if not group["prunable"])
    assert main(["list", *MODEL]) == 0
    assert groups[0]["name"] in capsys.readouterr().out


def test_prune_in_one_shot_saves_a_model_that_loads(project, capsys):
    import torch

    import prunewise as pw

    arguments = ["prune", *MODEL, "--macs", "0.5", "--method", "magnitude", "--out", "small", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["before"]["macs"] == MACS
    assert result["after"]["macs"] <= 0.5 * MACS
    import my_project

    small = pw.load_pruned("small", my_project.model)
    assert pw.measure(small, torch.zeros(1, 3, 8, 8)).macs == result["after"]["macs"]


def test_allocate_prints_and_saves_a_plan_of_the_exact_total(project, capsys):
    from prunewise import SparsityPlan

    arguments = ["allocate", "--model", "my_project:model", "--sparsity", "0.5", "--importance", "erk"]
    assert main([*arguments, "--out", "plans/half.json", "--json"]) == 0
    plan = SparsityPlan.from_dict(json.loads(capsys.readouterr().out))
    assert plan.kept == (8 * 27 + 4 * 72) // 2
    assert SparsityPlan.from_dict(json.loads((project / "plans/half.json").read_text())) == plan
    assert main(arguments) == 0
    assert "50.0 %" in capsys.readouterr().out.splitlines()[-1]
    assert main([*arguments, "--exclude", "0", "--include", "3"]) == 0
    assert "216" not in capsys.readouterr().out


def test_allocate_with_data_and_what_it_refuses(project, capsys):
    arguments = ["allocate", "--model", "my_project:small", "--sparsity", "0.5", "--importance", "owl"]
    assert main([*arguments, "--data", "my_project:pair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["importance"] == "owl"
    assert main(arguments) == 1
    assert "needs data" in capsys.readouterr().err
    assert main(["allocate", "--model", "my_project:small"]) == 2


def test_prune_by_gates_logs_to_stderr_and_goes_on_from_its_checkpoint(project, capsys):
    arguments = ["prune", "--model", "my_project:small", "--data", "my_project:pair", "--macs", "0.6", "--epochs", "2"]
    arguments += ["--out", "small", "--checkpoint", "run", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["after"]["macs"] <= 0.6 * json.loads(captured.out)["before"]["macs"]
    assert captured.err.startswith("epoch 1/2")
    with pytest.warns(UserWarning, match="started from other weights"):  # the factory's are random
        assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    assert again.err.startswith("resumed")


def test_prune_drops_blocks_and_shrinks_while_it_trains(project, capsys, monkeypatch):
    import prunewise as pw

    seen = []
    compress = pw.compress
    monkeypatch.setattr(pw, "compress", lambda *args, **kwargs: seen.append(kwargs) or compress(*args, **kwargs))
    arguments = ["prune", "--model", "my_project:small", "--data", "my_project:pair", "--macs", "0.6", "--epochs", "2"]
    assert main([*arguments, "--drop-blocks", "--shrink-every", "2", "--json"]) == 0
    assert (seen[0]["drop_blocks"], seen[0]["shrink_every"]) == (True, 2)


def test_budget_out_of_reach_exits_1(project, capsys):
    assert main(["prune", *MODEL, "--macs", "10", "--method", "magnitude"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prunewise: error: ")
    assert not (project / "runs").exists()
