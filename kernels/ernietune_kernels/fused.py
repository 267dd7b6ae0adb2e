"""The Triton kernels as operations of Paddle's autograd: what the exported operations take on a GPU.

`available` says whether they can run where a tensor lies. Nothing else in this package imports Triton.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernietune_kernels.fp8 import Fp8Weight
from ernietune_kernels.gpu.runtime import has_fp8
from ernietune_kernels.gpu.runtime import usable as available
from ernietune_kernels.quantized import QuantizedWeight

__all__ = [
    "available",
    "available_for_products",
    "frozen_product",
    "linear_cross_entropy",
    "paged_attention",
    "rms_norm",
    "rope",
    "route",
    "stack_of",
]


def available_for_products(x: Tensor) -> bool:
    """The same for the kernels that multiply: they do so in bf16, which an fp32 model must not be given."""
    return available(x) and x.dtype == paddle.bfloat16


class _RMSNorm(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from ernietune_kernels.gpu import norm

        y, inverse = norm.rms_norm(x.reshape([-1, x.shape[-1]]), weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        from ernietune_kernels.gpu import norm

        x, weight, inverse = ctx.saved_tensor()
        rows = [-1, x.shape[-1]]
        trained = not weight.stop_gradient
        grad_x, grad_weight = norm.rms_norm_backward(
            grad.reshape(rows), x.reshape(rows), weight, inverse, trained
        )
        return (
            None if x.stop_gradient else grad_x.reshape(x.shape),
            grad_weight.astype(weight.dtype) if trained else None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32, cast to the weight's dtype, times the weight."""
    return _RMSNorm.apply(x, weight, eps)


class _Rope(PyLayer):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from ernietune_kernels.gpu.rope import rope as turn

        ctx.save_for_backward(q, k, cos, sin)
        return turn(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        from ernietune_kernels.gpu.rope import rope as turn

        q, k, cos, sin = ctx.saved_tensor()
        back = turn(grad_q, grad_k, cos, sin, backward=True)
        grads = [None if x.stop_gradient else g for x, g in zip((q, k), back, strict=True)]
        return *grads, None, None


def rope(q_THd: Tensor, k_TKd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated by their tokens' angles, in one launch."""
    return _Rope.apply(q_THd, k_TKd, cos_TF, sin_TF)


class _Route(PyLayer):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        from ernietune_kernels.gpu import permute

        weights, chosen = permute.route(logits, bias, k)
        ctx.save_for_backward(logits, weights, chosen)
        ctx.mark_non_differentiable(chosen)
        return weights, chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, None]:
        from ernietune_kernels.gpu import permute

        logits, weights, chosen = ctx.saved_tensor()
        if logits.stop_gradient:
            return None, None
        return permute.route_backward(grad, weights, chosen, logits.shape[1]), None


def route(logits_NE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights [N, k] that sum to one and experts [N, k]; the bias selects only."""
    return _Route.apply(logits_NE, bias_E, k)


def stack_of(weight: Tensor | QuantizedWeight) -> Any:
    """A stack [E, O, I], or a matrix [O, I] as a stack of one, as the kernels read it."""
    from ernietune_kernels.gpu.stacks import Stack

    if not isinstance(weight, QuantizedWeight):
        return Stack(_one(weight, 3))
    codes, scale = _one(weight.codes, 3), _one(weight.scale, 2 if weight.bits == 8 else 3)
    return Stack(codes, scale, weight.bits, weight.group if weight.bits == 4 else 1)


def _one(tensor: Tensor, dimensions: int) -> Tensor:
    return tensor if tensor.ndim == dimensions else tensor.unsqueeze(0)


def frozen_product(x: Tensor, weight: Any, counts: list[int] | None, forward: bool) -> Tensor | None:
    """Sorted rows times a frozen weight (`frozen`), without autograd; None where no kernel knows its form."""
    from ernietune_kernels.gpu import products

    counts = [x.shape[0]] if counts is None else counts
    if isinstance(weight, Fp8Weight) and has_fp8():
        return _fp8_product(x, weight, counts, forward)
    if isinstance(weight, QuantizedWeight):
        rows = products.Rows(x.shape[0], paddle.to_tensor(counts, "int32", place=x.place))
        return products.grouped(x, rows, [products.Term(stack_of(weight))], forward)
    return None


def _fp8_product(x: Tensor, weight: Fp8Weight, counts: list[int], forward: bool) -> Tensor:
    from ernietune_kernels.gpu import fp8, products
    from ernietune_kernels.gpu.tensors import dtype_name

    rows = products.Rows(x.shape[0], paddle.to_tensor(counts, "int32", place=x.place))
    codes, scales = ([part.data_ptr() for part in parts] for parts in zip(*_parts(weight), strict=True))
    addresses = (paddle.to_tensor(part, "int64", place=x.place) for part in (codes, scales))
    table = fp8.Fp8Table(*addresses, (len(codes), weight.shape[-2], weight.shape[-1]))
    return fp8.grouped_fp8(fp8.quantize_rows(x), rows, table, dtype_name(x), forward=forward)


def _parts(weight: Fp8Weight) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of each matrix."""
    return [(matrix.codes, matrix.scale) for matrix in weight.matrices]


class _LinearCrossEntropy(PyLayer):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        from ernietune_kernels.gpu import cross_entropy

        nll, ctx.grad_hidden = cross_entropy.linear_cross_entropy(
            hidden, head, labels, not hidden.stop_gradient
        )
        ctx.save_for_backward(hidden, head, labels)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from ernietune_kernels.gpu import cross_entropy

        hidden, head, labels = ctx.saved_tensor()
        grad_hidden = None
        if ctx.grad_hidden is not None:
            grad_hidden = ctx.grad_hidden * grad.unsqueeze(1).astype(hidden.dtype)
        if head.stop_gradient:
            return grad_hidden, None, None
        return grad_hidden, cross_entropy.head_gradient(hidden, head, labels, grad).astype(head.dtype), None


def paged_attention(
    q_BHd: Tensor, keys: Tensor, values: Tensor, slots_BS: Tensor, lengths_B: Tensor
) -> Tensor:
    """Attention [B, H, d] of one token a row over its slots of keys and values [slots, KV, d], read in place.

    slots int64 [B, S], of which the first `lengths` (int32 [B]) count. No gradient.
    """
    from ernietune_kernels.gpu.decode import decode_attention

    return decode_attention(q_BHd, keys, values, slots_BS, lengths_B)


def linear_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihood fp32 [N] of each row's label, from fp32 logits of a few rows at a time."""
    if paddle.is_grad_enabled() and not (hidden_ND.stop_gradient and head_VD.stop_gradient):
        return _LinearCrossEntropy.apply(hidden_ND, head_VD, labels_N)
    from ernietune_kernels.gpu import cross_entropy

    return cross_entropy.linear_cross_entropy(hidden_ND, head_VD, labels_N, gradient=False)[0]
