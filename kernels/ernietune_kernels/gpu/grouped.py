"""Products of expert blocks with their low-rank part: rows sorted by expert, stacks read as they are stored.

One kernel serves forward and input gradient, every storage form, experts and (as one expert) dense layers: a
stack [E, O, I] is read along I for y = x W^T and along O for dx = dy W. Row tiles find their expert from the
counts on the device, so that no launch waits for the host.

Letters: N rows, E experts, I inputs, O outputs, r rank. Adapters: A [E, r, I], B [E, O, r].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .stacks import int4_product, operand, tile_of, weight_tile


@triton.jit
def swizzled(tile, tiles_M, tiles_N, GROUP_M: tl.constexpr):
    """(row tile, column tile): columns change slowest within a group of row tiles, to read a stack once."""
    group = tile // (GROUP_M * tiles_N)
    height = tl.minimum(tiles_M - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_N)
    return group * GROUP_M + within % height, within // height


@triton.jit
def source_rows(source, m, end, GATHER: tl.constexpr):
    """Which rows of the operand a tile reads: behind the expert's last row that one again, so that no load of
    the inner loop needs a mask. What comes of it is not stored.
    """
    m = tl.minimum(m, end - 1)
    if GATHER:
        return tl.load(source + m)
    else:  # noqa: RET505 (Triton compiles what follows a plain return too)
        return m


@triton.jit
def row_tile(places, column, inner, EVEN_K: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of the rows, zero behind their last column."""
    if EVEN_K:
        return operand(tl.load(places), UPCAST)
    else:  # noqa: RET505
        return operand(tl.load(places, mask=column[None, :] < inner, other=0.0), UPCAST)


@triton.jit
def add_forward(
    total,
    left,
    codes,
    scale,
    expert,
    o,
    first,
    outs,
    ins,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """total + left W[expert, o]^T over the columns of `left`, the stack's from
    `first` on; codes of int8 are taken as they are.
    """
    BLOCK_K: tl.constexpr = left.shape[1]
    if BITS == 4 and left.shape[0] < 64 and BLOCK_K <= GROUP:
        return total + int4_product(
            left, codes, scale, expert, o, first, outs, ins, GROUP, BLOCK_K, not EVEN_K, UPCAST
        )
    else:  # noqa: RET505
        right = weight_tile(
            codes,
            scale,
            expert,
            o,
            first,
            outs,
            ins,
            BITS,
            GROUP,
            BLOCK_K,
            BITS == 4,
            False,
            not EVEN_K,
            UPCAST,
        )
        return tl.dot(left, tl.trans(right), total, input_precision="ieee")


@triton.jit
def add_low_rank(
    total,
    narrow,
    wide,
    expert,
    rows,
    valid,
    n,
    rank,
    width,
    FORWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """total + narrow B^T (B [E, width, r]) or, when not FORWARD, narrow A (A [E, r, width])."""
    r = tl.arange(0, R)
    columns = n + tl.arange(0, BLOCK_N)
    mask = valid[:, None] & (r[None, :] < rank)
    left = operand(tl.load(narrow + rows[:, None] * rank + r[None, :], mask=mask, other=0.0), UPCAST)
    inside = (r[:, None] < rank) & (columns[None, :] < width)
    base = wide + expert.to(tl.int64) * rank * width
    if FORWARD:
        right = tl.load(base + columns[None, :] * rank + r[:, None], mask=inside, other=0.0)
    else:
        right = tl.load(base + r[:, None] * width + columns[None, :], mask=inside, other=0.0)
    return tl.dot(left, operand(right, UPCAST), total, input_precision="ieee")


@triton.jit
def grouped_kernel(
    x,
    source,
    y,
    counts,
    codes0,
    scale0,
    narrow0,
    wide0,
    first0,
    codes1,
    scale1,
    narrow1,
    wide1,
    first1,
    experts,
    tiles_M,
    stride,
    outs,
    ins,
    rank,
    FORWARD: tl.constexpr,
    TERMS: tl.constexpr,
    LORA: tl.constexpr,
    GATHER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of the sum of one or two grouped products, with their low-rank parts.

    x W^T, or x W when not FORWARD. Two terms are one loop over both inner axes, so that copies never run dry.
    STAGES on a loop has all its loads made ahead, also those (scales) that no product takes directly.
    """
    inner = ins if FORWARD else outs
    width = outs if FORWARD else ins
    tile_M, tile_N = swizzled(tl.program_id(0), tiles_M, tl.cdiv(width, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(counts, experts, tile_M, EXPERTS, BLOCK_M)
    if expert >= experts:
        return
    m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = source_rows(source, m, end, GATHER)
    n = tile_N * BLOCK_N
    columns = n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    line = rows[:, None] * stride + k[None, :]
    steps = tl.cdiv(inner, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, TERMS * steps, num_stages=STAGES):
        codes, scale, column, start = codes0, scale0, first0, step * BLOCK_K
        if TERMS == 2:
            second = step >= steps
            codes, scale = tl.where(second, codes1, codes0), tl.where(second, scale1, scale0)
            column, start = tl.where(second, first1, first0), tl.where(second, step - steps, step) * BLOCK_K
        left = row_tile(x + line + (column + start), start + k, inner, EVEN_K, UPCAST)
        if FORWARD:
            o = tl.minimum(columns, outs - 1)
            total = add_forward(
                total, left, codes, scale, expert, o, start, outs, ins, BITS, GROUP, EVEN_K, UPCAST
            )
        else:
            right = weight_tile(
                codes,
                scale,
                expert,
                start + k,
                n,
                outs,
                ins,
                BITS,
                GROUP,
                BLOCK_N,
                True,
                not EVEN_K,
                not EVEN_N,
                UPCAST,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
    if FORWARD and BITS == 8:
        places = scale0 + expert.to(tl.int64) * outs + columns
        total *= tl.load(places, mask=columns < outs, other=0.0)[None, :]
    valid = m < end
    if LORA:
        total = add_low_rank(
            total, narrow0, wide0, expert, m, valid, n, rank, width, FORWARD, BLOCK_N, R, UPCAST
        )
        if TERMS == 2:
            total = add_low_rank(
                total, narrow1, wide1, expert, m, valid, n, rank, width, FORWARD, BLOCK_N, R, UPCAST
            )
    inside = valid[:, None] & (columns[None, :] < width)
    tl.store(y + m[:, None] * width + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_up_kernel(
    x,
    source,
    row_weight,
    gate_up,
    h,
    counts,
    gate_codes,
    gate_scale,
    gate_narrow,
    gate_wide,
    up_codes,
    up_scale,
    up_narrow,
    up_wide,
    experts,
    tiles_M,
    outs,
    ins,
    rank,
    LORA: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The same tile of gate and up from one reading of x, and h = silu(gate) * up * the row's weight.

    Both are one product of twice the width: the first half of the tile's outputs are gate's, the second up's.
    """
    tile_M, tile_N = swizzled(tl.program_id(0), tiles_M, tl.cdiv(outs, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(counts, experts, tile_M, EXPERTS, BLOCK_M)
    if expert >= experts:
        return
    m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = source_rows(source, m, end, GATHER)
    valid = m < end
    o = tile_N * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, 2 * BLOCK_N)
    both = tl.minimum(tile_N * BLOCK_N + half % BLOCK_N, outs - 1)
    of_gate = half[:, None] < BLOCK_N
    codes = tl.multiple_of(tl.where(of_gate, gate_codes, up_codes), [16, 16])
    scale = tl.where(of_gate, gate_scale, up_scale)
    k = tl.arange(0, BLOCK_K)
    line = rows[:, None] * ins + k[None, :]
    total = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for start in tl.range(0, ins, BLOCK_K, num_stages=STAGES):
        left = row_tile(x + line + start, start + k, ins, EVEN_K, UPCAST)
        total = add_forward(
            total, left, codes, scale, expert, both, start, outs, ins, BITS, GROUP, EVEN_K, UPCAST
        )
    gate, up = tl.split(total.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
    if BITS == 8:
        places = expert.to(tl.int64) * outs + o
        gate *= tl.load(gate_scale + places, mask=o < outs, other=0.0)[None, :]
        up *= tl.load(up_scale + places, mask=o < outs, other=0.0)[None, :]
    n = tile_N * BLOCK_N
    if LORA:
        gate = add_low_rank(
            gate, gate_narrow, gate_wide, expert, m, valid, n, rank, outs, True, BLOCK_N, R, UPCAST
        )
        up = add_low_rank(up, up_narrow, up_wide, expert, m, valid, n, rank, outs, True, BLOCK_N, R, UPCAST)
    inside = valid[:, None] & (o[None, :] < outs)
    places = gate_up + m[:, None] * (2 * outs) + o[None, :]
    gate, up = gate.to(gate_up.dtype.element_ty), up.to(gate_up.dtype.element_ty)
    tl.store(places, gate, mask=inside)
    tl.store(places + outs, up, mask=inside)
    # From the rounded halves, as the backward pass will read them.
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value *= tl.load(row_weight + m, mask=valid, other=0.0)[:, None]
    tl.store(h + m[:, None] * outs + o[None, :], value.to(h.dtype.element_ty), mask=inside)
