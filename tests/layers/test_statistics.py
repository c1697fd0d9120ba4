"""Streaming statistics against all activations at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.layers.importance import effective_rank
from prunewise.layers.patches import channels_of, patches_of
from prunewise.layers.statistics import HESSIAN, INPUT, OUTPUT, SQUARES, WIDEST, Moments, gather
from prunewise.layers.weights import find_layers

MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear on tokens": (nn.Linear(5, 3), (4, 7, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 4, 8, 7)),
    "conv2d same": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 6, 6)),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d unbatched": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), stride=2), (2, 2, 3, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=2), (2, 4, 5, 6)),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=3, output_padding=(2, 1)), (2, 4, 3, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("what", MODULES)
def test_patches_times_the_matrix_are_the_output(what: str) -> None:
    module, shape = MODULES[what]
    module = copy.deepcopy(module).double()
    x = torch.randn(shape, dtype=torch.float64)
    (layer,) = find_layers(module)
    product = patches_of(layer, x, module(x).shape) @ layer.as_matrix(layer.weight).transpose(
        1, 2
    )  # (groups, rows, outputs of a group)
    rows = product.transpose(0, 1).reshape(product.shape[1], -1) + module.bias
    torch.testing.assert_close(rows, channels_of(module, module(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(3),
        nn.Conv2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def samples(n: int = 12) -> Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 3


ALL = (INPUT, OUTPUT, SQUARES, HESSIAN)


def test_statistics_by_brute_force() -> None:
    model, x = net().eval(), samples()
    found = gather(model, find_layers(model), x.split(5), ALL, what="a test")
    for path, upto in (("0", 0), ("5", 5), ("7", 7)):
        module = model.get_submodule(path)
        into = model[:upto](x)
        out = module(into)
        for values, moments in ((into, found[path].input), (out, found[path].output)):
            rows = values.detach().double()
            rows = rows if rows.dim() == 2 else rows.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])
            assert moments.count == len(rows)
            torch.testing.assert_close(moments.covariance(), torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-7)
        (layer,) = find_layers(model, include=path)
        for g, patches in enumerate(patches_of(layer, into.detach(), out.shape).double()):
            expected = sum(torch.outer(row, row) for row in patches)
            torch.testing.assert_close(found[path].hessian[g], expected, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(found[path].squares[g], expected.diagonal(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1, 4, 12])
def test_batch_size_and_order_do_not_matter(size: int) -> None:
    model, x = net().double(), samples(12).double()
    layers = find_layers(model)
    one = gather(model, layers, [x], ALL, what="a test")
    shuffled = x[torch.randperm(12, generator=torch.Generator().manual_seed(size))]
    many = gather(model, layers, shuffled.split(size), ALL, what="a test")
    for name, statistics in one.items():
        other = many[name]
        for a, b in (
            (statistics.input.covariance(), other.input.covariance()),
            (statistics.output.covariance(), other.output.covariance()),
            (statistics.squares, other.squares), (statistics.hessian, other.hessian),
        ):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert statistics.rows == other.rows


def test_a_covariance_takes_positions_evenly() -> None:
    values = torch.arange(100.0).reshape(1, 1, 100)
    rows = channels_of(nn.Conv1d(1, 1, 1), values, positions=4)
    assert rows.flatten().tolist() == [12.0, 37.0, 62.0, 87.0]
    assert len(channels_of(nn.Conv1d(1, 1, 1), values)) == 100


def test_the_model_is_left_as_it_was() -> None:
    model = net()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    gather(model, find_layers(model), samples().split(4), ALL, what="a test")
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_go_when_the_model_fails() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        gather(model, find_layers(model), [torch.zeros(2, 5)], ALL, what="a test")
    assert not any(m._forward_hooks for m in model.modules())


def test_tied_layers_are_summed_together() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x = torch.randn(5, 3).double()
    layers = find_layers(model)
    found = gather(model, layers, [(x, None)], [SQUARES], what="a test")
    expected = x.square().sum(0) + model[:2](x).square().sum(0)
    torch.testing.assert_close(found["0"].squares[0], expected)
    assert found["0"].rows == 10


class Odd(nn.Module):
    """A convolution whose weight is shared with one of other stride, and one that is asked for an output size."""

    def __init__(self) -> None:
        super().__init__()

        class Own(nn.Conv2d):
            pass

        self.a, self.b = Own(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=2, dilation=2, padding=2)
        self.b.weight = self.a.weight
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.b(self.a(x)), output_size=(6, 6))
        return out


def test_each_call_by_the_module_that_is_called() -> None:
    model, x = Odd().double().eval(), torch.randn(2, 3, 6, 6).double()
    layers = find_layers(model)
    found = gather(model, layers, [x], ALL, what="a test")
    into = [x, model.a(x), model.b(model.a(x))]
    unfold = nn.functional.unfold
    patches = [unfold(into[0], 3, padding=1), unfold(into[1], 3, dilation=2, padding=2, stride=2)]
    expected = sum(p.detach().square().sum((0, 2)) for p in patches)
    torch.testing.assert_close(found["a"].squares[0], expected)
    torch.testing.assert_close(found["a"].hessian[0].diagonal(), expected)
    # Each output is a sum of weights times patches; the gradient of Σ ½·out² by an all-equal weight says how large they are.
    ones = torch.ones_like(into[2])
    weight = torch.rand_like(model.up.weight).requires_grad_()
    out = nn.functional.conv_transpose2d(ones, weight, stride=2, padding=1, output_padding=1)
    counts = torch.autograd.grad(out.sum(), weight)[0]  # how often each weight is used
    one = copy.deepcopy(model)
    one.b.register_forward_hook(lambda *_: ones)
    squares = gather(one, layers_of := find_layers(one, include="up"), [x], [SQUARES], what="a test")["up"].squares
    torch.testing.assert_close(layers_of[0].from_matrix(squares.unsqueeze(1).expand(-1, 2, -1)), counts)


def test_ties_that_group_channels_otherwise_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    model[1].weight = model[0].weight
    with pytest.raises(pw.PlanError, match="'0' is tied to '1'"):
        gather(model, find_layers(model), [torch.randn(1, 2, 3, 3)], [SQUARES], what="a test")


def test_a_layer_that_gets_no_rows_is_never_called() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(pw.DataError, match="never called ''"):
        gather(model, find_layers(model), [torch.zeros(0, 3)], ALL, what="a test")


def test_compiled_models_are_run_uncompiled() -> None:
    model = net().eval()
    expected = gather(model, find_layers(model), samples().split(3), ALL, what="a test")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = gather(compiled, find_layers(compiled), samples().split(3), ALL, what="a test")
    assert [s.calls for s in found.values()] == [4] * 3
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a.hessian, b.hessian)


def test_what_forward_writes_is_put_back() -> None:
    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("seen", torch.zeros(()))
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.last = super().forward(x)
            return self.last

    model = Counts()
    for importance in ("capacity", "effective_rank", "loss_increase"):
        data = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))]
        pw.allocate(model, 0.5, importance, data, progress=False)
        assert model.seen == 0 and model.last is None
    pw.compactness(model, data, evaluate=lambda m, d: float(m(d[0][0]).sum()), progress=False)
    assert model.seen == 0 and model.last is None


class Buffers(nn.Module):
    """Writes into buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scripted = nn.Linear(3, 3), torch.jit.script(nn.ReLU())
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("shared", self.mean)
        self.register_buffer("expanded", torch.full((1,), torch.nan).expand(4))
        self.register_buffer("grows", torch.zeros(0), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scripted(self.linear(x))
        self.mean.mul_(0.9).add_(out.mean(0))
        assert self.shared is self.mean
        self.grows.resize_(5)
        self.none = out
        return out


@pytest.mark.parametrize("importance", ["capacity", "taylor", "owl", "loss_increase"])
def test_buffers_of_every_kind_are_put_back(importance: str) -> None:
    model = Buffers()
    before = dict(model._buffers)
    pw.allocate(model, 0.5, importance, [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))], progress=False)
    assert all(model._buffers[name] is buffer for name, buffer in before.items())
    assert not model.mean.any() and not model.mean.requires_grad and not len(model.grows)
    copy.deepcopy(model)


def test_torchs_own_transformer_calls_its_layers() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    found = gather(model, find_layers(model), [torch.randn(2, 3, 8)], [INPUT], what="a test")
    assert [s.input.count for s in found.values()] == [6] * 8


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.used(input=x)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, pw.DataError, "a test needs data: give data="),
        ([], pw.DataError, "the loader is empty"),
        ([{"x": torch.zeros(2, 3), "labels": 1}], pw.DataError, "never called 'idle'"),
        ([{"x": torch.full((2, 3), float("nan"))}], pw.NonFiniteError, "activations of 'used' are not finite"),
    ],
)
def test_data_that_will_not_do(data: Any, error: type[Exception], message: str) -> None:
    model = Keywords()
    layers = find_layers(model, exclude=None if error is pw.DataError else "idle")
    with pytest.raises(error, match=message):
        gather(model, layers, data, [INPUT], what="a test")


def test_a_model_on_the_meta_device_is_not_run() -> None:
    model = nn.Linear(3, 3, device="meta")
    with pytest.raises(pw.DataError, match="meta device"):
        gather(model, find_layers(model), [torch.zeros(2, 3)], [INPUT], what="a test")


def test_long_vectors_are_folded_and_keep_their_rank() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 10, generator=rng) @ torch.randn(10, 3 * WIDEST, generator=rng)
    moments = Moments()
    for part in rows.split(50):
        moments.add(part)
    assert moments.outer is not None and moments.outer.shape == (WIDEST, WIDEST)
    small = (rows - rows.mean(0)).double()
    whole = effective_rank(small @ small.T)  # the same nonzero eigenvalues as the full covariance
    assert effective_rank(moments.covariance()) == pytest.approx(whole, rel=0.02)


def test_channels_that_do_not_vary_have_no_covariance() -> None:
    moments = Moments()
    rows = torch.full((300, 3), 0.1) * torch.tensor([1.0, 7.0, 1000.0])
    for part in rows.split(7):
        moments.add(part)
    assert not moments.covariance().any()
    moments.add(torch.tensor([[0.1, 0.7, 101.0]]))
    assert effective_rank(moments.covariance()) == pytest.approx(1)
