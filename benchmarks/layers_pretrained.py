"""Sparsity by layer on networks that were really pretrained: how close a sparse one stays to the dense one.

`minilm`: all-MiniLM-L6-v2 (BERT-like, 22.7 M parameters, the linear layers of its six blocks) pruned at once by Wanda and
SparseGPT; paragraphs of the Python language reference (`pydoc_data.topics`). Measured: the cosine of each embedding to the dense
one, and Spearman's rank correlation of the similarities of all pairs. Gradients, where an allocator wants them, are those of
telling which second half of a paragraph belongs to which first half.
`mobilenet_v2`: torchvision's weights for ImageNet, pruned by magnitude, on crops of real photographs. Measured: how often
the class is that of the dense network. Labels, where an allocator wants them, are the dense network's.

Calibration and test never share a paragraph or a photograph. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import pydoc_data.topics
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import records
import torch
import torch.nn.functional as F
from bench import add_run_options, fill, show_table, table
from layers import ALLOCATORS, DEFAULT, Plans
from models import MobileNetV2
from torch import Tensor, nn
from zoo_listing import define_torchvision_operators

import prunewise as pw
from prunewise.layers.allocate import allocation
from prunewise.layers.sparsify import make_permanent_
from prunewise.layers.weights import find_layers

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
KEY = ("model", "allocator", "method", "sparsity", "seed", "test")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--model", choices=BEDS, default="minilm", help="(%(default)s)")
    parser.add_argument("--allocators", type=several, default=list(ALLOCATORS), help="one or several (all)")
    parser.add_argument("--sparsities", type=several, default=[str(s) for s in SPARSITIES], help="(0.3 … 0.7)")
    parser.add_argument("--calibration", type=int, default=256, metavar="N", help="paragraphs or crops (%(default)s)")
    parser.add_argument("--test", type=int, default=512, metavar="N", help="paragraphs or crops (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of paragraphs and crops (%(default)s)")
    parser.add_argument(
        "--weights", type=Path, metavar="PATH",
        help="minilm: folder with config.json, model.safetensors, tokenizer.json; mobilenet_v2: the .pth file",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="mobilenet_v2: folder with photographs (.jpg, .png)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/layers"), help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    add_run_options(parser)
    args = parser.parse_args()
    args.sparsities = [float(s) for s in args.sparsities]
    if not args.table and (args.weights is None or (args.model == "mobilenet_v2" and args.data is None)):
        parser.error("--weights is needed, and --data for photographs")
    return args


def main() -> int:
    args = parse()
    results = args.out / "layers_pretrained.jsonl"
    if args.table:
        show_table(args, results, render)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    bed = BEDS[args.model](args)
    facts = {
        "model": args.model, "weights": sum(x.size for x in bed.layers), "calibration": args.calibration, **bed.facts,
    }  # fmt: skip

    @functools.lru_cache(1)  # cells come allocator by allocator
    def plans(allocator: str) -> Plans:
        return allocation(bed.model, bed.layers, allocator, bed.calibration, loss=bed.loss)

    def measure(cell: records.Record) -> dict[str, float]:
        model = copy.deepcopy(bed.model)
        plan = plans(cell["allocator"])(cell["sparsity"])
        pw.sparsify_(model, plan, cell["method"], data=bed.calibration, seed=args.seed, progress=False)
        make_permanent_(model)
        return bed.measure(model.eval())

    cells = (cell for allocator in args.allocators for cell in wanted(args, bed, allocator))
    return fill(results, KEY, cells, measure, facts, args.seed, args.time_limit)


def wanted(args: argparse.Namespace, bed: Any, allocator: str) -> Iterator[records.Record]:
    """The cells of one allocator."""
    for method, sparsity in itertools.product(bed.methods, args.sparsities):
        yield {
            "kind": "cell", "model": args.model, "allocator": allocator, "method": method,
            "sparsity": sparsity, "seed": args.seed, "test": args.test,
        }  # fmt: skip


class Sentences(nn.Module):
    """Token ids and a mask to embeddings of length 1: the mean over tokens, as the model is meant to be used."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shares = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * shares).sum(1) / shares.sum(1), dim=-1)


class MiniLM:
    """Embeddings of paragraphs."""

    methods = ("wanda", "sparsegpt")

    def __init__(self, args: argparse.Namespace) -> None:
        define_torchvision_operators()
        import tokenizers
        import transformers

        encoder = transformers.BertModel.from_pretrained(str(args.weights), add_pooling_layer=False)
        self.model = Sentences(encoder).eval()
        self.layers = find_layers(self.model, include="encoder.encoder.*")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(args.weights / "tokenizer.json"))
        self._tokenizer.enable_truncation(128)
        self._tokenizer.enable_padding()
        texts = paragraphs()
        random.Random(args.seed).shuffle(texts)
        if len(texts) < args.calibration + args.test:
            raise SystemExit(f"there are {len(texts)} paragraphs: ask for fewer")
        self._test = self._batches(texts[args.calibration :][: args.test])
        # Without targets: the loss takes the halves of each paragraph from the ids.
        self.calibration = self._batches(texts[: args.calibration])
        self._dense = self._embed(self.model)
        self.facts = {
            "paragraphs": len(texts), "transformers": transformers.__version__,
            "text": f"pydoc_data.topics of Python {sys.version.split()[0]}",
        }  # fmt: skip

    def _batches(self, texts: list[str]) -> list[dict[str, Tensor]]:
        texts = sorted(texts, key=len)
        batches = []
        for start in range(0, len(texts), 32):
            encoded = self._tokenizer.encode_batch(texts[start : start + 32])
            ids, mask = ([getattr(e, what) for e in encoded] for what in ("ids", "attention_mask"))
            batches.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
        return batches

    @torch.no_grad()
    def _embed(self, model: nn.Module) -> Tensor:
        return torch.cat([model(**batch) for batch in self._test])

    @staticmethod
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Which second half belongs to which first half, by cosine at the temperature the model was trained with (0.05)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        place = mask.cumsum(1)
        early = place * 2 <= mask.sum(1, keepdim=True)
        first, second = (model(ids, (mask.bool() & half).long()) for half in (early, ~early))
        return F.cross_entropy(first @ second.T / 0.05, torch.arange(len(ids)))

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = self._embed(model)
        cosine = float((found * self._dense).sum(1).mean())
        above = torch.triu_indices(len(found), len(found), 1)
        pairs = [(e @ e.T)[above[0], above[1]].double() for e in (found, self._dense)]
        ranks = torch.stack([pair.argsort().argsort().double() for pair in pairs])
        return {"score": float(torch.corrcoef(ranks)[0, 1]), "cosine": cosine}


def paragraphs() -> list[str]:
    """Prose of the Python language reference: paragraphs of at least 150 letters, most of them in words."""
    found = []
    for topic in pydoc_data.topics.topics.values():
        for block in topic.split("\n\n"):
            text = " ".join(block.split())
            if len(text) >= 150 and sum(c.isalpha() or c == " " for c in text) > 0.9 * len(text):
                found.append(text)
    return sorted(set(found))


class Photographs:
    """Classes of crops of photographs."""

    methods, loss = ("magnitude",), None

    def __init__(self, args: argparse.Namespace) -> None:
        model = MobileNetV2()
        given = torch.load(args.weights, map_location="cpu", weights_only=True)
        own = model.state_dict()  # the same modules in the same order, by other names
        if [v.shape for v in own.values()] != [v.shape for v in given.values()]:
            raise SystemExit(f"{args.weights} is not torchvision's MobileNetV2")
        model.load_state_dict(dict(zip(own, given.values(), strict=True)))
        self.model = model.eval().to(memory_format=torch.channels_last)
        self.layers = find_layers(self.model)
        files = sorted(f for f in args.data.iterdir() if f.suffix in (".jpg", ".png") and large(f))
        if len(files) < 2:
            raise SystemExit(f"{args.data}: fewer than two pictures of 224 pixels and more")
        random.Random(args.seed).shuffle(files)
        half = len(files) // 2
        self._test = crops(files[half:], args.test, args.seed)
        self._dense = self._logits(self.model, self._test)
        images = crops(files[:half], args.calibration, args.seed + 1)
        classes = [logits.argmax(1) for logits in self._logits(self.model, images)]
        self.calibration = list(zip(images, classes, strict=True))
        self.facts = {"photographs": len(files)}

    @staticmethod
    @torch.no_grad()
    def _logits(model: nn.Module, images: list[Tensor]) -> list[Tensor]:
        return [model(batch) for batch in images]

    def measure(self, model: nn.Module) -> dict[str, float]:
        found, dense = (torch.cat(x) for x in (self._logits(model, self._test), self._dense))
        same = found.argmax(1) == dense.argmax(1)
        top5 = (found.topk(5).indices == dense.argmax(1, keepdim=True)).any(1)
        return {"score": float(same.double().mean()), "top5": float(top5.double().mean())}


def large(file: Path) -> bool:
    from PIL import Image

    with Image.open(file) as picture:
        return min(picture.size) >= 224


def crops(files: list[Path], count: int, seed: int) -> list[Tensor]:
    """So many random crops of 224 pixels, a quarter of the picture or more, from each in turn; batches of 32."""
    import numpy as np
    from PIL import Image

    draw, rows = random.Random(seed), []
    pictures = [Image.open(f).convert("RGB") for f in files]
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = round(min(picture.size) * draw.uniform(0.6, 1.0))
        left, upper = (draw.randint(0, length - side) for length in picture.size)
        cut = picture.resize((224, 224), Image.Resampling.BILINEAR, (left, upper, left + side, upper + side))
        rows.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1))
    pixels = torch.stack(rows).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return list(((pixels - mean) / std).contiguous(memory_format=torch.channels_last).split(32))


BEDS: dict[str, Any] = {"minilm": MiniLM, "mobilenet_v2": Photographs}


def render(found: list[records.Record]) -> str:
    """One table a model, method and recovery: scores by sparsity, the best allocator first."""
    texts = []
    cells = [r for r in found if r["kind"] == "cell"]
    for (model, method, test), members in records.grouped(
        cells, lambda r: (r["model"], r["method"], r["test"])
    ).items():
        what = (
            "Spearman of pair similarities (mean cosine)"
            if model == "minilm"
            else "same class as dense, % (in the first five)"
        )
        texts.append(f"**{model}, {method}**: {what}, {test} {'paragraphs' if model == 'minilm' else 'crops'}")
        grid: dict[str, dict[float, tuple[float, float]]] = {}
        for r in members:
            second = r["cosine"] if model == "minilm" else r["top5"]
            grid.setdefault(r["allocator"], {})[r["sparsity"]] = (r["score"], second)
        shared = sorted(set.intersection(*(set(row) for row in grid.values())))
        rows = []
        for name, row in sorted(grid.items(), key=lambda item: -statistics.fmean(item[1][s][0] for s in shared)):
            scale, digits = (1, 3) if model == "minilm" else (100, 1)
            mean = statistics.fmean(row[s][0] for s in shared)
            cells_ = [f"{scale * row[s][0]:.{digits}f} ({scale * row[s][1]:.{digits}f})" for s in shared]
            rows.append([f"**{name}**" if name == DEFAULT else name, f"{scale * mean:.{digits}f}", *cells_])
        texts.append(table(["allocator", "mean", *(f"{s:g}" for s in shared)], rows))
    return "\n\n".join(texts) or "no results"


if __name__ == "__main__":
    sys.exit(main())
