"""Products of fp32 rows with weights that stay in their stored form: bf16, int8 or int4.

Few rows go through the C kernels, which read each weight once, and so do many where the processor has tiles
(cpu/tiles.h). Elsewhere the weight becomes, for many rows, a panel in bf16 for oneDNN or in fp32 for Paddle.
With tiles and with oneDNN, x is the sum of two bf16 numbers, exact to 2^-17, and int4 weights are rounded to
bf16, which moves each by at most 2^-9 of it.
"""

from __future__ import annotations

import threading
from functools import cached_property

import numpy as np
import paddle
from paddle import Tensor

from ernietune_kernels import quantized
from ernietune_kernels.cpu.library import FEW_ROWS, Library, Matrix, kernels
from ernietune_kernels.cpu.onednn import OneDNN, onednn
from ernietune_kernels.grouped_gemm import blocks
from ernietune_kernels.quantized import QuantizedWeight

_ROUND = 32  # rows of a large product are rounded up to this, so that few shapes have to be prepared
_one_at_a_time = threading.Lock()  # oneDNN's prepared products hold the addresses of the call under way


class StoredWeight:
    """A weight [out, in], or a stack [experts, out, in], in stored form, and the products with it.

    A plain tensor is bfloat16; all of it has to be contiguous.
    """

    def __init__(self, weight: Tensor | QuantizedWeight) -> None:
        self.weight = weight

    @cached_property
    def matrix(self) -> Matrix:
        """The view that the C kernels take."""
        return Matrix.of(self.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.nbytes
        return int(self.weight.size * self.weight.element_size())

    def product(self, x: Tensor) -> Tensor:
        """fp32 x [N, in] -> fp32 [N, out]."""
        library = self._library(x)
        if library is None:
            return quantized.linear(x, self.weight)
        x = x.contiguous()
        if library.takes_many_rows or x.shape[0] <= FEW_ROWS:
            return library.product(x, self.matrix)
        return _large(library, x, self.matrix)

    def grouped(self, x: Tensor, counts: list[int]) -> Tensor:
        """Rows [N, in] sorted by expert, counts[e] of them for expert e -> [N, out]."""
        library = self._library(x)
        if library is None:
            return quantized.grouped_linear(x, self.weight, counts)
        x = x.contiguous()
        if library.takes_many_rows or max(counts) <= FEW_ROWS:
            return library.grouped(x, self.matrix, counts)
        pieces = []
        for e, begin, end in blocks(counts):
            rows, matrix = x[begin:end], self.matrix.expert(e)
            small = end - begin <= FEW_ROWS
            pieces.append(library.product(rows, matrix) if small else _large(library, rows, matrix))
        return paddle.concat(pieces)

    def _library(self, x: Tensor) -> Library | None:
        return kernels() if x.place.is_cpu_place() and x.dtype == paddle.float32 else None


def quantize_into(weight: QuantizedWeight, index: int | None, source: np.ndarray) -> None:
    """Fill a weight, or one expert of a stack, from bf16 bits (uint16) or fp32 numbers [out, in]."""
    source = np.ascontiguousarray(source)
    library = kernels()
    if library is not None:
        first = Matrix.of(weight)
        library.quantize(source, first if index is None else first.expert(index))
        return
    numbers = source if source.dtype == np.float32 else (source.astype(np.uint32) << 16).view(np.float32)
    filled = quantized.quantize(numbers, weight.bits, weight.group)
    for room, values in ((weight.codes, filled.codes), (weight.scale, filled.scale)):
        array = np.from_dlpack(room)
        np.copyto(array if index is None else array[index], values.numpy())


def _large(library: Library, x: Tensor, matrix: Matrix) -> Tensor:
    fast = onednn()
    if fast is not None:
        return _in_bf16(library, fast, x, matrix)
    panel = paddle.empty([matrix.out, matrix.width], "float32")
    library.widen(matrix, panel, 32)
    return paddle.matmul(x, panel, transpose_y=True)


def _in_bf16(library: Library, fast: OneDNN, x: Tensor, matrix: Matrix) -> Tensor:
    """The upper halves of all rows, then the lower ones, as one product; both sums added afterwards."""
    rows, out, width = x.shape[0], matrix.out, matrix.width
    padded = -(-rows // _ROUND) * _ROUND
    halves = paddle.empty([2 * padded, width], "bfloat16")
    high = halves.data_ptr()
    low = high + 2 * padded * width
    library.c.ernie_split(x.data_ptr(), high, low, rows, width)
    weight, panel = matrix.codes, None
    if matrix.bits != 16:
        panel = paddle.empty([out, width], "bfloat16")
        library.widen(matrix, panel, 16)
        weight = panel.data_ptr()
    both = paddle.empty([2 * padded, out], "float32")
    with _one_at_a_time:
        fast.product(high, weight, both.data_ptr(), 2 * padded, width, out)
    y = paddle.empty([rows, out], "float32")
    scale = matrix.scale if matrix.bits == 8 else None
    lower = both.data_ptr() + 4 * padded * out
    library.c.ernie_join(both.data_ptr(), lower, scale, y.data_ptr(), rows, out)
    return y
