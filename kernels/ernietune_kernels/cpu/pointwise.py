"""Norm, activation and rotation in C, forward and backward."""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int64, c_void_p
from functools import cache

import numpy as np
import paddle
from paddle import Tensor

from ernietune_kernels.cpu.checks import Results, checked
from ernietune_kernels.cpu.library import Library


class _Norm(Structure):
    """`Norm` of pointwise.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "inverse", "y", "gradient", "grad_x")),
        ("rows", c_int64),
        ("width", c_int64),
        ("epsilon", c_float),
    ]


class _Swiglu(Structure):
    """`Swiglu` of pointwise.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("gate", "up", "y", "gradient", "grad_gate", "grad_up")),
        ("count", c_int64),
    ]


class _Rotation(Structure):
    """`Rotation` of pointwise.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "cos", "sin", "y")),
        *((name, c_int64) for name in ("tokens", "heads", "width")),
        ("direction", c_float),
    ]


def rms_norm(library: Library, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x) times the weight, 1 / rms(x) [rows])."""
    x = x.contiguous()
    y, inverse = paddle.empty_like(x), paddle.empty([x.size // x.shape[-1]], "float32")
    call = _norm(x, weight, inverse)
    call.y, call.epsilon = y.data_ptr(), eps
    library.c.ernie_rms_norm(byref(call))
    return y, inverse


def rms_norm_back(library: Library, x: Tensor, weight: Tensor, inverse: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x."""
    x, gradient = x.contiguous(), gradient.contiguous()
    grad_x = paddle.empty_like(x)
    call = _norm(x, weight, inverse)
    call.gradient, call.grad_x = gradient.data_ptr(), grad_x.data_ptr()
    library.c.ernie_rms_norm_back(byref(call))
    return grad_x


def _norm(x: Tensor, weight: Tensor, inverse: Tensor) -> _Norm:
    return _Norm(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        inverse=inverse.data_ptr(),
        rows=inverse.shape[0],
        width=x.shape[-1],
    )


def swiglu(library: Library, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = paddle.empty_like(gate)
    call = _Swiglu(gate=gate.data_ptr(), up=up.data_ptr(), y=y.data_ptr(), count=gate.size)
    library.c.ernie_swiglu(byref(call))
    return y


def swiglu_back(library: Library, gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
    grads = paddle.empty_like(gate), paddle.empty_like(up)
    call = _Swiglu(gate=gate.data_ptr(), up=up.data_ptr(), gradient=gradient.data_ptr(), count=gate.size)
    call.grad_gate, call.grad_up = (x.data_ptr() for x in grads)
    library.c.ernie_swiglu_back(byref(call))
    return grads


def rotated(library: Library, x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor, back: bool = False) -> Tensor:
    """Every head's adjacent pairs turned by its token's angles, or turned back."""
    x, cos, sin = x_THd.contiguous(), cos_TF.contiguous(), sin_TF.contiguous()
    y = paddle.empty_like(x)
    places = (tensor.data_ptr() for tensor in (x, cos, sin, y))
    call = _Rotation(*places, *x.shape, -1.0 if back else 1.0)
    library.c.ernie_rotate(byref(call))
    return y


def library_for(*tensors: Tensor) -> Library | None:
    """The library where these tensors are fp32, in host memory and not empty."""
    if any(not x.place.is_cpu_place() or x.dtype != paddle.float32 or not x.size for x in tensors):
        return None
    return _checked()


@cache
def _checked() -> Library | None:
    return checked("norms and activations", lambda c: {**_of_norm(c), **_of_swiglu(c), **_of_rotation(c)})


def _numbers(*shape: int) -> tuple[np.ndarray, Tensor]:
    values = np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    return values.astype(np.float64), paddle.to_tensor(values)


def _of_norm(library: Library) -> Results:
    (x, x_), (g, g_), (w, w_) = _numbers(9, 37), _numbers(3, 9, 37), _numbers(37)
    g, g_ = g[0], g_[0]
    inverse = (np.square(x).mean(1, keepdims=True) + 0.1) ** -0.5
    scaled, normed = g * w, x * inverse
    y_, kept = rms_norm(library, x_, w_, 0.1)
    grad = inverse * (scaled - normed * (scaled * normed).mean(1, keepdims=True))
    return {"the norm": (y_, normed * w), "its gradient": (rms_norm_back(library, x_, w_, kept, g_), grad)}


def _of_swiglu(library: Library) -> Results:
    (gate, gate_), (up, up_), (g, g_) = _numbers(3, 19), _numbers(1, 3, 19), _numbers(2, 3, 19)
    up, up_, g, g_ = up[0], up_[0], g[0], g_[0]
    gate, gate_ = gate * 10, gate_ * 10
    opened = 1 / (1 + np.exp(-gate))
    grad_gate, grad_up = swiglu_back(library, gate_, up_, g_)
    return {
        "swiglu": (swiglu(library, gate_, up_), gate * opened * up),
        "its gate's gradient": (grad_gate, g * up * opened * (1 + gate * (1 - opened))),
        "its up's gradient": (grad_up, g * gate * opened),
    }


def _of_rotation(library: Library) -> Results:
    (x, x_), (angles, _) = _numbers(5, 3, 14), _numbers(5, 7)
    cos_, sin_ = (paddle.to_tensor(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    wanted = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    found = rotated(library, x_, cos_, sin_)
    return {
        "the rotation": (found, wanted),
        "the way back": (rotated(library, found, cos_, sin_, back=True), x),
    }
