"""Cross-entropy of a linear head: fp32 logits of a few rows at a time, their gradient where they are read.

The first kernel multiplies in bf16, keeps the fp32 sums (torch's and Paddle's own product would round the
logits to bf16, which costs a log-probability of 20 its second decimal) and leaves each tile's maximum and sum
of exponentials behind; the last turns the logits into their gradient in one reading. The product with the
head that follows is the framework's own: its inner dimension is the vocabulary, which it sums in splits.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .runtime import capability, launch, upcast
from .tensors import Tensor, cast, concat, dtype_name, empty, matmul, zeros
from .tuning import tiles

# Logits (fp32) and their gradient (bf16) of the rows in work together: soft cap of the extra memory.
EXTRA_BYTES = 192 << 20
ROW_STEP = 128
GRADIENT_BLOCK = 4096
_TILES = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
# An A100 has neither the registers nor the shared memory for that.
_BEFORE_HOPPER = _TILES | {"BLOCK_N": 128, "num_stages": 3}


@triton.jit
def logits_kernel(
    hidden,
    head,
    logits,
    tile_max,
    tile_sum,
    rows,
    vocabulary,
    width,
    tiles_V,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of hidden @ head^T in fp32, with its row maxima and sums of exponentials."""
    # Row tiles change fastest: the programs that run together share a tile of the head, the larger operand.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Behind the last row and word those are read again, so that the loop needs no mask; none of it is stored.
    left = hidden + tl.minimum(m, rows - 1)[:, None].to(tl.int64) * width + k[None, :]
    right = head + tl.minimum(n, vocabulary - 1)[None, :].to(tl.int64) * width + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=start + k[None, :] < width, other=0.0)
            b = tl.load(right, mask=start + k[:, None] < width, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K
    inside = (m[:, None] < rows) & (n[None, :] < vocabulary)
    tl.store(logits + m[:, None].to(tl.int64) * vocabulary + n[None, :], total, mask=inside)
    bounded = tl.where(n[None, :] < vocabulary, total, float("-inf"))
    peak = tl.max(bounded, 1)
    places = m * tiles_V + tl.program_id(1)
    tl.store(tile_max + places, peak, mask=m < rows)
    tl.store(tile_sum + places, tl.sum(tl.exp(bounded - peak[:, None]), 1), mask=m < rows)


@triton.jit
def loss_kernel(logits, tile_max, tile_sum, labels, nll, log_total, vocabulary, tiles_V, BLOCK: tl.constexpr):
    """A row's log-sum-exp from its tiles' and the loss of its label."""
    row = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    inside = tile < tiles_V
    peaks = tl.load(tile_max + row * tiles_V + tile, mask=inside, other=float("-inf"))
    sums = tl.load(tile_sum + row * tiles_V + tile, mask=inside, other=0.0)
    peak = tl.max(peaks, 0)
    total = tl.log(tl.sum(sums * tl.exp(peaks - peak), 0)) + peak
    picked = tl.load(logits + row.to(tl.int64) * vocabulary + tl.load(labels + row))
    tl.store(log_total + row, total)
    tl.store(nll + row, total - picked)


@triton.jit
def gradient_kernel(logits, log_total, labels, grad, vocabulary, BLOCK: tl.constexpr):
    """softmax(logits) minus one at the label, in the gradient's type."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    value = tl.exp(tl.load(logits + row * vocabulary + column, mask=inside) - tl.load(log_total + row))
    value -= (column == tl.load(labels + row)).to(tl.float32)
    tl.store(grad + row * vocabulary + column, value.to(grad.dtype.element_ty), mask=inside)


def linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(negative log-likelihood fp32 [N], its gradient by the row's hidden state [N, D] or None).

    Labels are valid ids: unlabelled rows are dropped before. Memory beyond the results stays below
    EXTRA_BYTES whatever N, or that of ROW_STEP rows where a single step of rows takes more.
    """
    losses, gradients = [], []
    for part, labels in _parts(hidden_ND, labels_N, head_VD.shape[0]):
        logits, log_total, nll = _loss(part, head_VD, labels)
        losses.append(nll)
        if gradient:
            gradients.append(matmul(_logit_gradient(logits, log_total, labels, head_VD), head_VD))
    if not losses:
        return empty([0], "float32", hidden_ND), hidden_ND if gradient else None
    return concat(losses), concat(gradients) if gradient else None


def head_gradient(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, grad_N: Tensor) -> Tensor:
    """Gradient fp32 [V, D] of sum(grad * nll) by the head; the logits are formed a second time."""
    total = zeros(head_VD.shape, "float32", head_VD)
    start = 0
    for part, labels in _parts(hidden_ND, labels_N, head_VD.shape[0]):
        logits, log_total, _ = _loss(part, head_VD, labels)
        grad = _logit_gradient(logits, log_total, labels, head_VD)
        outer = grad_N[start : start + part.shape[0]].reshape([-1, 1])
        scaled = part * cast(outer, dtype_name(part))
        total += cast(matmul(grad, scaled, transpose_x=True), "float32")
        start += part.shape[0]
    return total


def rows_at_a_time(vocabulary: int) -> int:
    """How many rows' logits and gradients (6 bytes a word) fit EXTRA_BYTES, in steps of ROW_STEP."""
    return max(1, EXTRA_BYTES // (6 * vocabulary) // ROW_STEP) * ROW_STEP


def _parts(hidden: Tensor, labels: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    step = rows_at_a_time(vocabulary)
    for start in range(0, hidden.shape[0], step):
        yield hidden[start : start + step], labels[start : start + step]


def _loss(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits fp32 [n, V], log-sum-exp [n], nll [n]) of the rows in work."""
    (rows, width), vocabulary = hidden.shape, head.shape[0]
    default = _TILES if capability() >= 90 else _BEFORE_HOPPER
    shape = tiles("logits", dtype_name(hidden), default)
    tiles_v = triton.cdiv(vocabulary, shape["BLOCK_N"])
    logits = empty([rows, vocabulary], "float32", hidden)
    tile_max, tile_sum = (empty([rows, tiles_v], "float32", hidden) for _ in range(2))
    log_total, nll = (empty([rows], "float32", hidden) for _ in range(2))
    grid = [triton.cdiv(rows, shape["BLOCK_M"]), tiles_v]
    arguments = (hidden, head, logits, tile_max, tile_sum, rows, vocabulary, width, tiles_v)
    even = width % shape["BLOCK_K"] == 0
    launch(logits_kernel, grid, *arguments, EVEN_K=even, UPCAST=upcast(), **shape)
    block = triton.next_power_of_2(tiles_v)
    launch(
        loss_kernel,
        [rows],
        *(logits, tile_max, tile_sum, labels, nll, log_total, vocabulary, tiles_v),
        BLOCK=block,
    )
    return logits, log_total, nll


def _logit_gradient(logits: Tensor, log_total: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    grad = empty([rows, vocabulary], dtype_name(head), logits)
    grid = [rows, triton.cdiv(vocabulary, GRADIENT_BLOCK)]
    launch(gradient_kernel, grid, logits, log_total, labels, grad, vocabulary, BLOCK=GRADIENT_BLOCK)
    return grad
