"""Compactness against a search of every density, its resumption, and what it reports."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.layers.compactness import LEVELS
from prunewise.layers.methods import sparsegpt


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
    )
    with torch.no_grad():
        model[2].weight[torch.rand(16, 16) < 0.9] *= 1e-4  # few of its weights matter
    return model


TOLERANCE = 1e-3
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(2))


class Error:
    """How far the outputs move; lower is better, and it grows as weights go."""

    def __init__(self, model: nn.Module, stop: int | None = None) -> None:
        self.want, self.calls, self.stop = copy.deepcopy(model).eval()(X).detach(), 0, stop

    def __call__(self, model: nn.Module, loader: Any) -> float:
        assert not model.training and not torch.is_grad_enabled()
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return float((model(loader) - self.want).square().mean())


def find(model: nn.Module, error: Error, **settings: Any) -> Any:
    options = {"tolerance": TOLERANCE, "higher_is_better": False, "progress": False} | settings
    return pw.compactness(model, X, evaluate=error, **options)


def test_each_layer_against_a_search_of_all_densities() -> None:
    model = net()
    found = find(model, Error(model))
    monotone = 0
    for row in found.layers:
        held = []
        for level in range(LEVELS):
            count = max(1, round(row.params * 2 ** (-level / 4)))
            other = copy.deepcopy(model).eval()
            weight = other.get_submodule(row.name).weight
            with torch.no_grad():
                largest = weight.abs().flatten().topk(count).indices
                kept = torch.zeros(row.params).index_fill(0, largest, 1).view_as(weight)
                weight.mul_(kept)
                held.append(Error(model)(other, X) <= TOLERANCE)
        first_fall = [*held, False].index(False)
        if not any(held[first_fall:]):  # the metric only falls: bisection finds the very last that holds
            monotone += 1
            assert row.kept == max(1, round(row.params * 2 ** (-(first_fall - 1) / 4)))
        assert row.metric <= TOLERANCE
    assert monotone >= 2
    assert found.layers[1].density < min(found.layers[0].density, found.layers[2].density)
    assert "most compact at '2'" in found.summary


def test_evaluations_are_as_few_as_said() -> None:
    model = net()
    error = Error(model)
    found = find(model, error)
    assert found.evaluations == error.calls <= 1 + 5 * 4
    alone = find(model, Error(model), include="0")
    assert alone.evaluations <= 1 + 5 * 2
    assert alone.layers[0] == found.layers[0]


def test_together_holds() -> None:
    model = net()
    found = find(model, Error(model))
    pruned = pw.sparsify_(copy.deepcopy(model), found.together).eval()
    with torch.no_grad():
        assert Error(model)(pruned, X) == pytest.approx(found.together_metric, rel=1e-5)
    assert found.together_metric <= TOLERANCE
    assert 0 < found.together.sparsity < 1
    assert all(found.together.keep[row.name] >= row.kept for row in found.layers)


def test_the_model_is_left_as_it_was() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    find(model, Error(model), method="sparsegpt", data=[X])
    with pytest.raises(KeyboardInterrupt):
        find(model, Error(model, stop=3))
    assert model.training and not torch.nn.utils.prune.is_pruned(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("stop", [0, 1, 4, 11])
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, stop: int) -> None:
    model = net()
    whole = find(model, Error(model))
    state = tmp_path / "deep" / "state.json"
    with pytest.raises(KeyboardInterrupt):
        find(model, Error(model, stop), state=state)
    error = Error(model)
    again = find(model, error, state=state)
    assert error.calls == whole.evaluations - stop
    assert (again.layers, again.together, again.base) == (whole.layers, whole.together, whole.base)
    assert find(model, Error(model, 0), state=state).evaluations == 0  # all is known


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    model = net()
    state = tmp_path / "state.json"
    find(model, Error(model), state=state)
    with pytest.raises(pw.CheckpointError, match="another method"):
        find(model, Error(model), state=state, method="random")
    data = json.loads(state.read_text())
    state.write_text(json.dumps({**data, "metrics": {"": "x"}}))
    with pytest.raises(pw.CheckpointError, match="no number"):
        find(model, Error(model), state=state)
    state.write_text("{}")
    with pytest.raises(pw.CheckpointError, match="not the state"):
        find(model, Error(model), state=state)
    find(model, Error(model), state=tmp_path / "other.json")
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(pw.CheckpointError, match="other weights"):
        find(model, Error(model), state=tmp_path / "other.json")


def test_a_metric_that_is_not_finite_does_not_hold() -> None:
    model = net()

    def evaluate(network: nn.Module, loader: Tensor) -> float:
        kept = float((network[0].weight != 0).double().mean())
        return 1.0 if kept > 0.3 else math.nan

    found = pw.compactness(model, X, evaluate=evaluate, include="0", progress=False)
    assert 0.3 < found.layers[0].density < 0.3 * 2**0.25 + 0.01
    with pytest.raises(pw.NonFiniteError, match="whole model is nan"):
        pw.compactness(model, X, evaluate=lambda m, x: math.nan, progress=False)


def test_a_layer_that_cannot_shrink_stays_whole() -> None:
    model = net()

    def evaluate(network: nn.Module, loader: Tensor) -> float:
        return float(torch.equal(network[0].weight != 0, torch.ones(16, 12, dtype=torch.bool)))

    found = pw.compactness(model, X, evaluate=evaluate, tolerance=0, progress=False)
    assert found.layers[0].kept == 192
    assert found.layers[1].kept == max(1, round(256 * 2 ** (-31 / 4)))
    assert found.together.keep["0"] == 192 and found.together.keep["2"] == found.layers[1].kept


def test_reports() -> None:
    model = net()
    found = find(model, Error(model))
    data = json.loads(found.to_json())
    assert [row["kept"] for row in data["layers"]] == [row.kept for row in found.layers]
    assert pw.SparsityPlan.from_dict(data["together"]) == found.together
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["0", "2", "5", "all"]
    assert lines[-1] == found.summary == str(found).splitlines()[-1]

    class Axes:
        drawn: dict[str, Any]

        def __init__(self) -> None:
            self.drawn = {}

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: self.drawn.update({name: (args, kwargs)})

    axes = Axes()
    assert found.plot(axes) is axes
    (depth, heights), options = axes.drawn["bar"]
    assert list(depth) == [0, 1, 2]
    assert heights == [row.density for row in found.layers]
    widths = options["width"]
    assert widths[1] == max(widths) <= 1 and widths[2] == min(widths)  # 256 and 64 weights


def test_a_plot_by_matplotlib() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    model = net()
    axes = find(model, Error(model)).plot()
    assert len(axes.patches) == 3 and axes.get_yscale() == "log"


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"tolerance": -1}, pw.DataError, "tolerance=-1"),
        ({"tolerance": math.nan}, pw.DataError, "tolerance=nan"),
        ({"method": "magic"}, pw.PlanError, "unknown method"),
        ({"exclude": "layer9"}, pw.PlanError, "no layer matches 'layer9'"),
    ],
)
def test_bad_settings(setting: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        find(model, Error(model), **setting)


def test_a_mask_in_force_is_refused() -> None:
    model = net()
    error = Error(model)
    pw.sparsify_(model, pw.allocate(model, 0.5, "erk", include="2"))
    with pytest.raises(pw.PlanError, match="'2' has a mask in force: call make_permanent_"):
        find(model, error)
    assert find(model, error, exclude="2").layers


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    find(model, Error(model), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "(3 of 3 layers)" in err


def test_metrics_in_single_precision_hold_at_the_edge() -> None:
    def evaluate(model: nn.Module, loader: Any) -> Tensor:
        whole = all(bool(m.weight.all()) for m in model.modules() if isinstance(m, nn.Linear))
        return torch.tensor(0.91 if whole else 0.89)

    found = pw.compactness(net(), X, evaluate=evaluate, tolerance=0.02, progress=False)
    assert [row.kept for row in found.layers] == [1, 1, 1]


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(pw.DataError, match="an iterator can be read once"):
        pw.compactness(net(), iter([X]), evaluate=Error(net()), progress=False)
    with pytest.raises(pw.DataError, match="evaluate gave a NoneType"):
        pw.compactness(net(), X, evaluate=lambda model, loader: None, progress=False)
    with pytest.raises(pw.DataError, match="tolerance='0.1'"):
        pw.compactness(net(), X, evaluate=Error(net()), tolerance="0.1")


def test_a_state_is_of_its_settings_and_data(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    model = net()
    methods = [partial(sparsegpt, damping=d) for d in (0.01, 1e6)]
    first = find(model, Error(model), method=methods[0], data=[X], state=state)
    assert first.evaluations
    with pytest.raises(pw.CheckpointError, match="another method"):
        find(model, Error(model), method=methods[1], data=[X], state=state)
    other = tmp_path / "other.json"
    find(model, Error(model), method="wanda", data=[X], state=other)
    with pytest.raises(pw.CheckpointError, match="other data"):
        find(model, Error(model), method="wanda", data=[X * torch.rand(12)], state=other)
    assert not find(model, Error(model), method="wanda", data=[X], state=other).evaluations
