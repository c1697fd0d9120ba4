"""Latency of several models side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def median_latency_ms(
    models: Mapping[str, nn.Module], inputs: Tensor, repeats: int = 100, warmup: int = 10
) -> dict[str, float]:
    """Median time of a forward pass of each model on the CPU, in milliseconds; lower is better.

    The models take turns, so that a change in the machine's load meets them all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for step in range(warmup + repeats):
            for name, model in models.items():
                start = time.perf_counter()
                model(inputs)
                elapsed = time.perf_counter() - start
                if step >= warmup:
                    times[name].append(1000 * elapsed)
    return {name: statistics.median(values) for name, values in times.items()}
