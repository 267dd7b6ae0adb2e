"""The low-rank half of linear layers in C: added to a product in place, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from functools import cache

import numpy as np
import paddle
from paddle import Tensor

from ernietune_kernels.cpu.checks import Results, checked
from ernietune_kernels.cpu.library import Library

HIGHEST = 256  # rank, as in lowrank.c


class _LowRank(Structure):
    """`LowRank` of lowrank.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "a", "b", "narrow", "y")),
        *((name, c_void_p) for name in ("gradient", "grad_x", "grad_narrow", "grad_a", "grad_b")),
        ("counts", c_void_p),
        *((name, c_int64) for name in ("experts", "inputs", "outputs", "rank")),
        ("scale", c_float),
    ]


def add(
    library: Library, x: Tensor, a: Tensor, b: Tensor, scale: float, counts: Sequence[int], y: Tensor
) -> Tensor:
    """y [N, O] += s (x A^T) B^T in place; returns s x A^T [N, r].

    A [E, r, I], B [E, O, r] for rows sorted by expert, or A [r, I], B [O, r] with one count, of all rows.
    """
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    assert y.is_contiguous(), "what is added to has to be one block"
    narrow = paddle.empty([x.shape[0], a.shape[-2]], "float32")
    rows = np.array(counts, np.int64)
    call = _call(x, a, b, narrow, scale, rows)
    call.y = y.data_ptr()
    _done(library.c.ernie_low_rank(byref(call)))
    return narrow


def gradients(
    library: Library,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    counts: Sequence[int],
    gradient: Tensor,
    grad_x: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, from (x, A, B, what `add` returned); that of x is added to `grad_x`."""
    x, a, b, narrow = (tensor.contiguous() for tensor in saved)
    gradient = gradient.contiguous()
    assert grad_x is None or grad_x.is_contiguous(), "what is added to has to be one block"
    grad_a, grad_b, room = paddle.empty_like(a), paddle.empty_like(b), paddle.empty_like(narrow)
    rows = np.array(counts, np.int64)
    call = _call(x, a, b, narrow, scale, rows)
    call.gradient, call.grad_narrow = gradient.data_ptr(), room.data_ptr()
    call.grad_x = None if grad_x is None else grad_x.data_ptr()
    call.grad_a, call.grad_b = grad_a.data_ptr(), grad_b.data_ptr()
    _done(library.c.ernie_low_rank_back(byref(call)))
    return grad_a, grad_b


def _call(x: Tensor, a: Tensor, b: Tensor, narrow: Tensor, scale: float, counts: np.ndarray) -> _LowRank:
    assert counts.sum() == x.shape[0], (counts, x.shape)
    return _LowRank(
        x=x.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        narrow=narrow.data_ptr(),
        counts=counts.ctypes.data,
        experts=len(counts),
        inputs=x.shape[1],
        outputs=b.shape[-2],
        rank=b.shape[-1],
        scale=scale,
    )


def _done(code: int) -> None:
    if code:
        raise MemoryError("no memory for the factors of one low-rank product")


def library_for(x: Tensor, a: Tensor, b: Tensor) -> Library | None:
    """The library where it can multiply these: rows in host memory, fp32, a rank that it has room for."""
    fits = x.place.is_cpu_place() and 0 < x.shape[0] and 0 < b.shape[-1] <= HIGHEST
    if not fits or any(t.dtype != paddle.float32 for t in (x, a, b)):
        return None
    return _checked()


@cache
def _checked() -> Library | None:
    return checked("low-rank products", _results)


def _results(library: Library) -> Results:
    """Products and gradients of three experts, one of them without rows."""
    random, counts, scale = np.random.default_rng(0), [131, 0, 5], 0.5
    of_row = np.repeat(np.arange(3), counts)
    x, gradient = random.standard_normal((136, 40)), random.standard_normal((136, 70))
    a, b = random.standard_normal((3, 5, 40)), random.standard_normal((3, 70, 5))
    narrow = scale * np.einsum("ni,nri->nr", x, a[of_row])
    grad_narrow = scale * np.einsum("no,nor->nr", gradient, b[of_row])
    y, grad_x = paddle.ones([136, 70]), paddle.ones([136, 40])
    tensors = [paddle.to_tensor(t.astype(np.float32)) for t in (x, a, b)]
    kept = add(library, *tensors, scale, counts, y)
    given = paddle.to_tensor(gradient.astype(np.float32))
    grad_a, grad_b = gradients(library, (*tensors, kept), scale, counts, given, grad_x)
    of_expert = np.eye(3)[of_row]
    return {
        "the product": (y, 1 + np.einsum("nr,nor->no", narrow, b[of_row])),
        "grad x": (grad_x, 1 + np.einsum("nr,nri->ni", grad_narrow, a[of_row])),
        "grad A": (grad_a, np.einsum("ne,nr,ni->eri", of_expert, grad_narrow, x)),
        "grad B": (grad_b, np.einsum("ne,no,nr->eor", of_expert, gradient, narrow)),
    }
