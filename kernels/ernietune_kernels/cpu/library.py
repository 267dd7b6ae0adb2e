"""The compiled kernels: loaded and compared with the plain path at first use, or left alone with a notice."""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import POINTER, Structure, byref, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from ernietune_kernels import quantized
from ernietune_kernels.cpu.build import BuildError, library
from ernietune_kernels.quantized import QuantizedWeight

_log = logging.getLogger(__name__)
PLAIN = "ERNIETUNE_PLAIN_KERNELS"
FEW_ROWS = 8  # of x: beyond it the C code is good only where there are tiles
_SMALL = ((5, 64), (3, 96), (7, 288))  # out and in of the matrices that are compared
_TOLERANCE = 1e-4
_ROUNDED = 4e-3  # panels of int4 weights are rounded to bf16


class Matrix(Structure):
    """`Matrix` of linear.h: one stored weight, or the first one of a stack of experts."""

    _fields_ = [
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("out", c_int64),
        ("width", c_int64),
        ("bits", c_int32),
        ("group", c_int32),
    ]

    @classmethod
    def of(cls, weight: Tensor | QuantizedWeight) -> Matrix:
        """A view: the weight has to outlive it. Plain tensors are bfloat16 or float32."""
        out, width = weight.shape[-2:]
        if isinstance(weight, QuantizedWeight):
            codes, scale = weight.codes.data_ptr(), weight.scale.data_ptr()
            return cls(codes, scale, out, width, weight.bits, weight.group)
        return cls(weight.data_ptr(), None, out, width, 16 if weight.dtype == paddle.bfloat16 else 32, width)

    def expert(self, index: int) -> Matrix:
        """The matrix of one expert, where this is the first one of a stack."""
        codes = self.codes + index * self.out * self.width * self.bits // 8
        scale = self.scale and self.scale + 4 * index * self.out * (self.width // self.group)
        return Matrix(codes, scale, self.out, self.width, self.bits, self.group)


class Library:
    """The C functions, called on the addresses of contiguous fp32 tensors."""

    def __init__(self, path: Path, threads: int) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.ernie_threads.argtypes = [c_void_p, c_int]
        self.c.ernie_product.argtypes = [POINTER(Matrix), c_void_p, c_void_p, c_int64]
        self.c.ernie_grouped.argtypes = [POINTER(Matrix), c_int64, c_void_p, c_void_p, c_void_p]
        self.c.ernie_widen.argtypes = [POINTER(Matrix), c_void_p, c_int]
        self.c.ernie_split.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64]
        self.c.ernie_join.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64]
        self.c.ernie_quantize.argtypes = [c_void_p, c_int, POINTER(Matrix)]
        self.c.ernie_decode.argtypes = [c_void_p, c_void_p]
        self.c.ernie_read.argtypes = [c_void_p, c_int64]
        self.threads = threads
        parallel = _parallel()
        self.c.ernie_threads(parallel, threads if parallel else 1)
        self.takes_many_rows = bool(self.c.ernie_tiles())

    def product(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [N, in] times the matrix transposed: [N, out]."""
        y = paddle.empty([x.shape[0], matrix.out], "float32")
        _done(self.c.ernie_product(byref(matrix), x.data_ptr(), y.data_ptr(), x.shape[0]))
        return y

    def grouped(self, x: Tensor, stack: Matrix, counts: list[int]) -> Tensor:
        """Rows sorted by expert times their experts' matrices: [N, out]."""
        y = paddle.empty([x.shape[0], stack.out], "float32")
        rows = (c_int64 * len(counts))(*counts)
        _done(self.c.ernie_grouped(byref(stack), len(counts), rows, x.data_ptr(), y.data_ptr()))
        return y

    def widen(self, matrix: Matrix, panel: Tensor, bits: int) -> None:
        """Write the matrix as fp32 (32) or bf16 (16) into a panel; bf16 leaves out the scales of int8."""
        self.c.ernie_widen(byref(matrix), panel.data_ptr(), bits)

    def quantize(self, source: np.ndarray, matrix: Matrix) -> None:
        """Fill an int8 or int4 matrix from contiguous bf16 bits (uint16) or fp32 numbers [out, in]."""
        self.c.ernie_quantize(source.ctypes.data, 8 * source.itemsize, byref(matrix))


def _done(code: int) -> None:
    if code:
        raise MemoryError("no memory for the activations of one product")


@cache
def kernels() -> Library | None:
    """The library, None where the plain path has to do; says why once."""
    if os.environ.get(PLAIN) == "1":
        return None
    try:
        loaded = Library(library(), _threads())
        if problem := _first_difference(loaded):
            raise BuildError(f"they differ from the plain path: {problem}")
    except (BuildError, OSError) as error:
        _log.warning("the C kernels are not used, which is slower: %s", error)
        return None
    return loaded


def _threads() -> int:
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or 1))


def _parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that Paddle has loaded, None without one."""
    runtime = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    if not runtime.is_file():
        return None
    return ctypes.cast(ctypes.CDLL(str(runtime)).GOMP_parallel, c_void_p).value


def _first_difference(loaded: Library) -> str | None:
    """A short text about the first small product that is not what the plain path says."""
    generator = np.random.default_rng(0)
    for out, width in _SMALL:
        numbers = generator.standard_normal((out, width)).astype(np.float32)
        weights = [
            paddle.to_tensor(numbers),
            paddle.to_tensor(numbers).astype("bfloat16"),
            quantized.quantize(numbers, 8),
            quantized.quantize(numbers, 4, quantized.group_of(width) or 32),
        ]
        for rows in (1, 7, 20, 40):
            x = paddle.to_tensor(generator.standard_normal((rows, width)).astype(np.float32))
            for weight in weights:
                matrix, wanted = Matrix.of(weight), quantized.linear(x, weight)
                tolerance = _ROUNDED if matrix.bits == 4 and rows > FEW_ROWS else _TOLERANCE
                error = float((loaded.product(x, matrix) - wanted).abs().max().item())
                if not error <= tolerance * float(wanted.abs().max().item()):
                    return f"{matrix.bits} bits, {rows} x {width} x {out}, error {error:.1e}"
    return None
