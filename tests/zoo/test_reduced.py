"""The nastiest of the hand-written models through every stage that benchmarks/zoo.py asks of the whole zoo."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from zoo_models import Entry
from zoo_stages import STAGES, examine

from tests.zoo import ZOO

NASTIEST = [
    "c2f_split",  # a list of chunks that grows
    "cbam",  # a mean over channels
    "channel_buffer",
    "depthwise_multiplier",
    "einsum_attention",  # raw parameters meet activations in einsum
    "encoder_layer",  # nn.MultiheadAttention and its fast path
    "frozen_backbone",
    "gpt2",  # tied embeddings, heads from a fused projection
    "gru_classifier",
    "llama_gqa_interleave",  # grouped-query attention, rotary positions
    "lstm_classifier",
    "moe",
    "pixel_shuffle",
    "resnet_a",  # shortcuts padded with zeros
    "shufflenet_v1",  # grouped convolutions and a shuffle
    "shufflenet_v2",  # split, concatenation and a shuffle
    "swin",  # windows rolled and merged
    "t5_encoder",  # relative positions that all layers share
    "vit_timm",  # widths written into reshape
    "weight_norm",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NASTIEST)
def test_every_stage_is_right(name: str) -> None:
    model = ZOO[name]
    found: dict[str, dict[str, Any]] = {}
    entry = Entry("ours", "hand-written", name, "smallest", model.factory, model.example_inputs)
    examine(entry, argparse.Namespace(seed=0, skip=""), found.__setitem__)
    assert {stage: facts for stage, facts in found.items() if not facts.get("right")} == {}
    assert list(found) == list(STAGES)
