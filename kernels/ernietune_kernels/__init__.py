"""Operations of the models, each with one signature whatever the device.

`reference` holds the plain Paddle form of every operation: the truth the tests compare with. What is exported
here is what the models call; it is chosen by the tensors' place in one spot per operation.
"""

from ernietune_kernels.block_attention import (
    AttentionPlan,
    attention,
    cached_attention,
    causal_plan,
    decode_attention,
    frame_attention,
)
from ernietune_kernels.cross_entropy import linear_cross_entropy
from ernietune_kernels.fused import available_for_products, paged_attention
from ernietune_kernels.fused_experts import ExpertFactors, placed_experts, routed_experts
from ernietune_kernels.grouped_gemm import grouped_linear
from ernietune_kernels.lora import grouped_lora_linear, grouped_low_rank, lora_linear
from ernietune_kernels.pointwise import apply_rope, quick_gelu, rms_norm, rotate, swiglu
from ernietune_kernels.routing import Permutation, permute, route, unpermute

__all__ = [
    "AttentionPlan",
    "ExpertFactors",
    "Permutation",
    "apply_rope",
    "attention",
    "available_for_products",
    "cached_attention",
    "causal_plan",
    "decode_attention",
    "frame_attention",
    "grouped_linear",
    "grouped_lora_linear",
    "grouped_low_rank",
    "linear_cross_entropy",
    "lora_linear",
    "paged_attention",
    "permute",
    "placed_experts",
    "quick_gelu",
    "rms_norm",
    "rotate",
    "route",
    "routed_experts",
    "swiglu",
    "unpermute",
]
