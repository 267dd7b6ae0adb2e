"""The adapters' own products: rows by a factor to the rank's width, and the factors' gradients.

Letters as in `grouped`. Both are bound by reading x: the tensor cores have little to do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stacks import operand, tile_of


@triton.jit
def narrow_kernel(
    x,
    source,
    factor,
    y,
    counts,
    experts,
    stride,
    first_column,
    inner,
    rank,
    factor_scale,
    TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """scale * x A^T for A [E, r, inner], or scale * x B for B [E, inner, r] when TRANSPOSED."""
    expert, first, end = tile_of(counts, experts, tl.program_id(0), EXPERTS, BLOCK_M)
    if expert >= experts:
        return
    m = first + tl.arange(0, BLOCK_M)
    valid = m < end
    m = m.to(tl.int64)
    rows = tl.load(source + m, mask=valid, other=0).to(tl.int64) if GATHER else m
    r, k = tl.arange(0, R), tl.arange(0, BLOCK_K)
    base = factor + expert.to(tl.int64) * rank * inner
    total = tl.zeros([BLOCK_M, R], tl.float32)
    for start in range(0, inner, BLOCK_K):
        column = start + k
        mask = valid[:, None] & (column[None, :] < inner)
        left = tl.load(x + rows[:, None] * stride + first_column + column[None, :], mask=mask, other=0.0)
        inside = (column[:, None] < inner) & (r[None, :] < rank)
        if TRANSPOSED:
            right = tl.load(base + column[:, None] * rank + r[None, :], mask=inside, other=0.0)
        else:
            right = tl.load(base + r[None, :] * inner + column[:, None], mask=inside, other=0.0)
        total = tl.dot(operand(left, UPCAST), operand(right, UPCAST), total, input_precision="ieee")
    mask = valid[:, None] & (r[None, :] < rank)
    tl.store(y + m[:, None] * rank + r[None, :], (total * factor_scale).to(y.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    narrow,
    x,
    source,
    y,
    counts,
    experts,
    stride,
    first_column,
    width,
    rank,
    TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Per expert the sum over its rows of narrow^T x: [r, width], stored [width, r] when TRANSPOSED.

    One program sums all rows of its expert, always in the same order.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, EXPERTS)
    count = tl.load(counts + index, mask=index < experts, other=0)
    first = tl.sum(tl.where(index < expert, count, 0), 0)
    end = first + tl.sum(tl.where(index == expert, count, 0), 0)
    r, n = tl.arange(0, R), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([R, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        valid = m < end
        m = m.to(tl.int64)
        rows = tl.load(source + m, mask=valid, other=0).to(tl.int64) if GATHER else m
        left = tl.load(
            narrow + m[None, :] * rank + r[:, None], mask=valid[None, :] & (r[:, None] < rank), other=0.0
        )
        right = tl.load(
            x + rows[:, None] * stride + first_column + n[None, :],
            mask=valid[:, None] & (n[None, :] < width),
            other=0.0,
        )
        total = tl.dot(operand(left, UPCAST), operand(right, UPCAST), total, input_precision="ieee")
    inside = (r[:, None] < rank) & (n[None, :] < width)
    base = y + expert.to(tl.int64) * rank * width
    if TRANSPOSED:
        tl.store(base + n[None, :] * rank + r[:, None], total.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(base + r[:, None] * width + n[None, :], total.to(y.dtype.element_ty), mask=inside)
