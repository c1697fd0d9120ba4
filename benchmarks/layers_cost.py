"""Time and memory of `allocate`: ResNet-50 with 256 images of 224 pixels, and a Llama of 7B parameters on the meta device.

Each allocator in a process of its own, for its peak of memory. ResNet-50 has random weights and images: the time does not depend on
the values. The Llama is built from its configuration by transformers and holds no weights, so only what looks at shapes runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from bench import in_child, peak_mib, table, write
from layers import ALLOCATORS
from models import MODELS
from zoo_listing import define_torchvision_operators

import prunewise as pw

FROM_SHAPES = ("uniform", "erk", "params")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allocators", default=",".join(ALLOCATORS), help="one or several (all)")
    parser.add_argument("--images", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--limit-s", type=float, default=900, help="of one allocator (%(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "ALLOCATOR"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(once(args, *args.one)))
        return 0
    rows = []
    results = {}
    for model in ("resnet50", "llama-7b"):
        for allocator in args.allocators.split(","):
            if model == "llama-7b" and allocator not in FROM_SHAPES:
                continue
            options = [f"--images={args.images}", f"--batch-size={args.batch_size}", f"--threads={args.threads}"]
            found = in_child(__file__, [*options, "--one", model, allocator], timeout=args.limit_s)
            results[f"{model} {allocator}"] = found
            cells = [found.get(k, "–") for k in ("wall_s", "processor_s", "base_mib", "peak_mib")]
            rows.append([model, allocator, *cells, found.get("error", "")])
            print(*rows[-1], file=sys.stderr, flush=True)
    head = ["model", "allocator", "seconds", "processor seconds", "MiB before", "MiB at the peak", ""]
    write("layers_cost", results, table(head, rows))
    return 0


def once(args: argparse.Namespace, model: str, allocator: str) -> dict[str, Any]:
    """One allocation, timed; building the model is not."""
    data = None
    if model == "llama-7b":
        define_torchvision_operators()
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.device("meta"):
            network: torch.nn.Module = LlamaForCausalLM(LlamaConfig())  # the default is the 7B one
    else:
        torch.manual_seed(0)
        network = MODELS[model][0]().eval()
        images = torch.randn(args.images, 3, 224, 224)
        labels = torch.randint(1000, (args.images,))
        data = list(zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True))
    base = peak_mib()
    wall, processor = time.perf_counter(), time.process_time()
    plan = pw.allocate(network, 0.7, allocator, data, progress=False)
    return {
        "wall_s": round(time.perf_counter() - wall, 1), "processor_s": round(time.process_time() - processor, 1),
        "base_mib": round(base), "peak_mib": round(peak_mib()), "layers": len(plan), "weights": sum(plan.sizes.values()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
