"""fp32 products of the BLAS inside the Paddle wheel, each written where it belongs."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import paddle
from paddle import Tensor

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # cblas.h


@cache
def _sgemm() -> Any:
    """cblas_sgemm of the library that Paddle has loaded, None where the wheel has another one."""
    path = Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"
    if not path.is_file():
        return None
    function = ctypes.CDLL(str(path)).cblas_sgemm
    sizes = (c_int, c_int, c_int)
    function.argtypes = [
        *(c_int, c_int, c_int, *sizes, c_float),
        *(c_void_p, c_int, c_void_p, c_int, c_float, c_void_p, c_int),
    ]
    function.restype = None
    return function


def grouped_product(x: Tensor, stack: Tensor, counts: list[int], forward: bool) -> Tensor | None:
    """Rows [N, I] sorted by expert times their matrices [E, O, I] transposed: [N, O]; not transposed, back.

    None where this is no business of a BLAS on a CPU: then nothing has been computed.
    """
    plain = x.place.is_cpu_place() and x.dtype == stack.dtype == paddle.float32
    if not plain or _sgemm() is None or max(x.shape[0], *stack.shape) >= 1 << 31:
        return None
    _, outputs, inputs = stack.shape
    x, width = x.contiguous(), outputs if forward else inputs
    depth = inputs if forward else outputs
    y = paddle.empty([x.shape[0], width], "float32")
    source, matrix, result = x.data_ptr(), stack.data_ptr(), y.data_ptr()
    turned = _TRANSPOSED if forward else _PLAIN
    for rows in counts:
        if rows:
            sizes = (rows, width, depth, 1.0, source, depth, matrix, inputs, 0.0, result, width)
            _sgemm()(_ROW_MAJOR, _PLAIN, turned, *sizes)
        source, result = source + 4 * rows * depth, result + 4 * rows * width
        matrix += 4 * inputs * outputs
    return y
