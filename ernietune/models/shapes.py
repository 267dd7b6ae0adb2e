"""config.json of the published ERNIE-4.5 checkpoints by short name, and of three tiny ones.

Only fields that ernietune or the published modelling code reads are kept; token ids of the tiny shapes are
filled in from the tokenizer that is written beside them.
"""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = {
    "hidden_act": "silu",
    "use_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "vocab_size": 103424,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_MOE: dict[str, Any] = {"moe_gate": "topk", "moe_use_aux_free": True, "moe_layer_interval": 1}
_VISION_TOWER: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "hidden_act": "quick_gelu",
}
_VISION_TOKENS: dict[str, Any] = {
    "im_patch_id": 100295,
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
}
_VL: dict[str, Any] = {
    **_MOE,
    **_VISION_TOKENS,
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_moe_vl",
    "pixel_hidden_size": 1280,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "rope_3d": True,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "vision_config": _VISION_TOWER,
}

_DENSE_03B: dict[str, Any] = {
    **_BASE,
    "architectures": ["Ernie4_5ForCausalLM"],
    "model_type": "ernie4_5",
    "hidden_size": 1024,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}
_MOE_21B: dict[str, Any] = {
    **_BASE,
    **_MOE,
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "hidden_size": 2560,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "moe_num_experts": 64,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_capacity": [64, 64, 64],
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
}
_MOE_300B: dict[str, Any] = {
    **_MOE_21B,
    "hidden_size": 8192,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "moe_intermediate_size": 3584,
    "moe_k": 8,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 3,
    "moe_layer_end_index": 53,
    "tie_word_embeddings": False,
}
_VL_28B: dict[str, Any] = {
    **_BASE,
    **_VL,
    "hidden_size": 2560,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_capacity": [128, 128, 128],
    "tie_word_embeddings": True,
}
_VL_424B: dict[str, Any] = {
    **_BASE,
    **_VL,
    "hidden_size": 8192,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [3584, 1536],
    "moe_k": 8,
    "moe_layer_start_index": 3,
    "tie_word_embeddings": False,
}
# 16 rotary frequencies instead of 64: h 6, w 6, t 4 is the nearest split in which h and w stay equal.
_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
_TINY_EXPERTS: dict[str, Any] = {
    "moe_num_experts": 8,
    "moe_intermediate_size": 24,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "moe_capacity": [8, 8, 8],
}
_TINY_VL: dict[str, Any] = {
    "moe_num_experts": [8, 8],
    "moe_intermediate_size": [24, 16],
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [4, 3],
    "pixel_hidden_size": 64,
    "rope_scaling": {"type": "default", "mrope_section": [6, 6, 4]},
    "vision_config": {**_VISION_TOWER, "depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
}
# The embedded model of the demo (data/tiny): 3.5 M parameters.
_DEMO_VL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "moe_intermediate_size": [96, 64],
    "moe_layer_end_index": [5, 4],
    "moe_k": 2,
    "pixel_hidden_size": 96,
    "vision_config": {**_VISION_TOWER, "depth": 4, "embed_dim": 96, "hidden_size": 96, "num_heads": 4},
}

SHAPES: dict[str, dict[str, Any]] = {
    "0.3b": _DENSE_03B,
    "21b-a3b": _MOE_21B,
    "21b-a3b-thinking": {k: v for k, v in _MOE_21B.items() if k != "moe_layer_end_index"},
    "300b-a47b": _MOE_300B,
    "vl-28b-a3b": _VL_28B,
    "vl-28b-a3b-thinking": _VL_28B,
    "vl-424b-a47b": _VL_424B,
    "tiny-dense": {**_DENSE_03B, **_TINY},
    "tiny-moe": {**_MOE_21B, **_TINY, **_TINY_EXPERTS},
    "tiny-vl": {**_VL_28B, **_TINY, **_TINY_EXPERTS, **_TINY_VL, "hidden_size": 96, "moe_k": 2},
    "demo-vl": {**_VL_28B, **_TINY, **_TINY_EXPERTS, **_TINY_VL, **_DEMO_VL},
}
