"""Tiny random models of every causal model type in transformers: usual sizes made small, special cases in one table."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from blockspin.model.loading import auto_class

VOCABULARY = 64
DEPTH = 6
MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
COMPOSITE_TYPES = sorted(
    {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES} - set(MODEL_TYPES)
)

# Values for every configuration, nested ones too, that has a field of this name.
_DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_blocks",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_hidden_blocks",
)
_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "attention_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "num_decoder_attention_heads",
    "num_encoder_attention_heads",
    "swa_num_attention_heads",
    "linear_num_value_heads",
    "linear_num_heads",
    "index_n_heads",
    "num_query_groups",
)
_WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "embedding_size",
    "emb_dim",
    "word_embed_proj_dim",
    "attention_hidden_size",
    "embedding_dim",
    "lru_width",
    "input_embedding_size",
    "output_embedding_size",
)
_INNER = (
    "intermediate_size",
    "ffn_dim",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "dff",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "dim_ff",
    "d_inner",
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
    "feed_forward_size",
    "router_hidden_size",
)
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(_DEPTHS, DEPTH),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "linear_head_dim", "linear_key_head_dim", "d_head"), 8),
    **dict.fromkeys(
        (
            "linear_value_head_dim",
            "attention_head_dim",
            "kv_channels",
            "index_head_dim",
            "dim_head",
            "qk_rope_head_dim",
        ),
        8,
    ),
    **dict.fromkeys(("qk_nope_head_dim", "rotary_dim", "attention_head_size"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("depth", "resampler_depth"), DEPTH),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "adapter_in_dim", "adapter_out_dim", "output_dim"), 32),
    "hidden_size_global": 32,
    **dict.fromkeys(("embed_dim", "encoder_hidden_size", "vision_hidden_size", "audio_hidden_size"), 32),
    **dict.fromkeys(("downsample_hidden_size", "latent_channels", "base_channels", "output_channels"), 32),
    **dict.fromkeys(("adapter_input_size", "hidden_dim", "image_token_embed_dim", "projection_hidden_dim"), 32),
    **dict.fromkeys(("projector_hidden_size", "projection_intermediate_size", "alignment_intermediate_size"), 48),
    **dict.fromkeys(("num_embeddings", "codebook_vocab_size", "mel_vocab_size"), VOCABULARY),
    "fullatt_block_indexes": [1, 4],
    "deepstack_visual_indexes": [1, 3],
    "image_size": 28,
    "patch_size": 14,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "time_step_rank": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "index_topk": 64,  # the choice of a few tokens flips where scores are nearly equal
}

# What single model types need besides.
_COMPASS = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
_HYBRID = ["linear_attention", "full_attention"] * 3
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_NEMOTRON = {"layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe", "mlp"]}
_QWEN4 = {
    **_INDEXER,
    **{"indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8, "head_dim": 8},
    **{"ple_layer_ids": [2, 5], "ple_embed_dim": 32, "heads_per_ngram": 2},
    **{"ngram_vocab_size_base": 40, "make_ngram_vocab_size_divisible_by": 8},
}
_DOTS3 = {"num_key_value_heads": 4}


_SPEECH = {"num_filters": 4, "depths": [1] * 7}


def _sections(*sizes: int) -> dict[str, Any]:
    """Rotary dimensions shared out among time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes)}
    return {"text_config": {"rope_parameters": rope}}


_SHARED_KV = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 2}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": _sections(1, 1, 2),
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense"] + ["sparse"] * 5}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2}},
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"mlp_layer_types": ["dense"] * 6}},
    "dots3_note_text": _DOTS3,
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 48]} | _sections(1, 1, 2)["text_config"]},
    "florence2": {"vision_config": {"patch_size": [7, 3, 3, 3], "embed_dim": [32] * 4, "num_heads": [4] * 4}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": _SHARED_KV,
    "gemma4": {"text_config": _SHARED_KV},
    "gemma4_text": _SHARED_KV,
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), _sections(1, 1, 2)),
    "glm4v_moe": _sections(1, 1, 0),
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0], [-3, 2]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1, 2, 3],
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hunyuan_vl": _sections(1, 1, 1, 1),
    "inkling_mm_model": {"vision_config": {"patch_size": 8}},
    "janus": {"vision_config": {"projection_dim": 32}, "vq_config": {"projection_dim": 32}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kyutai_speech_to_text": {
        "audio_pad_token_id": 3,
        "audio_bos_token_id": 2,
        "codec_config": {"upsample_groups": 32},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama": {"text_config": {"cross_attention_layers": [3]}},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "molmo2": {"vision_config": {"image_size": [28, 28]}, "adapter_config": {"vision_feature_layer": [4, 2]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 32], "depths": [1] * 4}},
    "nemo_speechlm": {"text_config": _NEMOTRON, "word_timestamp_config": {"blank_token_id": VOCABULARY - 1}},
    "nemotron_h": _NEMOTRON,
    "nemotron_h_omni": {"text_config": _NEMOTRON, "vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _sections(1, 1, 2),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"), _sections(1, 1, 2)),
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 3,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
    },
    "rwkv": {"rescale_every": 0},  # as load_model opens it
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "vibevoice_asr": dict.fromkeys(("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config"), _SPEECH),
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "num_key_value_heads": 4,
        "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> tf.PreTrainedConfig:
    """The configuration of a model of DEPTH small layers."""
    config = tf.CONFIG_MAPPING[model_type]
    values = _small(config)
    for name, value in (_SPECIAL.get(model_type, {}) | changes).items():
        values[name] = values[name] | value if isinstance(value, dict) and name in values else value
    return config(**{name: value for name, value in values.items() if value is not None})


def _small(config: type[tf.PreTrainedConfig]) -> dict[str, Any]:
    fields = getattr(config, "__dataclass_fields__", {})
    values = {name: value for name, value in _SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = 4
    for name in config.sub_configs or {}:
        part = getattr(config(), name, None)
        if isinstance(part, tf.PreTrainedConfig):
            values[name] = {"model_type": part.model_type, **_small(type(part))}
    return values


def tiny_random_model(config: tf.PreTrainedConfig, seed: int = 0) -> tf.PreTrainedModel:
    """A random model whose every parameter matters: weights scaled up, noise on what starts as zeros or ones."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)
    return model
