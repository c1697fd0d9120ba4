"""Labelled images for the benchmarks of samples: digits, Fashion-MNIST and CIFAR-10, with true, flipped or human labels."""

from __future__ import annotations

import gzip
import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
HUMAN = {"aggregate": "aggre_label", "worst": "worse_label", "random1": "random_label1"}  # CIFAR-10N's names
TASKS = ("digits", "fashion", "cifar10")


@dataclass(frozen=True)
class Task:
    """Images as normalised floats (N, ...), true labels (N,), and the same for the test; `augment`: crops and flips."""

    name: str
    images: Tensor
    labels: np.ndarray
    test_images: Tensor
    test_labels: np.ndarray
    augment: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Task:
        """The same with its images on a device; they are trained on there."""
        return replace(self, images=self.images.to(device), test_images=self.test_images.to(device))


def load_task(name: str, data: Path | None = None, subset: int | None = None, test_subset: int | None = None) -> Task:
    """The task; of the training images the first `subset`.

    Args:
        name: digits (scikit-learn's; 1,347 to train, 450 to test, split with a fixed seed), fashion, cifar10.
        data: fashion: the folder with the four idx.gz files; cifar10: that with the binary version's files.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = torch.as_tensor((pixels / 16).astype(np.float32))[order], labels[order].astype(np.int64)
        parts = images[:-450], labels[:-450], images[-450:], labels[-450:]
    elif data is None:
        raise SystemExit(f"--data is needed for {name}")
    elif name == "fashion":
        parts = (*_idx(data, "train"), *_idx(data, "t10k"))
    else:
        from data import MEAN, STD, Cifar10

        folder = Cifar10(data, torch.device("cpu"))
        parts = ()
        for files in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
            pixels, truth = folder._read(tuple(files))
            limit = subset if not parts else test_subset
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
            parts = (*parts, (pixels[:limit] / 255 - mean) / std, truth[:limit].numpy())
    images, labels, test_images, test_labels = parts
    return Task(
        name,
        images[:subset],
        labels[:subset],
        test_images[:test_subset],
        test_labels[:test_subset],
        name == "cifar10",
    )


def flipped(labels: np.ndarray, share: float, kind: str, seed: int) -> np.ndarray:
    """The labels with `share` of them wrong: any other class (symmetric), or c to c + 1 (asymmetric)."""
    random = np.random.default_rng(seed + 1000)
    wrong = random.permutation(len(labels))[: round(share * len(labels))]
    step = random.integers(1, CLASSES, len(wrong)) if kind == "symmetric" else 1
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + step) % CLASSES
    return noisy


def human_labels(path: Path, kind: str, clean: np.ndarray) -> np.ndarray:
    """CIFAR-10N's labels, `aggregate` or `worst` (Wei et al. 2022), from CIFAR-10_human.pt or a zip that holds it.

    Raises:
        SystemExit: its clean labels are not those of the images.
    """
    raw = path.read_bytes()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            raw = archive.read(next(n for n in archive.namelist() if n.endswith("/CIFAR-10_human.pt")))
    found: dict[str, Any] = {}
    with torch.serialization.safe_globals(_numpy_types()):
        found = torch.load(io.BytesIO(raw), weights_only=True)
    if not np.array_equal(np.asarray(found["clean_label"])[: len(clean)], clean):
        raise SystemExit(f"{path}: its clean labels are not those of the images, which must be in the official order")
    return np.asarray(found[HUMAN[kind]])[: len(clean)].astype(np.int64)


def _numpy_types() -> list[Any]:
    from numpy._core.multiarray import _reconstruct, scalar

    old = [(_reconstruct, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar")]
    return [np.ndarray, np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.float64)), *old, _reconstruct, scalar]


def _idx(folder: Path, part: str) -> tuple[Tensor, np.ndarray]:
    """Images and labels in the format of MNIST's files; mean and deviation are those of Fashion-MNIST's training set."""
    pixels = np.frombuffer(_unpacked(folder / f"{part}-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(_unpacked(folder / f"{part}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    images = (torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, 28, 28) / 255 - 0.2860) / 0.3530
    return images, labels.astype(np.int64)


def _unpacked(path: Path) -> bytes:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: --data names the folder with Fashion-MNIST's four idx.gz files")
    return gzip.decompress(path.read_bytes())
