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

def strange():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        def forward(self, x):
            return self.scale(self.second(self.first(x) * 2))
    return Strange()

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
        (
            ["cost", "--model", "my_project:model", "--input", "1,3,8,8:int4"],
            "no tensors of int4 itself; take float32, ",
        ),
        (["cost", "--model", "my_project:model", "--input", "1,3,8,8:quint8"], "no tensors of quint8 itself"),
        (["cost", "--inptu", "1,3", "--model", "m:f"], "cost: error: unknown option --inptu; did you mean '--input'?"),
        (["cost", "--modle=m:f"], "did you mean '--model'?"),
        (["cost", *MODEL, "stray"], "prunewise cost: error: unrecognized arguments: stray"),
        (["cost", "--config", "absent.toml"], "absent.toml"),
        (["prune", *MODEL], "no budget"),
        (["prune", *MODEL, "--macs", "0.5"], "--method gates trains and needs --data"),
        (["prune", *MODEL, "--macs", "half"], "argument --macs: 'half' is no number"),
        (["prune", *MODEL, "--macs", "1.5"], "argument --macs: 1.5 is neither a share"),
        (["prune", *MODEL, "--params", "0"], "argument --params: 0 is neither a share"),
        (
            ["prune", *MODEL, "--macs", "0.5", "--min-keep", "0"],
            "argument --min-keep: 0 is no whole number of at least 1",
        ),
        (["prune", *MODEL, "--macs", "0.5", "--epochs", "2.5"], "argument --epochs: 2.5 is no whole number"),
        (
            ["prune", *MODEL, "--macs", "0.5", "--method", "magnitude", "--out", "my_project.py"],
            "is a file, expected a folder",
        ),
        (
            ["prune", *MODEL, "--macs", "0.5", "--method", "magnitude", "--out", "my_project.py/x"],
            "my_project.py is a file",
        ),
        (["demo", "--macs", "0"], "argument --macs: 0 is no share in (0, 1]"),
        (["allocate", "--model", "m:f", "--sparsity", "1.5"], "argument --sparsity: 1.5 is no share in [0, 1)"),
        (
            ["allocate", "--model", "m:f", "--sparsity", "0.5", "--floor", "nan"],
            "argument --floor: nan is no share in [0, 1]",
        ),
        (["allocate", "--model", "m:f", "--sparsity", "0.5", "--importance", "lmap"], "'lmap'; did you mean 'lamp'?"),
        (["allocate", "--model", "m:f", "--sparsity", "0.5"], "--importance capacity needs data: give --data"),
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
        ("epochs = 'many'", "'many' is no number"),
        ("macs = 1.5", "1.5 is neither a share"),
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


def test_cost_by_layer_is_in_the_order_of_the_model(project, capsys):
    arguments = ["cost", "--model", "my_project:strange", "--input", "1,4", "--by-layer"]
    assert main([*arguments, "--json"]) == 0
    names = [layer["name"] for layer in json.loads(capsys.readouterr().out)["by_layer"]]
    assert names == ["", "first", "second", "scale"]
    assert main(arguments) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == ["first", "second", "scale"]


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
    assert main([*arguments, "--out", "half.json"]) == 0
    assert "SparsityPlan.from_dict(json.load(open('half.json')))" in capsys.readouterr().out.splitlines()[-1]
    assert main(arguments) == 0
    assert "50.0 %" in capsys.readouterr().out.splitlines()[-1]
    assert main([*arguments, "--exclude", "0", "--include", "3"]) == 0
    assert "216" not in capsys.readouterr().out


def test_allocate_with_data_and_what_it_refuses(project, capsys):
    arguments = ["allocate", "--model", "my_project:small", "--sparsity", "0.5", "--importance", "owl"]
    assert main([*arguments, "--data", "my_project:pair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["importance"] == "owl"
    assert main(arguments) == 2
    assert "needs data: give --data" in capsys.readouterr().err
    assert main(["allocate", "--model", "my_project:small"]) == 2


def test_importances_are_those_of_the_library(project):
    import torch
    from torch import nn

    import prunewise as pw
    from prunewise.cli.allocate import IMPORTANCES
    from prunewise.core.errors import DataError
    from prunewise.layers.allocate import _OURS, _PUBLISHED

    assert IMPORTANCES.keys() == _OURS.keys() | _PUBLISHED.keys()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12))
    for name, needs_data in IMPORTANCES.items():
        if needs_data:
            with pytest.raises(DataError, match="needs data"):
                pw.allocate(model, 0.5, name)
        else:
            pw.allocate(model, 0.5, name)


def test_prune_by_gates_logs_to_stderr_and_goes_on_from_its_checkpoint(project, capsys):
    arguments = ["prune", "--model", "my_project:small", "--data", "my_project:pair", "--macs", "0.6", "--epochs", "2"]
    arguments += ["--out", "small", "--checkpoint", "run", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["after"]["macs"] <= 0.6 * json.loads(captured.out)["before"]["macs"]
    assert captured.err.startswith("epoch 1/2")
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    lines = again.err.splitlines()
    warning = next(line for line in lines if "started from other weights" in line)  # the factory's are random
    assert warning.startswith("prunewise: warning: run holds a run that ")
    assert any(line.startswith("resumed") for line in lines)


def test_prune_by_gates_shows_what_it_measured(project, capsys):
    import torch

    torch.manual_seed(0)  # of the factories' weights and batches
    arguments = ["prune", "--model", "my_project:small", "--data", "my_project:pair", "--macs", "0.6", "--epochs", "2"]
    assert main([*arguments, "--json"]) == 0
    metric = json.loads(capsys.readouterr().out)["metric"]
    assert metric.keys() == {"name", "original", "gated", "small"}
    assert metric["name"] == "accuracy" and metric["gated"] == metric["small"]
    torch.manual_seed(0)
    assert main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = next(line for line in lines if line[:1] == ["accuracy"] and len(line) == 4)
    assert row[1:3] == [f"{metric['original']:.4f}", f"{metric['small']:.4f}"]
    assert ["accuracy", "under", "gates,", "before", "the", "cut:", row[2]] in lines
    assert main(["prune", *MODEL, "--macs", "0.5", "--method", "magnitude", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] is None


def test_warnings_of_others_are_as_they_were(project, monkeypatch, capsys):
    import warnings

    def warn(args):
        warnings.warn_explicit("from elsewhere", UserWarning, "/elsewhere/module.py", 3)
        for line in (1, 2):
            warnings.warn_explicit("of ours", UserWarning, VERBS["cost"].__file__, line)

    monkeypatch.setattr(VERBS["cost"], "run", warn)
    with pytest.warns(UserWarning, match="from elsewhere") as caught:
        assert main(["cost", "--model", "a:b"]) == 0
    assert len(caught) == 1
    assert capsys.readouterr().err == "prunewise: warning: of ours\n"


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
