"""The graph module of a model computes what the masked model computes, in both modes, for any batch size."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from prunewise.core.cost import CostModel, measure
from prunewise.core.errors import VerificationError
from prunewise.core.graph import rebuild
from prunewise.core.proof import check_equal
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon
from prunewise.core.trace import as_call, tensors_of
from tests.zoo import build


def draw(costs: CostModel, seed: int = 0) -> dict[str, tuple[int, ...]]:
    rnd = random.Random(seed)
    sizes = {g.name: (g.size, max(1, round(g.size * rnd.uniform(0.3, 0.9)))) for g in costs.groups}
    return {name: tuple(sorted(rnd.sample(range(n), k))) for name, (n, k) in sizes.items()}


def one_more(inputs: Any) -> Any:
    return tree_map(lambda t: torch.cat([t, t[:1]]) if isinstance(t, Tensor) and t.dim() else t, inputs)


def prepare(model: nn.Module, x: Any, seed: int = 0) -> tuple[CostModel, dict[str, tuple[int, ...]], nn.Module]:
    costs = Surgeon.of(model, x).costs
    keep = draw(costs, seed)
    small = rebuild(model, costs, keep, x)
    assert list(small.state_dict()) == list(model.state_dict())
    predicted = costs({name: len(kept) for name, kept in keep.items()})
    assert sum(p.numel() for p in small.parameters()) == predicted.params
    return costs, keep, small


def compare(model: nn.Module, x: Any, seed: int = 0, batch: bool = True) -> nn.Module:
    costs, keep, small = prepare(model, x, seed)
    assert check_equal(model, small, costs.grouping, keep, x) <= 1e-9
    if batch:
        assert check_equal(model, small, costs.grouping, keep, one_more(x)) <= 1e-9
    model.train()
    trained = copy.deepcopy(small).train()
    args, kwargs = as_call(x)
    reference = copy.deepcopy(model)
    with masked(reference, costs.grouping, keep), torch.no_grad():
        torch.manual_seed(0)
        want = tensors_of(reference(*args, **kwargs))
    torch.manual_seed(0)
    got = tensors_of(trained(*args, **kwargs))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b.detach(), a, rtol=1e-9, atol=1e-9)
    sum(t.sum() for t in got if t.requires_grad).backward()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n, p in trained.named_parameters() if not p.requires_grad} == frozen
    # What training did to the buffers shows in eval mode.
    reference.eval(), trained.eval()
    with masked(reference, costs.grouping, keep), torch.no_grad():
        for a, b in zip(tensors_of(reference(*args, **kwargs)), tensors_of(trained(*args, **kwargs)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    return small


@pytest.mark.parametrize("name", ["conv3d", "model_output", "frozen_backbone", "aux_head"])
def test_equals_the_masked_model(name: str) -> None:
    compare(*build(name))


SLOW = [
    "resnet_a", "vit_timm", "vit_qk_norm", "gpt2", "llama", "llama_gqa_sdpa", "seq2seq", "detection_head",
    "c2f_split", "bert",
    "partial_conv_slice", "shufflenet_v2", "unet", "groupnorm_cnn", "lstm_classifier",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_equals_the_masked_model_slowly(name: str) -> None:
    compare(*build(name))


def test_says_where_the_batch_size_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(Baked):
        def forward(self, x: Tensor) -> Tensor:
            return self.tail(x, len(x))

    model, x = Fixed().double(), torch.randn(3, 6, dtype=torch.float64)
    exported: list[nn.Module] = []
    export = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda module, *a, **k: exported.append(module) or export(module, *a, **k)
    )
    with pytest.warns(UserWarning, match="batches of 3 only"):
        small = compare(model, x, batch=False)
    assert len(exported) == 2  # one a mode
    with pytest.raises(ValueError, match=r"shape \(4, 6\)"):
        small(one_more(x))


class Baked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)

    def tail(self, x: Tensor, n: int) -> Tensor:
        return self.b(self.bn(F.relu(self.a(x))).reshape(n, 12))

    def forward(self, x: Tensor, scale: float = 1.0, *, flag: bool = True) -> dict[str, Any]:
        return {"y": (self.tail(x, x.shape[0]) * scale,), "flag": flag}


class Pieces(nn.Module):
    """Every kind of integer that stands for a place or a width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 6)
        self.p, self.q, self.r = (nn.Linear(4, 6) for _ in range(3))
        self.conv, self.norm = nn.Conv1d(6, 6, 1, groups=6), nn.GroupNorm(3, 6)
        self.scale, self.bias, self.out = torch.tensor(2.0), nn.Parameter(torch.randn(6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        a, b, c = self.a(x).chunk(3, 1)
        h = self.p(a) + self.q(b) + self.r(c)
        h = torch.sigmoid(h) * torch.full((n, 6), 0.5) + self.bias.repeat(n, 1)
        h = self.norm(self.conv(h.view(n, 6, 1))).flatten(1)
        with torch.no_grad():
            mean = h.sum(0, keepdim=True).expand(n, 6) * self.scale
        h = h + mean + F.pad(self.b(x)[:, 1:5], (1, 1))
        h = h.reshape(n * 6).reshape(n, 6)
        y = self.c(x).clone()
        y[:, :3] = y[:, 3:] * 2
        return self.out(h * y / (h.numel() / n))


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 12), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.d(torch.sigmoid(self.b(h[:, ::2]) + self.c(h[:, 1::2])))


class Heads(nn.Module):
    """The batch times the heads in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 4, 4).transpose(1, 2).reshape(n * 4, t, 4) for f in (self.q, self.k, self.v))
        y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 2.0).softmax(-1), v)
        return self.o(y.view(n, 4, t, 4).transpose(1, 2).reshape(n, t, 16))


@pytest.mark.parametrize(("kind", "shape"), [(Baked, (3, 6)), (Pieces, (3, 6)), (Strided, (3, 6)), (Heads, (3, 5, 8))])
def test_integers_are_rewritten(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    if isinstance(model, Pieces):
        model.scale = model.scale.double()
        torch.set_default_dtype(torch.float64)
    try:
        compare(model, torch.randn(shape, dtype=torch.float64))
    finally:
        torch.set_default_dtype(torch.float32)


def test_is_called_like_the_original() -> None:
    model, x = Baked(), torch.randn(3, 6)
    _, _, small = prepare(model, x)
    small.eval()
    out = small(x=x, scale=1.0)
    assert out["flag"] is True and torch.equal(out["y"][0], small(x)["y"][0])
    with pytest.raises(TypeError, match="scale is fixed"):
        small(x, 2.0)
    with pytest.raises(TypeError, match="nope"):
        small(x, nope=1)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(small)


def test_a_batch_of_one_frees_the_batch_size() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, _, small = prepare(Baked().eval(), torch.randn(1, 6))
    assert small(torch.randn(5, 6))["y"][0].shape == (5, 2)


def test_a_train_mode_that_wants_more_arguments() -> None:
    class Targets(Baked):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            if self.training and y is None:
                raise ValueError("targets, please")
            return self.tail(x, x.shape[0])

    model, x = Targets(), torch.randn(4, 6)
    with pytest.warns(UserWarning, match="targets"):
        _, _, small = prepare(model, x)
    before = small.bn.running_mean.clone()
    small.train()(x)
    assert not torch.equal(before, small.bn.running_mean)


def test_can_be_measured_and_cut_again() -> None:
    model, x = Baked().double(), torch.randn(3, 6, dtype=torch.float64)
    costs, keep, small = prepare(model, x)
    assert measure(small, x).as_dict() == costs({n: len(k) for n, k in keep.items()}).as_dict()
    compare(small, x, seed=3)


def test_meta_and_the_original_is_left_alone() -> None:
    model, x = Baked().to("meta"), torch.randn(3, 6, device="meta")
    before = dict(model.state_dict(keep_vars=True).items())
    _, _, small = prepare(model, x)
    assert small.a.weight.is_meta and small.a.weight.shape[0] < 12
    assert all(before[n] is p for n, p in model.state_dict(keep_vars=True).items()) and model.training


def test_names_the_operation_that_cannot_be_rewritten() -> None:
    class Stuck(Baked):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return self.b(torch.as_strided(h, (x.shape[0], 12), (12, 1)))

    with pytest.raises(VerificationError, match=r"as_strided.*test_graph\.py:\d+"):
        prepare(Stuck(), torch.randn(3, 6))
