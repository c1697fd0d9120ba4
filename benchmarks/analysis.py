"""Time and memory of analysing a network: what a user waits for before anything is pruned.

Each row is a process of its own (peak resident memory, torch's import included and shown apart). `groups` is
`channel_groups`, `measure` is `measure`, `attach` is `attach_gates`; each the first call in its process. Peers:
Torch-Pruning building its dependency graph (and all its groups), on the networks that it can do.

Prediction, written before the first run: ResNet-50 0.5 s and ViT-B 1 s when the machine is free (a rehearsal on a
busy one gave 0.55 and 1.0 s for the cost model), the first call 1 to 2 s more for what torch imports lazily; Llama
70B: 80 layers of some 60 operations, labels of 28,672 x 80 hidden units and a vocabulary: 10 to 30 s, 1.5 GB. Torch-
Pruning: 1 s for ResNet-50, slower than ours for ViT-B. Goals: under 2 s for ResNet-50 and ViT-B; under 60 s and 4 GB
for the 70B Llama.

    PYTHONPATH=/path/with/transformers python benchmarks/analysis.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import in_child, peak_mib, table, write
from torch import nn


def llama(layers: int = 80) -> tuple[nn.Module, Any]:
    """The configuration of Llama 3 70B, without memory for its weights."""
    _without_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, 128, dtype=torch.int64)
    return model, {"input_ids": ids}


def _without_torchvision() -> None:
    # A torchvision without its compiled part breaks the import of transformers; these operators are all it misses.
    try:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_library"] = library
    except RuntimeError:
        pass


def network(name: str) -> tuple[nn.Module, Any]:
    if name.startswith("llama"):
        return llama(int(name.partition("-")[2] or 80))
    from models import build, example

    return build(name), example(name)


def one(name: str, task: str) -> dict[str, Any]:
    """Run one task in this process."""
    model, inputs = network(name)
    import prunewise as pw
    from prunewise.core import cost, groups  # noqa: F401  (their import is no part of the analysis)

    def peer() -> dict[str, Any]:
        import torch_pruning as tp

        args = {"example_inputs": inputs} if not isinstance(inputs, dict) else {"example_inputs": inputs["input_ids"]}
        graph = tp.DependencyGraph().build_dependency(model, **args)
        return {"groups": len(list(graph.get_all_groups()))}

    def attach() -> dict[str, Any]:
        session = pw.attach_gates(model, inputs, budget=pw.Budget(macs=0.5), total_steps=100)
        return {"groups": len(session.groups)}

    def find() -> dict[str, Any]:
        found = pw.channel_groups(model, inputs)
        return {"groups": len(found), "prunable": sum(g.prunable for g in found)}

    def measure() -> dict[str, Any]:
        return {"macs": pw.measure(model, inputs).macs}

    if task == "Torch-Pruning":
        import torch_pruning  # noqa: F401
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "groups": find, "measure": measure, "attach": attach, "Torch-Pruning": peer,
    }  # fmt: skip
    before = peak_mib()
    start, cpu = time.perf_counter(), time.process_time()
    found = tasks[task]()
    out = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "peak_mib": peak_mib(),
           "before_mib": before, **found}  # fmt: skip
    if task != "attach" and out["seconds"] < 20:
        start, cpu = time.perf_counter(), time.process_time()
        tasks[task]()
        out.update(again_seconds=time.perf_counter() - start, again_cpu_seconds=time.process_time() - cpu)
    return out


def report(name_of_file: str, results: dict[str, dict[str, Any]]) -> None:
    rows = []
    for key, r in results.items():
        name, _, task = key.partition(": ")
        if "error" in r:
            rows.append([name, task, "failed", r["error"][:120], "", "", ""])
            continue
        again = f"{r['again_cpu_seconds']:.2f}" if "again_cpu_seconds" in r else ""
        rows.append([name, task, f"{r['seconds']:.2f}", f"{r['cpu_seconds']:.2f}", again, f"{r['peak_mib']:.0f}",
                     f"{r['peak_mib'] - r['before_mib']:.0f}"])  # fmt: skip
    head = ["network", "task", "wall, s", "processor, s", "second call, processor, s", "peak, MiB", "of that, analysis"]
    title = "Analysis of a network, first call in its process (goals: < 2 s; Llama 70B on the meta device < 60 s, < 4 GB)\n\n"
    write(name_of_file, results, title + table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "vit_b16", "llama-80"])
    parser.add_argument("--tasks", nargs="+", default=["groups", "measure", "attach", "Torch-Pruning"])
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "TASK"), help="run one task in this process, print JSON")
    parser.add_argument("--timeout", type=float, default=150)
    parser.add_argument("--name", default="analysis")
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        print(json.dumps(one(*args.one)))
        return
    results: dict[str, dict[str, Any]] = {}
    for name in args.networks:
        for task in args.tasks:
            key = f"{name}: {task}"
            results[key] = in_child(str(Path(__file__)), ["--one", name, task], timeout=args.timeout)
            report(args.name, results)  # after each, so that an interrupted run leaves what it has


if __name__ == "__main__":
    main()
