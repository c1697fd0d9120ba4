"""Sparse models on disk: exact, the smallest form of each tensor, and nothing believed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.sparse import SparseSemiStructuredTensorCUTLASS

import prunewise as pw
from prunewise._files import DTYPES


def factory() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 40), nn.Linear(40, 7)
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sparse(total: float, method: str = "magnitude", build: Callable[[], nn.Module] = factory) -> nn.Module:
    torch.manual_seed(1)
    model = build().eval()
    return pw.sparsify_(model, pw.allocate(model, total, "uniform"), method)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("total", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, total: float, permanent: bool, dtype: torch.dtype) -> None:
    model = sparse(total).to(dtype)
    before = state(model)
    if permanent:
        pw.make_permanent_(model)
    size = pw.save_sparse(tmp_path / "m.safetensors", model)
    torch.manual_seed(2)
    loaded = pw.load_sparse(tmp_path / "m.safetensors", lambda: factory().to(dtype)).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        found = loaded.state_dict()[name]
        if name.endswith("_orig"):  # what lies under the mask is gone
            mask = model.state_dict()[name.removesuffix("_orig") + "_mask"]
            value, found = value * mask, found * mask
        assert found.dtype == value.dtype and torch.equal(found, value), name
    assert torch.equal(loaded(X.to(dtype)), model(X.to(dtype)))
    if not permanent:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert size == pw.sparse_size(model)
    assert set(size.tensors) == set(pw.sparse_size(loaded).tensors)
    header = int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "m.safetensors").stat().st_size == 8 + header + size.size_bytes
    assert size.dense_bytes == sum(v.nbytes for v in factory().to(dtype).state_dict().values())
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_each_tensor_takes_the_smallest_form() -> None:
    def form(density: float, shape: tuple[int, ...] = (100, 100), dtype: torch.dtype = torch.float32) -> pw.SparseSize:
        model = nn.Module()
        value = torch.zeros(shape, dtype=dtype)
        value.view(-1)[torch.randperm(value.numel())[: round(density * value.numel())]] = 1
        model.register_parameter("w", nn.Parameter(value))
        return pw.sparse_size(model)

    assert [form(d).tensors[0].form for d in (1.0, 0.98, 0.9, 0.5, 0.2, 0.1, 0.0)] == [
        "dense", "dense", "bitmask", "bitmask", "bitmask", "csr", "csr",
    ]  # fmt: skip
    # by hand: a bit an element and the values; or 101 offsets and the columns, of one byte up to 255, of two from there
    assert form(0.2).size_bytes == 1250 + 4 * 2000
    assert form(0.1).size_bytes == 101 * 2 + 1000 * (1 + 4)
    assert form(0.01).size_bytes == 101 * 1 + 100 * (1 + 4)
    assert form(0.01, (100, 1000)).size_bytes == 101 * 2 + 1000 * (2 + 4)
    assert form(0.5, dtype=torch.bfloat16).size_bytes == 1250 + 2 * 5000
    assert form(0.5, ()).tensors[0].density in (0.0, 1.0)
    assert form(0.0, (0, 4)).size_bytes == 0
    assert pw.sparse_size(nn.Module()).size_bytes == 0
    assert "all" in pw.sparse_size(nn.Module()).table()


def test_masks_are_in_force_again_where_a_kept_weight_is_zero(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = 0.0
    mask = torch.eye(4)
    prune.custom_from_mask(model, "weight", mask)
    prune.custom_from_mask(model, "bias", torch.tensor([1.0, 0, 1, 0]))
    pw.save_sparse(tmp_path / "m", model)
    loaded = pw.load_sparse(tmp_path / "m", lambda: nn.Linear(4, 4))
    assert torch.equal(loaded.weight_mask, mask)
    assert torch.equal(loaded.bias_mask, model.bias_mask)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        loaded(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    loaded(torch.ones(1, 4))
    assert int((loaded.weight != 0).sum()) == 4
    assert loaded.weight[0, 0] != 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
        self.second = self.first
        self.head.weight = self.embed.weight  # type: ignore[assignment]
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(x)))) * self.scale


@pytest.mark.parametrize("masked", [True, False])
def test_ties_are_stored_once(tmp_path: Path, masked: bool) -> None:
    torch.manual_seed(0)
    model = Tied()
    pw.sparsify_(model, pw.allocate(model, 0.5, "uniform"))
    if not masked:
        pw.make_permanent_(model)
    size = pw.save_sparse(tmp_path / "m", model)
    assert [t.name for t in size.tensors] == ["scale", "embed.weight", "first.bias", "first.weight"] or len(
        size.tensors
    ) == 4
    loaded = pw.load_sparse(tmp_path / "m", Tied)
    x = torch.arange(20)
    assert torch.equal(loaded(x), model(x))
    weight = "weight_orig" if masked else "weight"
    assert getattr(loaded.head, weight) is getattr(loaded.embed, weight)


def test_modules_with_parametrizations_keep_their_names(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))

    model = build()
    pw.save_sparse(tmp_path / "m", model)
    assert torch.equal(pw.load_sparse(tmp_path / "m", build)(torch.ones(1, 5)), model(torch.ones(1, 5)))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    pw.save_sparse(tmp_path / "m", sparse(0.9))
    with pytest.raises(pw.CheckpointError, match="another architecture.*missing"):
        pw.load_sparse(tmp_path / "m", lambda: nn.Linear(2, 2))
    with pytest.raises(pw.CheckpointError, match=r"float32 of shape .*float64"):
        pw.load_sparse(tmp_path / "m", lambda: factory().double())
    with pytest.raises(pw.CheckpointError, match="the factory returned a int"):
        pw.load_sparse(tmp_path / "m", lambda: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(pw.CheckpointError, match="n is missing: name the path that was given when it was saved"):
        pw.load_sparse(tmp_path / "n", factory)
    for folder in (tmp_path, ""):
        with pytest.raises(pw.CheckpointError, match="is a folder"):
            pw.save_sparse(folder, factory())
    with pytest.raises(pw.CheckpointError, match="cannot be written"):
        pw.save_sparse(tmp_path / ("x" * 300), factory())
    with pytest.raises(pw.CheckpointError, match="the folder .* is missing"):
        pw.save_sparse(tmp_path / "a" / "m", factory())
    with pytest.raises(pw.CheckpointError, match="a mask on '0.weight': it should build the dense one"):
        pw.load_sparse(tmp_path / "m", lambda: sparse(0.9))
    (tmp_path / ".weights.0123.tmp").touch()  # of a process that was killed
    os.utime(tmp_path / ".weights.0123.tmp", (0, 0))
    pw.save_sparse(tmp_path / "m", factory())
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(pw.CheckpointError, match="lack the section"):
        pw.load_sparse(tmp_path / "plain", factory)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "plain"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("kept", "form"), [(0, "csr"), (1, "csr"), (200, "bitmask"), (400, "dense")])
def test_all_dtypes_come_back_to_the_smallest_value(tmp_path: Path, dtype: torch.dtype, kept: int, form: str) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.register_buffer("b", torch.zeros(20, 20 * dtype.itemsize, dtype=torch.uint8).view(dtype))
        return model

    model = build()
    flat = model.b.view(-1).view(torch.uint8).view(400, -1)  # type: ignore[operator, union-attr]
    flat[torch.randperm(400)[:kept], 0] = 1  # of a float64, 5e-324
    size = pw.save_sparse(tmp_path / "m", model)
    assert size.tensors[0].form == form or dtype.itemsize == 1
    loaded = pw.load_sparse(tmp_path / "m", build)
    assert loaded.b.dtype == dtype
    assert torch.equal(loaded.b.view(torch.uint8), model.b.view(torch.uint8))  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["meta", "csr", "complex", "2:4", "lazy"])
def test_tensors_that_cannot_be_saved_are_named(tmp_path: Path, kind: str) -> None:
    odd = {
        "meta": lambda: torch.ones(4, 4, device="meta"),
        "csr": lambda: torch.eye(4).to_sparse_csr(),
        "complex": lambda: torch.ones(4, 4, dtype=torch.complex64),
        "2:4": lambda: SparseSemiStructuredTensorCUTLASS(
            torch.Size((4, 4)), torch.ones(4, 2), torch.ones(4, 1), None, None, None
        ),
    }
    model = nn.Sequential(nn.LazyLinear(4) if kind == "lazy" else nn.Linear(4, 4))
    if kind in odd:
        model[0].weight = nn.Parameter(odd[kind](), requires_grad=False)
    with pytest.raises(pw.CheckpointError, match="tensor '0.weight'"):
        pw.sparse_size(model)
    with pytest.raises(pw.CheckpointError, match="tensor '0.weight'"):
        pw.save_sparse(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())


def test_masks_of_other_values_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.custom_from_mask(model[0], "weight", 0.5 * torch.eye(4))
    for call in (pw.sparse_size, lambda model: pw.save_sparse(tmp_path / "m", model)):
        with pytest.raises(pw.CheckpointError, match="mask on '0.weight' .*make_permanent_"):
            call(model)
    pw.save_sparse(tmp_path / "m", pw.make_permanent_(model))
    assert torch.equal(
        pw.load_sparse(tmp_path / "m", lambda: nn.Sequential(nn.Linear(4, 4)))[0].weight, model[0].weight
    )


class Own(nn.Module):
    """Saves its weight transposed, and a count besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.count = nn.Parameter(torch.randn(3, 5)), torch.rand(2)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: object) -> None:
        turned = {**state, f"{prefix}weight": state[f"{prefix}weight"].t()}
        super()._load_from_state_dict(turned, prefix, *args)  # type: ignore[arg-type]

    def get_extra_state(self) -> Tensor:
        return self.count

    def set_extra_state(self, state: Tensor) -> None:
        self.count = state


def test_modules_that_save_and_load_in_their_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Own(), nn.utils.spectral_norm(nn.Linear(3, 3)))
    pw.save_sparse(tmp_path / "m", model)

    def build() -> nn.Module:
        return nn.Sequential(Own(), nn.utils.spectral_norm(nn.Linear(3, 3)))

    loaded = pw.load_sparse(tmp_path / "m", build)
    assert torch.equal(loaded[0].weight, model[0].weight) and torch.equal(loaded[0].count, model[0].count)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    monkeypatch.setattr(Own, "set_extra_state", nn.Module.set_extra_state)
    with pytest.raises(pw.CheckpointError, match="m cannot be loaded into this Sequential: "):
        pw.load_sparse(tmp_path / "m", build)


def test_what_was_saved_apart_is_not_loaded_into_one(tmp_path: Path) -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.randn(20, 6))
    pw.save_sparse(tmp_path / "m", model)
    with pytest.raises(pw.CheckpointError, match="'embed.weight' and 'head.weight' were saved as two tensors"):
        pw.load_sparse(tmp_path / "m", Tied)


def test_what_is_loaded_can_be_copied_and_averaged(tmp_path: Path) -> None:
    pw.save_sparse(tmp_path / "m", sparse(0.9))
    loaded = pw.load_sparse(tmp_path / "m", factory).eval()
    assert torch.equal(copy.deepcopy(loaded)(X), loaded(X))
    assert torch.equal(AveragedModel(pw.load_sparse(tmp_path / "m", factory)).eval()(X), loaded(X))
