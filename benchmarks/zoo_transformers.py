"""The transformers architectures of the zoo: small random configurations, two layers each, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96


def _tokens(length: int = 12) -> Tensor:
    return torch.randint(5, VOCABULARY, (2, length))


def text() -> dict[str, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    return {"input_ids": _tokens(), "attention_mask": mask}


def ids() -> dict[str, Tensor]:
    return {"input_ids": _tokens()}


def pairs() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(8)}


def long_pairs() -> dict[str, Tensor]:
    """Tokens enough for all of some routed experts."""
    return {"input_ids": _tokens(96), "decoder_input_ids": _tokens(96)}


def boxes() -> dict[str, Tensor]:
    low = torch.randint(0, 400, (2, 12, 2))
    return {**text(), "bbox": torch.cat([low, low + torch.randint(1, 400, (2, 12, 2))], dim=-1)}


def images(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def captioned(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {**text(), "pixel_values": torch.randn(2, 3, size, size)}


def waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400)}


def mels() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 60), "decoder_input_ids": _tokens(6)}


@dataclass(frozen=True)
class Architecture:
    """A model class, the changes to its configuration's defaults, and its inputs.

    `parts` are configurations inside the configuration.
    """

    model: str
    inputs: Callable[[], Any]
    changes: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


_ENCODER = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
_DECODER = _ENCODER | {"num_key_value_heads": 2}
_SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
_T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "vocab_size": VOCABULARY,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "num_labels": 10,
}  # fmt: skip
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
_SPEECH = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "conv_dim": [16, 24],
    "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": 32, "mask_time_prob": 0.0, "apply_spec_augment": False,
}  # fmt: skip
_EXPERTS = _DECODER | {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1,
}  # fmt: skip
_TOWERS = {
    "text_config": {k: v for k, v in _ENCODER.items() if k != "max_position_embeddings"} | {"projection_dim": 32},
    "vision_config": _IMAGE | {"projection_dim": 32},
}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}

ARCHITECTURES: dict[str, Architecture] = {
    # text, encoders
    "bert": Architecture("BertForSequenceClassification", text, _ENCODER),
    "roberta": Architecture("RobertaForMaskedLM", text, _ENCODER),
    "deberta_v2": Architecture(
        "DebertaV2Model",
        text,
        _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "deberta": Architecture(
        "DebertaModel", text, _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "albert": Architecture("AlbertModel", text, _ENCODER | {"embedding_size": 32}),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        text,
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": VOCABULARY},
    ),
    "electra": Architecture("ElectraForTokenClassification", text, _ENCODER | {"embedding_size": 32}),
    "mpnet": Architecture("MPNetModel", text, _ENCODER),
    "mobilebert": Architecture(
        "MobileBertModel", text, _ENCODER | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}
    ),
    "squeezebert": Architecture("SqueezeBertModel", text, _ENCODER | {"embedding_size": 64}),
    "roformer": Architecture("RoFormerModel", text, _ENCODER),
    "modernbert": Architecture("ModernBertForMaskedLM", text, _ENCODER | {"pad_token_id": 0}),
    "fnet": Architecture("FNetModel", ids, _ENCODER),
    "funnel": Architecture(
        "FunnelModel",
        text,
        {
            "block_sizes": [1, 1],
            "d_model": 64,
            "n_head": 4,
            "d_head": 16,
            "d_inner": 96,
            "vocab_size": VOCABULARY,
            "num_decoder_layers": 1,
        },
    ),
    "convbert": Architecture("ConvBertModel", text, _ENCODER | {"embedding_size": 32}),
    "xlnet": Architecture(
        "XLNetModel", text, {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": VOCABULARY}
    ),
    "layoutlm": Architecture("LayoutLMModel", boxes, _ENCODER | {"max_2d_position_embeddings": 1024}),
    # text, decoders
    "gpt2": Architecture(
        "GPT2LMHeadModel", ids, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    ),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        ids,
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "window_size": 4,
        },
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", ids, _ENCODER),
    "gptj": Architecture(
        "GPTJForCausalLM",
        ids,
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "vocab_size": VOCABULARY},
    ),
    "opt": Architecture("OPTForCausalLM", text, _ENCODER | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": Architecture(
        "BloomForCausalLM", text, {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    ),
    "falcon": Architecture("FalconForCausalLM", ids, _ENCODER | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "llama": Architecture("LlamaForCausalLM", ids, _DECODER),
    "mistral": Architecture("MistralForCausalLM", ids, _DECODER | {"head_dim": 16}),
    "qwen2": Architecture("Qwen2ForCausalLM", ids, _DECODER),
    "qwen3": Architecture("Qwen3ForCausalLM", ids, _DECODER | {"head_dim": 16}),
    "gemma": Architecture("GemmaForCausalLM", ids, _DECODER | {"head_dim": 16}),
    "gemma2": Architecture("Gemma2ForCausalLM", ids, _DECODER | {"head_dim": 16, "sliding_window": 8}),
    "gemma3": Architecture("Gemma3ForCausalLM", ids, _DECODER | {"head_dim": 16, "sliding_window": 8}),
    "phi": Architecture("PhiForCausalLM", ids, _DECODER),
    "phi3": Architecture("Phi3ForCausalLM", ids, _DECODER | {"pad_token_id": 0}),
    "olmo2": Architecture("Olmo2ForCausalLM", ids, _DECODER),
    "stablelm": Architecture("StableLmForCausalLM", ids, _DECODER),
    "starcoder2": Architecture("Starcoder2ForCausalLM", ids, _DECODER),
    "cohere": Architecture("CohereForCausalLM", ids, _DECODER),
    "granite": Architecture("GraniteForCausalLM", ids, _DECODER),
    "mixtral": Architecture("MixtralForCausalLM", ids, _EXPERTS),
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", ids, _EXPERTS),
    "mamba": Architecture(
        "MambaForCausalLM",
        ids,
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": VOCABULARY, "use_mambapy": False},
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        ids,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "vocab_size": VOCABULARY,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        ids,
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "vocab_size": VOCABULARY},
    ),
    "xglm": Architecture(
        "XGLMForCausalLM",
        text,
        {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "vocab_size": VOCABULARY},
    ),
    # text to text
    "t5": Architecture("T5ForConditionalGeneration", pairs, _T5),
    "mt5": Architecture("MT5ForConditionalGeneration", pairs, _T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": Architecture("BartForConditionalGeneration", pairs, _SEQ2SEQ),
    "marian": Architecture("MarianMTModel", pairs, _SEQ2SEQ | {"pad_token_id": 1, "decoder_start_token_id": 1}),
    "pegasus": Architecture("PegasusForConditionalGeneration", pairs, _SEQ2SEQ),
    "m2m_100": Architecture("M2M100ForConditionalGeneration", pairs, _SEQ2SEQ),
    "switch_transformers": Architecture(
        "SwitchTransformersForConditionalGeneration",
        long_pairs,
        _T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    # images
    "vit": Architecture("ViTForImageClassification", images(), _IMAGE),
    "deit": Architecture("DeiTForImageClassification", images(), _IMAGE),
    "beit": Architecture("BeitForImageClassification", images(), _IMAGE | {"use_relative_position_bias": True}),
    "dinov2": Architecture("Dinov2ForImageClassification", images(), _IMAGE | {"mlp_ratio": 2}),
    "swin": Architecture("SwinForImageClassification", images(), _SWIN),
    "swinv2": Architecture("Swinv2ForImageClassification", images(), _SWIN),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        images(),
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification", images(), {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}
    ),
    "poolformer": Architecture(
        "PoolFormerForImageClassification",
        images(),
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
    ),
    "resnet": Architecture("ResNetForImageClassification", images(), _RESNET),
    "levit": Architecture(
        "LevitForImageClassification",
        images(64),
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
        },
    ),
    "yolos": Architecture(
        "YolosForObjectDetection", images(), _IMAGE | {"image_size": [32, 32], "num_detection_tokens": 5}
    ),
    "detr": Architecture(
        "DetrForObjectDetection",
        images(64),
        {
            **{k: v for k, v in _SEQ2SEQ.items() if k not in ("vocab_size", "max_position_embeddings")},
            "num_queries": 5,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
        },
        {"backbone_config": {"model_type": "resnet", **_RESNET, "out_features": ["stage2"]}},
    ),
    "perceiver": Architecture(
        "PerceiverForMaskedLM",
        text,
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 48,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 32,
            "v_channels": 32,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 12,
        },
    ),
    # images and text
    "clip": Architecture("CLIPModel", captioned(), {"projection_dim": 32}, _TOWERS),
    "siglip": Architecture("SiglipModel", captioned(), {}, _TOWERS),
    "vilt": Architecture("ViltModel", captioned(), _ENCODER | {"image_size": 32, "patch_size": 8}),
    # sound
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        mels,
        {k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"}
        | {
            "num_mel_bins": 16,
            "max_source_positions": 30,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", waves, _SPEECH),
    "hubert": Architecture("HubertForCTC", waves, _SPEECH),
    "audio_spectrogram_transformer": Architecture(
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(2, 24, 16)},
        {k: v for k, v in _IMAGE.items() if k != "image_size"}
        | {"max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    ),
}


def build(name: str) -> nn.Module:
    """The model, without dropout: it draws other numbers for fewer channels."""
    import transformers

    architecture = ARCHITECTURES[name]
    cls = getattr(transformers, architecture.model)
    config = cls.config_class(**architecture.changes, **architecture.parts)
    for part in (config, *(getattr(config, key) for key in architecture.parts)):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return cls(config)  # type: ignore[no-any-return]
