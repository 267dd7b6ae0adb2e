"""The plain Paddle form of every operation: short, differentiable by Paddle itself, and slow.

T tokens, S keys, H query heads, K key/value heads, d head width, N rows, E experts, V vocabulary.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32, cast to the weight's dtype, times the weight."""
    x32 = x.astype("float32")
    normed = x32 * paddle.rsqrt((x32 * x32).mean(-1, keepdim=True) + eps)
    return normed.astype(weight.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of the vision tower."""
    return x * F.sigmoid(1.702 * x)


def apply_rope(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate the adjacent pairs (x[2j], x[2j+1]) by the angle j of each token, in fp32."""
    tokens, heads, width = x_THd.shape
    pairs = x_THd.astype("float32").reshape([tokens, heads, width // 2, 2])
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)
    rotated = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape([tokens, heads, width]).astype(x_THd.dtype)


def attention(q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, allowed_TS: Tensor) -> Tensor:
    """Grouped-query attention with a dense boolean mask; softmax in fp32."""
    tokens, heads, width = q_THd.shape
    repeat = heads // k_SKd.shape[1]
    q = q_THd.transpose([1, 0, 2])
    k = paddle.repeat_interleave(k_SKd, repeat, axis=1).transpose([1, 0, 2])
    v = paddle.repeat_interleave(v_SKd, repeat, axis=1).transpose([1, 0, 2])
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32") * width**-0.5
    scores = paddle.where(allowed_TS.unsqueeze(0), scores, paddle.full_like(scores, float("-inf")))
    return paddle.matmul(F.softmax(scores).astype(v.dtype), v).transpose([1, 0, 2])


def route(logits_NE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights [N, k] and experts [N, k]: softmax; the bias selects only; the selected weights sum to one."""
    probabilities = F.softmax(logits_NE.astype("float32"))
    experts = paddle.topk(probabilities.detach() + bias_E, k, axis=-1)[1].detach()
    weights = paddle.take_along_axis(probabilities, experts, axis=-1)
    return weights / weights.sum(-1, keepdim=True).clip(min=1e-12), experts


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    """Rows sorted by expert, each block times its own expert's weight, transposed."""
    blocks = x_NI.split([n for n in counts if n])
    experts = [e for e, n in enumerate(counts) if n]
    products = [
        paddle.matmul(block, weight_EOI[e], transpose_y=True)
        for block, e in zip(blocks, experts, strict=True)
    ]
    return paddle.concat(products)


def lora_linear(x: Tensor, w_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """x W^T + scale (x A^T) B^T."""
    low_rank = paddle.matmul(paddle.matmul(x, a_rI, transpose_y=True), b_Or, transpose_y=True)
    return paddle.matmul(x, w_OI, transpose_y=True) + scale * low_rank


def grouped_lora_linear(
    x_NI: Tensor, w_EOI: Tensor, a_ErI: Tensor, b_EOr: Tensor, scale: float, counts: list[int]
) -> Tensor:
    """The same for rows sorted by expert."""
    low_rank = grouped_linear(grouped_linear(x_NI, a_ErI, counts), b_EOr, counts)
    return grouped_linear(x_NI, w_EOI, counts) + scale * low_rank


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihood of each row's label in fp32, through the whole N x V matrix of logits."""
    logits = paddle.matmul(hidden_ND, weight_VD, transpose_y=True).astype("float32")
    return F.cross_entropy(logits, labels_N, reduction="none").reshape([-1])
