"""CIFAR-10 and Fashion-MNIST from a folder with their official files, kept in memory (or on the GPU) and augmented there."""

from __future__ import annotations

import gzip
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # the statistics that the given weights were trained with
STD = (0.229, 0.224, 0.225)
FASHION_MEAN, FASHION_STD = (0.286,), (0.353,)  # of Fashion-MNIST's training set
HELD_OUT = 5_000  # the last images of the training set, for choices that must not see the test set

_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
_ROW = 1 + 3 * 32 * 32  # a label byte, then red, green, blue
_PAD = 4
_SIDE = 32


class Images:
    """uint8 images (N, C, 32, 32) and int64 labels (N,) on one device, drawn as normalised float batches."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        device: torch.device,
        channels_last: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.labels = labels.to(device)
        self.device = device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        middle, spread = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        self._scale = (1 / (255 * spread)).to(device)
        self._shift = (middle / spread).to(device)
        # Padded with the mean colour (zero once normalised); channels last, so that one gather cuts a crop.
        side = _SIDE + 2 * _PAD
        colour = (middle * 255).round().to(torch.uint8)
        padded = colour.expand(len(pixels), -1, side, side).contiguous()
        padded[:, :, _PAD:-_PAD, _PAD:-_PAD] = pixels
        self._padded = padded.permute(0, 2, 3, 1).contiguous().to(device)
        self._line = torch.arange(_SIDE, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def _normalised(self, pixels: Tensor) -> Tensor:
        floats = pixels.permute(0, 3, 1, 2).float() * self._scale - self._shift
        return floats.contiguous(memory_format=self.format)

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are."""
        for start in range(0, len(self), batch_size):
            pixels = self._padded[start : start + batch_size, _PAD:-_PAD, _PAD:-_PAD]
            yield self._normalised(pixels), self.labels[start : start + batch_size]

    def augmented(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order with random crops (4 pixels of padding) and flips; whole batches only.

        The draw depends on `seed` and `epoch` alone: every method sees the same batches, and a resumed run those of an
        undisturbed one.
        """
        n = len(self)
        draw = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(n, generator=draw).to(self.device)
        corner = torch.randint(0, 2 * _PAD + 1, (n, 2), generator=draw).to(self.device)
        flip = (torch.rand(n, generator=draw) < 0.5).to(self.device)
        for start in range(0, n - batch_size + 1, batch_size):
            cut = slice(start, start + batch_size)
            index = order[cut]
            rows = corner[cut, :1] + self._line
            columns = corner[cut, 1:] + self._line
            columns = torch.where(flip[cut, None], columns.flip(1), columns)
            pixels = self._padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self._normalised(pixels), self.labels[index]


class DataSet(ABC):
    """Training and test images of one data set; `channels` of an image."""

    channels: int

    def __init__(self, device: torch.device, channels_last: bool = False) -> None:
        self.device, self.channels_last = device, channels_last

    def train(self, *, hold_out: bool = False, subset: int | None = None) -> Images:
        """The training images in the official order; without the last 5,000 where `hold_out`; the first `subset` of them."""
        pixels, labels = self._training()
        end = len(labels) - (HELD_OUT if hold_out else 0)
        return self._images(pixels[:end][:subset], labels[:end][:subset])

    def held_out(self, subset: int | None = None) -> Images:
        """The last 5,000 training images."""
        pixels, labels = self._training()
        return self._images(pixels[-HELD_OUT:][:subset], labels[-HELD_OUT:][:subset])

    def test(self, subset: int | None = None) -> Images:
        """The test images."""
        pixels, labels = self._test()
        return self._images(pixels[:subset], labels[:subset])

    @abstractmethod
    def _training(self) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _test(self) -> tuple[Tensor, Tensor]: ...

    def _images(self, pixels: Tensor, labels: Tensor) -> Images:
        return Images(pixels, labels, self.device, self.channels_last)


class Cifar10(DataSet):
    """The folder's images. `folder` holds data_batch_1.bin … test_batch.bin, or a folder `cifar-10-batches-bin` that does."""

    channels = 3

    def __init__(self, folder: Path, device: torch.device, channels_last: bool = False) -> None:
        super().__init__(device, channels_last)
        inner = folder / "cifar-10-batches-bin"
        self.folder = inner if inner.is_dir() else folder
        missing = [n for n in (*_BATCHES, "test_batch") if not (self.folder / f"{n}.bin").is_file()]
        if missing:
            raise SystemExit(
                f"{folder}: no {missing[0]}.bin; wanted is CIFAR-10's binary version (cifar-10-binary.tar.gz)"
            )

    def _training(self) -> tuple[Tensor, Tensor]:
        return self._read(_BATCHES)

    def _test(self) -> tuple[Tensor, Tensor]:
        return self._read(("test_batch",))

    def _read(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        rows = []
        for name in names:
            raw = bytearray((self.folder / f"{name}.bin").read_bytes())
            if len(raw) != 10_000 * _ROW:
                raise SystemExit(f"{name}.bin: {len(raw):,} bytes, expected {10_000 * _ROW:,}")
            rows.append(torch.frombuffer(raw, dtype=torch.uint8).view(-1, _ROW))
        whole = torch.cat(rows)
        return whole[:, 1:].reshape(-1, 3, 32, 32), whole[:, 0].long()


class FashionMnist(DataSet):
    """The folder's images (train-images-idx3-ubyte.gz …), 28 × 28, with two pixels of their black background around them."""

    channels = 1

    def __init__(self, folder: Path, device: torch.device, channels_last: bool = False) -> None:
        super().__init__(device, channels_last)
        self.folder = folder
        if not (folder / "train-images-idx3-ubyte.gz").is_file():
            raise SystemExit(f"{folder}: no train-images-idx3-ubyte.gz; wanted are Fashion-MNIST's four .gz files")

    def _training(self) -> tuple[Tensor, Tensor]:
        return self._read("train", 60_000)

    def _test(self) -> tuple[Tensor, Tensor]:
        return self._read("t10k", 10_000)

    def _images(self, pixels: Tensor, labels: Tensor) -> Images:
        return Images(pixels, labels, self.device, self.channels_last, FASHION_MEAN, FASHION_STD)

    def _read(self, part: str, count: int) -> tuple[Tensor, Tensor]:
        raw = bytearray(gzip.decompress((self.folder / f"{part}-images-idx3-ubyte.gz").read_bytes()))
        classes = bytearray(gzip.decompress((self.folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()))
        if len(raw) != 16 + 28 * 28 * count or len(classes) != 8 + count:
            raise SystemExit(f"{part}-images-idx3-ubyte.gz: not Fashion-MNIST's {count:,} images of 28 × 28")
        pixels = torch.frombuffer(raw, dtype=torch.uint8, offset=16).view(count, 1, 28, 28)
        labels = torch.frombuffer(classes, dtype=torch.uint8, offset=8).long()
        edge = (_SIDE - 28) // 2
        return torch.nn.functional.pad(pixels, (edge, edge, edge, edge)), labels


DATA_SETS = {"cifar10": Cifar10, "fashion_mnist": FashionMnist}
