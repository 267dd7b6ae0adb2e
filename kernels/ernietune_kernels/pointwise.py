"""Norm, activations and rotary embedding: Triton on a GPU, C on a CPU in fp32, else plain Paddle."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ernietune_kernels import fused
from ernietune_kernels.cpu import pointwise as compiled
from ernietune_kernels.cpu.library import Library


class _RMSNorm(PyLayer):
    """Saves x and one scale per row, where Paddle's own graph keeps five tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.astype("float32")
        inverse = paddle.rsqrt((x32 * x32).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x32 * inverse).astype(weight.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, inverse = ctx.saved_tensor()
        grad32 = grad.astype("float32")
        normed = x.astype("float32") * inverse
        scaled = grad32 * weight.astype("float32")
        grad_x = None
        if not x.stop_gradient:
            grad_x = (inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))).astype(x.dtype)
        grad_w = None
        if not weight.stop_gradient:
            width = weight.shape[0]
            grad_w = (grad32 * normed).reshape([-1, width]).sum(0).astype(weight.dtype)
        return grad_x, grad_w


class _CompiledRMSNorm(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, library: Library) -> Tensor:
        y, inverse = compiled.rms_norm(library, x, weight, eps)
        ctx.library = library
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensor()
        return compiled.rms_norm_back(ctx.library, x, weight, inverse, grad), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32, cast to the weight's dtype, times the weight."""
    if fused.available(x):
        return fused.rms_norm(x, weight, eps)
    library = compiled.library_for(x, weight)
    if library is not None and weight.stop_gradient:
        return _CompiledRMSNorm.apply(x, weight, eps, library)
    return _RMSNorm.apply(x, weight, eps)


class _CompiledSwiglu(PyLayer):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, library: Library) -> Tensor:
        ctx.library = library
        ctx.save_for_backward(gate, up)
        return compiled.swiglu(library, gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensor()
        back = compiled.swiglu_back(ctx.library, *saved, grad)
        return tuple(None if x.stop_gradient else g for x, g in zip(saved, back, strict=True))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in one pass: by ours on a CPU in fp32, by Paddle's fused kernel on a GPU."""
    library = compiled.library_for(gate, up)
    return F.swiglu(gate, up) if library is None else _CompiledSwiglu.apply(gate, up, library)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of the vision tower."""
    return x * F.sigmoid(1.702 * x)


def _rotate(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor, back: bool = False) -> Tensor:
    library = compiled.library_for(x_THd, cos_TF, sin_TF)
    if library is not None:
        return compiled.rotated(library, x_THd, cos_TF, sin_TF, back)
    return _plain_rotate(x_THd, cos_TF, -sin_TF if back else sin_TF)


def _plain_rotate(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """The rotation as one complex product: a pair (x[2j], x[2j+1]) is a complex number."""
    tokens, heads, width = x_THd.shape
    turned = paddle.as_complex(x_THd.astype("float32").reshape([tokens, heads, width // 2, 2]))
    turned = turned * paddle.complex(cos_TF, sin_TF).unsqueeze(1)
    return paddle.as_real(turned).reshape([tokens, heads, width]).astype(x_THd.dtype)


class _Rope(PyLayer):
    """The gradient of a rotation is the rotation back, so nothing but the angles is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensor()
        return _rotate(grad, cos, sin, back=True), None, None


def rotate(q_THd: Tensor, k_TKd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rope` of queries and keys, in one launch where that can be."""
    if fused.available(q_THd):
        return fused.rope(q_THd, k_TKd, cos_TF, sin_TF)
    return apply_rope(q_THd, cos_TF, sin_TF), apply_rope(k_TKd, cos_TF, sin_TF)


def apply_rope(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate the adjacent pairs of every head by the token's angles, in fp32; the angles take no gradient."""
    if x_THd.stop_gradient:
        return _rotate(x_THd, cos_TF, sin_TF)
    return _Rope.apply(x_THd, cos_TF, sin_TF)
