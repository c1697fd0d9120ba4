"""Files that can be trusted to be whole: atomic writes, strict JSON, safetensors read against what is expected.

Nothing read here is believed before it is checked, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parameter import is_lazy

from prunewise.core.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 64 << 20
_CHUNK = 8 << 20
_STALE_SECONDS = 3600

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_SUPPORTED = frozenset(DTYPES.values())


# -- writing ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place, whole and on disk, when the block ends without an error."""
    _sweep(path.parent, f".{glob.escape(path.name)}.*.tmp")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` at one stroke: a reader finds the old file or the new one."""
    text = json.dumps(data, indent=1, allow_nan=False)
    if len(text.encode()) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} would be larger than {MAX_JSON_BYTES >> 20} MiB, more than is read again")
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def stage_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    name: Callable[[str], str],
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, str]:
    """Write `tensors` as a safetensors file whose name, `name(hash)`, is its own until somebody renames it.

    Returns:
        The file's path, and the SHA-256 of its content (64 hexadecimal digits).
    """
    for key, tensor in tensors.items():
        require_plain(key, tensor)
    plain = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    _sweep(directory, ".weights.*.tmp")
    # A folder of its own, because safetensors may make temporary files beside the one it writes.
    stage = directory / f".weights.{secrets.token_hex(6)}.tmp"
    stage.mkdir()
    temporary = stage / "weights"
    try:
        # contiguous() gives back views of larger storages as they are, which safetensors refuses
        whole = {k: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for k, t in plain.items()}
        save_file(_separate(whole), str(temporary), metadata={"format": "pt", **(metadata or {})})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = directory / name(digest)
        os.replace(temporary, path)
        _sync_directory(directory)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return path, digest


def require_plain(name: str, tensor: Tensor) -> None:
    """Raise where a tensor is of a kind that a safetensors file cannot hold."""
    if is_lazy(tensor):
        problem = "has no values yet: run the model once"
    elif tensor.is_meta:
        problem = "is on the meta device: load its values"
    elif tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):  # the latter is made of other tensors
        problem = f"is a {type(tensor).__name__} ({tensor.layout}), which cannot be saved: make it plain and dense"
    elif tensor.dtype not in _SUPPORTED:
        problem = f"is {tensor.dtype}, which cannot be saved: convert it to a plain dtype"
    else:
        return
    raise CheckpointError(f"tensor {name!r} {problem} first")


def _sweep(directory: Path, pattern: str) -> None:
    """Remove what a killed process left: all that is old, as other processes and threads may be writing beside this one."""
    for path in directory.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # somebody else removed it
            if time.time() - path.lstat().st_mtime < _STALE_SECONDS:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, no two in one storage."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return result


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot open a directory
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- reading ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; no symbolic link, pipe or device."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link, which is not followed: put the file itself there")
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: name the path that was given when it was saved") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{path} is not a regular file")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file: of bounded size, no key twice, no NaN, no nesting beyond reason."""
    with opened(path) as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, which no plan is")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `raw`; `what` names it in the error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise ValueError(f"the key {twice[:80]!r} stands there twice")
        return made

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise CheckpointError(f"{what}: nested too deep") from None
    except ValueError as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise CheckpointError(f"{what} is damaged (no valid JSON): {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{what}: expected a JSON object, found a {type(data).__name__}")
    return data


@dataclass(frozen=True)
class Entry:
    """What the header of a safetensors file says of one tensor; `size_bytes` agrees with dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class TensorFile:
    """A safetensors file whose header was read and found sound: sizes, offsets and the file's length agree.

    `read` gives the tensors; memory is taken for no more than the file holds. `metadata` are strings, not checked further.
    """

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file, self._what = file, what
        self._digest = hashlib.sha256()
        length = os.fstat(file.fileno()).st_size
        prefix = self._take(8)
        size = int.from_bytes(prefix, "little")
        if size > min(_MAX_HEADER_BYTES, length - 8):
            raise self._error(f"its header claims {size:,} bytes of a file of {length:,}")
        raw = self._take(size)
        self.entries = self._checked(parse_json(raw, f"{what}, header"), length - 8 - size)

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._what} is damaged: {problem}. Save the model again, or copy the files again")

    def _take(self, size: int) -> bytes:
        raw = self._file.read(size)
        if len(raw) != size:
            raise self._error("it ends too early")
        self._digest.update(raw)
        return raw

    def _checked(self, header: dict[str, Any], length: int) -> dict[str, Entry]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._error("its metadata are no JSON object of strings")
        self.metadata: dict[str, str] = metadata
        entries = {}
        for name, value in header.items():
            match value:
                case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if len(value) == 3:
                    pass
                case _:
                    raise self._error(f"tensor {name[:80]!r} lacks a dtype, a shape or data offsets")
            if dtype not in DTYPES:
                raise self._error(f"tensor {name[:80]!r} has an unknown dtype {dtype[:20]!r}")
            if len(shape) > 64 or not all(type(s) is int and 0 <= s < 1 << 62 for s in shape):
                raise self._error(f"tensor {name[:80]!r} has the shape {str(shape)[:80]}")
            if not (type(start) is int and type(end) is int and 0 <= start <= end <= length):
                raise self._error(f"tensor {name[:80]!r} lies outside the file")
            if math.prod(shape) * DTYPES[dtype].itemsize != end - start:
                raise self._error(f"tensor {name[:80]!r}: shape {str(shape)[:80]} does not take {end - start:,} bytes")
            entries[name] = Entry(DTYPES[dtype], tuple(shape), start, end - start)
        at = 0
        for name, entry in sorted(entries.items(), key=lambda e: (e[1].start, e[1].size_bytes)):
            if entry.start != at:
                raise self._error(f"tensor {name[:80]!r} overlaps another one, or leaves a hole before it")
            at += entry.size_bytes
        if at != length:
            raise self._error(f"{length - at:,} bytes belong to no tensor")
        return entries

    def read(self, sha256: str | None) -> dict[str, Tensor]:
        """All tensors, on the CPU, contiguous.

        Raises:
            CheckpointError: the whole file's hash is not `sha256` (where one is given), or a truth value is neither 0 nor 1.
        """
        tensors = {}
        for name, entry in sorted(self.entries.items(), key=lambda e: (e[1].start, e[1].size_bytes)):
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            if entry.size_bytes:
                raw = tensor.view(-1).view(torch.uint8)
                buffer = memoryview(raw.numpy().data).cast("B")
                for at in range(0, entry.size_bytes, _CHUNK):
                    part = buffer[at : at + _CHUNK]
                    filled = 0
                    while filled < len(part):
                        got = self._file.readinto(part[filled:])  # type: ignore[attr-defined]
                        if not got:
                            raise self._error("it ends too early")
                        filled += got
                    self._digest.update(part)
                if entry.dtype == torch.bool and int(raw.max()) > 1:
                    raise self._error(f"tensor {name[:80]!r} holds truth values other than 0 and 1")
            tensors[name] = tensor
        if self._file.read(1) or sha256 not in (None, self._digest.hexdigest()):
            raise CheckpointError(
                f"{self._what} is not the file that was saved (its SHA-256 differs from the one recorded): it was changed, "
                "or mixed up with another one. Save the model again, or copy both files again"
            )
        return tensors


def is_sha256(value: Any) -> bool:
    """True for 64 lower-case hexadecimal digits, and nothing that could be a path."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
