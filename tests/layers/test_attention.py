"""nn.MultiheadAttention: statistics of its projections by brute force, and masks that stay in force on them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.layers.statistics import HESSIAN, INPUT, OUTPUT, SQUARES, gather
from prunewise.layers.weights import find_layers

ALL = (INPUT, OUTPUT, SQUARES, HESSIAN)


class Attend(nn.Module):
    """Attention of x to a longer sequence, or to itself."""

    def __init__(self, cross: bool, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cross = cross
        self.attention = nn.MultiheadAttention(6, 2, **settings)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        other = y if self.cross else x
        out: Tensor = self.attention(query=x, key=other, value=other, need_weights=False)[0]
        return out


def heads_joined(module: nn.MultiheadAttention, *inputs: Tensor) -> Tensor:
    """What goes into out_proj, batch first."""
    plain = copy.deepcopy(module)
    nn.init.eye_(plain.out_proj.weight)
    nn.init.zeros_(plain.out_proj.bias)
    out: Tensor = plain(*inputs)[0]
    return out if module.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "cross, other widths"])
def test_statistics_by_brute_force(kind: str, batch_first: bool) -> None:
    widths = {"kdim": 4, "vdim": 4} if "widths" in kind else {}
    model = Attend(kind != "self", batch_first=batch_first, **widths).double().eval()
    module = model.attention
    x, y = torch.randn(3, 4, 6).double(), torch.randn(3, 5, widths.get("kdim", 6)).double()
    if kind == "self":
        y = x
    turned = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    batches = [{"x": turned(x[i : i + 2]), "y": turned(y[i : i + 2])} for i in (0, 2)]
    layers = {layer.name: layer for layer in find_layers(model)}
    found = gather(model, list(layers.values()), batches, ALL, what="a test")

    def check(name: str, inputs: list[Tensor]) -> None:
        statistics, layer = found[name], layers[name]
        for g, values in enumerate(inputs):
            rows = values.detach().reshape(-1, values.shape[-1])
            torch.testing.assert_close(statistics.hessian[g], rows.T @ rows)
            torch.testing.assert_close(statistics.squares[g], rows.square().sum(0))
        shortest = min(t.shape[1] for t in inputs)
        made = [t @ w.T for t, w in zip(inputs, layer.as_matrix(layer.weight), strict=True)]
        outputs = torch.cat([t[:, :shortest] for t in made], -1).reshape(-1, layer.groups * layer.rows)
        torch.testing.assert_close(statistics.output.covariance(), torch.cov(outputs.T, correction=0))
        distinct = list({id(t): t.reshape(-1, t.shape[-1]) for t in inputs}.values())
        torch.testing.assert_close(statistics.input.covariance(), torch.cov(torch.cat(distinct).T, correction=0))

    with torch.no_grad():
        if widths:
            check("attention.q_proj_weight", [x])
            check("attention.k_proj_weight", [y])
            check("attention.v_proj_weight", [y])
        else:
            check("attention.in_proj_weight", [x, y, y])
        check("attention.out_proj", [heads_joined(module, *(turned(t) for t in (x, y, y)))])


def test_one_sample_without_a_batch() -> None:
    module = nn.MultiheadAttention(6, 2).double().eval()
    x = torch.randn(5, 6).double()
    found = gather(module, find_layers(module), [{"query": x, "key": x, "value": x}], [SQUARES], what="a test")
    torch.testing.assert_close(found["in_proj_weight"].squares, x.square().sum(0).expand(3, 6))
    assert found["out_proj"].rows == 5


def encoder(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def tokens() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 8, generator=rng) for _ in range(3)]


def train_(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(tokens()[0]), tokens()[1]).backward()
        optimizer.step()


def counts(model: nn.Module) -> dict[str, int]:
    return {layer.name: int((layer.weight != 0).sum()) for layer in find_layers(model)}


@pytest.mark.parametrize(
    "importance", ["capacity", "effective_rank", "rate", "owl", "taylor", "fisher", "loss_increase"]
)
def test_every_importance_sees_attention(importance: str) -> None:
    model = encoder()
    before = copy.deepcopy(model.state_dict())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    plan = pw.allocate(model, 0.5, importance, tokens(), loss=loss, progress=False)
    assert plan.sparsity == 0.5 and sum(plan.sizes.values()) == sum(
        p.numel() for p in model.parameters() if p.dim() > 1
    )
    assert {"layers.0.self_attn.in_proj_weight", "layers.1.self_attn.out_proj"} <= set(plan)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["magnitude", "channel_l1", "wanda", "sparsegpt", "2:4"])
def test_masks_stay_in_force_while_trained(method: str, tmp_path: Path) -> None:
    model, x = encoder(), tokens()[2]
    plan = pw.allocate(model, 0.5, "uniform")
    pw.sparsify_(model, plan, method, data=tokens(), progress=False)
    assert counts(model) == dict(plan.keep)
    start = {layer.name: layer.weight for layer in find_layers(model)}
    train_(model)
    assert not any(torch.equal(layer.weight, start[layer.name]) for layer in find_layers(model))
    with torch.no_grad():
        out = model.eval()(x)
    copied = copy.deepcopy(model)
    train_(copied)
    assert counts(copied) == counts(model) == dict(plan.keep)
    assert not torch.equal(copied.layers[0].self_attn.out_proj.weight, model.layers[0].self_attn.out_proj.weight)
    pw.save_sparse(tmp_path / "sparse.safetensors", model)
    loaded = pw.load_sparse(tmp_path / "sparse.safetensors", encoder).eval()
    attached = pw.attach_masks_(encoder(), model.state_dict()).eval()
    attached.load_state_dict(model.state_dict())
    for other in (loaded, attached):
        with torch.no_grad():
            torch.testing.assert_close(other(x), out)
        train_(other)
        assert counts(other) == dict(plan.keep)
    pw.make_permanent_(model)
    assert counts(model) == dict(plan.keep)
    assert sorted(model.state_dict()) == sorted(encoder().state_dict())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)  # the fused path is free again


def test_a_mask_taken_off_by_torch_leaves_a_free_weight() -> None:
    model = encoder()
    pw.sparsify_(model, pw.allocate(model, 0.5, "uniform"))
    for layer in model.layers:
        nn.utils.prune.remove(layer.self_attn.out_proj, "weight")
    train_(model)
    found = counts(model)
    assert found["layers.0.self_attn.out_proj"] > 32 and found["layers.0.self_attn.in_proj_weight"] == 96


def test_sparser_and_sparser() -> None:
    model = encoder()
    for sparsity in (0.3, 0.6, 0.8):
        plan = pw.allocate(model, sparsity, "erk")
        pw.sparsify_(model, plan, "wanda", data=tokens(), progress=False)
        train_(model)
        assert counts(model) == dict(plan.keep)
    assert sum(hook.__name__ == "_mask_output_projection" for hook in _hooks(model)) == 2


def _hooks(model: nn.Module) -> list[Any]:
    return [
        h
        for m in model.modules()
        for h in m._forward_pre_hooks.values()
        if not isinstance(h, nn.utils.prune.BasePruningMethod)
    ]


def test_compactness_finds_attention() -> None:
    model = encoder().eval()
    with torch.no_grad():
        model.layers[0].self_attn.in_proj_weight.zero_()
    dense = model(tokens()[0]).detach()
    found = pw.compactness(
        model, tokens()[0], evaluate=lambda m, x: -float((m(x) - dense).norm()), tolerance=0.1, progress=False
    )
    kept = {row.name: row.kept for row in found.layers}
    assert kept["layers.0.self_attn.in_proj_weight"] == 1 and kept["layers.1.self_attn.out_proj"] > 1


def test_attention_that_lost_channels() -> None:
    """After surgery it is a module of ours, which calls the output projection."""
    model = encoder().eval()
    small = pw.apply_plan(
        model, pw.plan_channels(model, tokens()[0], budget=pw.Budget(params=0.6), importance="magnitude"), tokens()[0]
    )
    plan = pw.allocate(small, 0.5, "owl", tokens(), progress=False)
    pw.sparsify_(small, plan, "wanda", data=tokens(), progress=False)
    train_(small)
    assert counts(small) == dict(plan.keep)
    with torch.no_grad():
        out = small.eval()(tokens()[2])
        torch.testing.assert_close(pw.make_permanent_(small)(tokens()[2]), out, rtol=1e-4, atol=1e-5)


def test_channel_shares_follow_attention_too() -> None:
    model = encoder().eval()
    plan = pw.allocate_channels(
        model, tokens()[0], budget=pw.Budget(macs=0.6), importance="effective_rank", data=tokens(), progress=False
    )
    assert plan.cost_after["macs"] <= 0.6 * plan.cost_before["macs"]


def test_weights_that_are_no_plain_parameters() -> None:
    module = nn.MultiheadAttention(8, 2)
    nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
    with pytest.raises(pw.PlanError, match="'in_proj_weight' is no plain parameter"):
        find_layers(module)
    assert [layer.name for layer in find_layers(module, exclude="in_proj_weight")] == ["out_proj"]


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pw.allocate(encoder(), 0.5, "erk").sparsity == 0.5


def test_an_output_projection_that_is_called_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention.out_proj(self.attention(x, x, x)[0])
            return out

    found = gather(model := Twice(), find_layers(model), [torch.randn(3, 4, 6)], [SQUARES], what="a test")
    assert found["attention.out_proj"].rows == 24


class TiedToLinear(nn.Module):
    """The output projection's weight is a linear layer's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)
        self.attention.out_proj.weight = self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.attention(x, x, x)[0])
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_an_output_projection_tied_to_a_linear_layer(masked: bool) -> None:
    model, x = TiedToLinear().double().eval(), torch.randn(3, 4, 6).double()
    if masked:
        pw.sparsify_(model, pw.allocate(model, 0.3, "uniform"))
    found = gather(model, find_layers(model), [x], [SQUARES], what="a test")["attention.out_proj"]
    with torch.no_grad():
        into = [heads_joined(model.attention, x, x, x) if not masked else None, model.attention(x, x, x)[0]]
    assert (found.calls, found.rows) == (2, 24)
    if not masked:
        torch.testing.assert_close(found.squares[0], sum(t.reshape(-1, 6).square().sum(0) for t in into))


def test_an_output_projection_that_a_subclass_reads() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return nn.functional.linear(input=x, weight=self.out_proj.weight)

    model, x = Own(4, 2), torch.randn(5, 4)
    (layer,) = find_layers(model, include="out_proj")
    torch.testing.assert_close(
        gather(model, [layer], [x], [SQUARES], what="a test")["out_proj"].squares[0], x.double().square().sum(0)
    )
    with pytest.raises(pw.DataError, match="never called 'in_proj_weight'"):
        gather(model, find_layers(model), [x], [SQUARES], what="a test")


@pytest.mark.parametrize("how", ["plan", "gates"])
def test_channels_go_after_masks_were_put_on(how: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 2)), torch.randn(2, 5, 6)
    pw.sparsify_(model, pw.allocate(model, 0.5, "uniform"))
    budget = pw.Budget(params=0.6)
    if how == "plan":
        small = pw.apply_plan(model, pw.plan_channels(model, x, budget=budget), x)
    else:
        gates = pw.attach_gates(model, x, budget=budget, total_steps=1)
        gates.harden()
        small = gates.finish()
    assert isinstance(small[1].self_attn, nn.MultiheadAttention)
    with torch.no_grad():
        out = small.eval()(torch.cat([x, x]))  # another batch size
    pw.make_permanent_(small)
    assert not any("_mask" in name for name in small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small(torch.cat([x, x])), out, rtol=1e-4, atol=1e-5)
