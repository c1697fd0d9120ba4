"""Files of sparse models that are damaged, or made to harm: an error of the library, and nothing filled in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import prunewise as pw
from tests.files.test_sparse import factory, sparse, state


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


def _float_bits(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    i = number_of(d, "bitmask")
    t[f"{i}.bits"] = t[f"{i}.bits"].float()


def _offsets(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    t[f"{number_of(d, 'csr')}.offsets"].fill_(1)


def _offsets_that_wrap(d: list[dict[str, object]], t: dict[str, Tensor]) -> None:
    """Their differences, modulo 2^64, are all positive, and add up to the number of values."""
    i = number_of(d, "csr")
    offsets = torch.full(t[f"{i}.offsets"].shape, len(t[f"{i}.values"]))
    offsets[:3] = torch.tensor([0, 2**63 - 1, -2])
    t[f"{i}.offsets"] = offsets


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
        _float_bits,
        _offsets,
        _offsets_that_wrap,
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
