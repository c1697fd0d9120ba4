"""Sparse models on disk: exact, the smallest form of each tensor, and nothing believed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import prunewise as pw


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
    with pytest.raises(pw.CheckpointError, match="is missing"):
        pw.load_sparse(tmp_path / "n", factory)
    with pytest.raises(pw.CheckpointError, match="the folder .* is missing"):
        pw.save_sparse(tmp_path / "a" / "m", factory())
    with pytest.raises(pw.CheckpointError, match="meta device"):
        pw.save_sparse(tmp_path / "x", factory().to("meta"))
    with pytest.raises(pw.CheckpointError, match="a mask on '0.weight': it should build the dense one"):
        pw.load_sparse(tmp_path / "m", lambda: sparse(0.9))
    sparse_tensor = nn.Linear(4, 4)
    sparse_tensor.weight = nn.Parameter(torch.eye(4).to_sparse_csr())
    with pytest.raises(pw.CheckpointError, match="'weight' is in the layout torch.sparse_csr"):
        pw.save_sparse(tmp_path / "x", sparse_tensor)
    (tmp_path / ".weights.0123.tmp").touch()  # of a process that was killed
    pw.save_sparse(tmp_path / "m", factory())
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(pw.CheckpointError, match="lack the section"):
        pw.load_sparse(tmp_path / "plain", factory)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "plain"]


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    pw.save_sparse(tmp_path / "m", sparse(0.9))
    raw = (tmp_path / "m").read_bytes()
    for length in [*range(40), *range(40, len(raw), 97), len(raw) - 1]:
        (tmp_path / "m").write_bytes(raw[:length])
        with pytest.raises(pw.CheckpointError):
            pw.load_sparse(tmp_path / "m", factory)


def forged(folder: Path, change: Callable[[list[dict[str, object]], dict[str, Tensor]], None]) -> Path:
    """A file whose description or tensors were changed, and that safetensors itself finds whole."""
    path = folder / "m"
    pw.save_sparse(path, sparse(0.98))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["prunewise"])
    tensors = load_file(path)
    change(data["tensors"], tensors)
    save_file(tensors, path, {"format": "pt", "prunewise": json.dumps(data)})
    return path


def number_of(described: list[dict[str, object]], form: str) -> int:
    numbers = [i for i, entry in enumerate(described) if entry["form"] == form]
    return max(numbers, key=lambda i: math.prod(described[i]["shape"]))  # type: ignore[arg-type]


def _shape(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    d[number_of(d, "csr")]["shape"] = [1 << 20, 1 << 20]


def _wide(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    i = number_of(d, "csr")
    d[i]["shape"] = [d[i]["shape"][0], 1 << 38]  # type: ignore[index]


def _bits(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t[f"{number_of(d, 'bitmask')}.bits"].fill_(255)


def _offsets(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t[f"{number_of(d, 'csr')}.offsets"].fill_(1)


def _columns(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t[f"{number_of(d, 'csr')}.columns"].fill_(-1)


def _far(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t[f"{number_of(d, 'csr')}.columns"].fill_(30000)


def _twice(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t[f"{number_of(d, 'csr')}.columns"].fill_(1)


def _float_columns(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t[f"{number_of(d, 'csr')}.columns"] = t[f"{number_of(d, 'csr')}.columns"].float()


def _form(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    d[0]["form"] = "pickle"


def _names(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    d[0]["names"] = d[1]["names"]


def _extra(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t["more"] = torch.zeros(1)


def _gone(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    del t["0.values"]


def _mask_on_buffer(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    entry = next(e for e in d if e["names"] == ["1.running_mean"])
    entry["masked"] = entry["names"]


@pytest.mark.parametrize(
    "change",
    [
        _shape,
        _wide,
        _bits,
        _offsets,
        _columns,
        _far,
        _twice,
        _float_columns,
        _form,
        _names,
        _extra,
        _gone,
        _mask_on_buffer,
    ],
)
def test_forged_files_are_refused(tmp_path: Path, change: Callable[..., None]) -> None:
    path = forged(tmp_path, change)
    model = factory()
    before = state(model)
    with pytest.raises(pw.CheckpointError):
        pw.load_sparse(path, lambda: model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
