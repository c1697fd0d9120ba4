"""Small hand-written architectures on which 'gated model = physically pruned model' is tested."""

from __future__ import annotations

import importlib
from pathlib import Path

from .registry import ZOO, ZooEntry, build, call, cast, flat_tensors, image, randomize_, register

__all__ = ["ZOO", "ZooEntry", "build", "call", "cast", "flat_tensors", "image", "randomize_", "register"]

for _family in ("cnn", "cnn_more", "cnn_forms", "cnn_graph", "transformers", "generative", "forms"):
    if (Path(__file__).parent / f"{_family}.py").exists():
        importlib.import_module(f"{__name__}.{_family}")
