"""FP8 (e4m3) products of expert blocks: 1 x 128 scales of the rows, 128 x 128 scales of the frozen stack.

A block's product of 128 inner values is finished by the tensor core and added in fp32 with both scales, so no
sum is kept in the tensor core's own, shorter accumulator for longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .grouped import add_low_rank, source_rows, swizzled
from .products import Factor, Rows, padded_rank, rank_of, row_constants
from .runtime import launch, upcast
from .stacks import tile_of
from .tensors import Tensor, empty
from .tuning import tiles

BLOCK = 128
ROWS = 32  # that are quantised together
TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 4}


@dataclass(frozen=True)
class Fp8:
    """e4m3 codes and fp32 scales: rows [N, I] with [N, I / 128], or a stack [E, O, I] with its blocks'."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return tuple(self.codes.shape)


@dataclass(frozen=True)
class Fp8Table:
    """A stack whose matrices lie apart: int64 addresses [E] of their codes and of their scales."""

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int, int]


@triton.jit
def _nearest_e4m3(values):
    """The nearest e4m3 number, ties to even, still in fp32: the interpreter's own cast loses a carry."""
    power = (values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power, 0.015625) / 8.0
    # Adding and taking away 1.5 * 2^23 rounds an fp32 number to an integer, ties to even.
    return ((values / step + 12582912.0) - 12582912.0) * step


@triton.jit
def quantize_kernel(
    x,
    codes,
    scale,
    height,
    width,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """ROWS x BLOCK values of a matrix [height, width]: a scale for EACH row of them, or one for all."""
    tile, block, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None] < height) & (column < width)
    places = (matrix * height + row[:, None]) * width + column
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    if EACH:
        factor = tl.where(largest > 0, largest / 448.0, 1.0)
        tl.store(scale + row.to(tl.int64) * blocks + block, factor, mask=row < height)
        rounded = values / factor[:, None]
    else:
        peak = tl.max(largest, 0)
        factor = tl.where(peak > 0, peak / 448.0, 1.0)
        tl.store(scale + (matrix * tl.num_programs(0) + tile) * blocks + block, factor)
        rounded = values / factor
    rounded = tl.minimum(tl.maximum(rounded, -448.0), 448.0)
    if UPCAST:
        rounded = _nearest_e4m3(rounded)
    tl.store(codes + places, rounded.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def fp8_kernel(
    x,
    x_scale,
    w,
    w_scale,
    narrow,
    wide,
    y,
    counts,
    experts,
    tiles_M,
    outs,
    ins,
    rank,
    FORWARD: tl.constexpr,
    APART: tl.constexpr,
    LORA: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of x W^T for a stack [E, outs, ins], plus the low-rank part, whose factor lies as FORWARD says.

    BLOCK_N divides BLOCK: a tile's columns share the stack's scale, which is one number a step.
    """
    tile_M, tile_N = swizzled(tl.program_id(0), tiles_M, tl.cdiv(outs, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(counts, experts, tile_M, EXPERTS, BLOCK_M)
    if expert >= experts:
        return
    m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = source_rows(counts, m, end, False)
    n = tile_N * BLOCK_N
    k = tl.arange(0, BLOCK)
    o = tl.minimum(n + tl.arange(0, BLOCK_N), outs - 1).to(tl.int64)
    blocks = tl.cdiv(ins, BLOCK)
    stack, scales = _matrix(
        w, w_scale, expert, outs.to(tl.int64) * ins, tl.cdiv(outs, BLOCK) * blocks, APART, x.dtype.element_ty
    )
    left_places = x + rows[:, None] * ins + k[None, :]
    right_places = stack + o[:, None] * ins + k[None, :]
    if EVEN:  # Of an address from a table the compiler does not know that it can be read 16 bytes at a time.
        right_places = tl.multiple_of(right_places, [16, 16])
    scales += (n // BLOCK) * blocks
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row_scales = x_scale + rows * blocks
    factor = tl.load(row_scales) * tl.load(scales)
    for block in range(blocks):
        start = block * BLOCK
        # Asked for a turn ahead: nothing waits for it. The last turn asks for its own again.
        later = tl.minimum(block + 1, blocks - 1)
        coming = tl.load(row_scales + later) * tl.load(scales + later)
        if EVEN:
            left, right = tl.load(left_places + start), tl.load(right_places + start)
        else:
            inside = start + k[None, :] < ins
            left = tl.load(left_places + start, mask=inside, other=0.0)
            right = tl.load(right_places + start, mask=inside, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, tl.trans(right), input_precision="ieee") * factor[:, None]
        factor = coming
    valid = m < end
    if LORA:
        total = add_low_rank(
            total, narrow, wide, expert, m, valid, n, rank, outs, FORWARD, BLOCK_N, R, UPCAST
        )
    columns = n + tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (columns[None, :] < outs)
    tl.store(y + m[:, None] * outs + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _matrix(codes, scale, expert, size, blocks, APART: tl.constexpr, TYPE: tl.constexpr):
    """Where an expert's codes and scales begin; APART: their addresses stand in tables."""
    if APART:
        start = tl.load(codes + expert).to(tl.pointer_type(TYPE))
        return start, tl.load(scale + expert).to(tl.pointer_type(tl.float32))
    else:  # noqa: RET505 (Triton compiles what follows a plain return too)
        return codes + expert.to(tl.int64) * size, scale + expert.to(tl.int64) * blocks


@triton.jit
def turn_kernel(
    codes,
    scale,
    turned,
    turned_scale,
    outs,
    ins,
    APART: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of an expert's matrix [outs, ins], and its scale, to their places in the transposed one."""
    expert, block_O, block_I = tl.program_id(2), tl.program_id(0), tl.program_id(1)
    blocks_O, blocks_I = tl.num_programs(0), tl.num_programs(1)
    size = outs.to(tl.int64) * ins
    matrix, scales = _matrix(codes, scale, expert, size, blocks_O * blocks_I, APART, turned.dtype.element_ty)
    o, i = block_O * BLOCK + tl.arange(0, BLOCK), block_I * BLOCK + tl.arange(0, BLOCK)
    places = matrix + o[:, None].to(tl.int64) * ins + i[None, :]
    if EVEN:
        places = tl.multiple_of(places, [16, 16])
    tile = tl.load(places, mask=(o[:, None] < outs) & (i[None, :] < ins), other=0.0)
    there = turned + expert.to(tl.int64) * size + i[:, None].to(tl.int64) * outs + o[None, :]
    tl.store(there, tl.trans(tile), mask=(i[:, None] < ins) & (o[None, :] < outs))
    here = tl.load(scales + block_O * blocks_I + block_I)
    tl.store(turned_scale + (expert * blocks_I + block_I) * blocks_O + block_O, here)


def quantize_rows(x_NI: Tensor) -> Fp8:
    """Activations or gradients, a scale for every 128 columns of each row."""
    rows, width = x_NI.shape
    blocks = triton.cdiv(width, BLOCK)
    found = Fp8(empty([rows, width], "float8_e4m3fn", x_NI), empty([rows, blocks], "float32", x_NI))
    _quantize(x_NI, found, [triton.cdiv(rows, ROWS), blocks, 1], (rows, width), ROWS, each=True)
    return found


def quantize_blocks(w_EOI: Tensor) -> Fp8:
    """Frozen weights, a scale for every 128 x 128 values."""
    experts, outputs, width = w_EOI.shape
    grid = [triton.cdiv(outputs, BLOCK), triton.cdiv(width, BLOCK), experts]
    codes = empty([experts, outputs, width], "float8_e4m3fn", w_EOI)
    found = Fp8(codes, empty([experts, grid[0], grid[1]], "float32", w_EOI))
    _quantize(w_EOI, found, grid, (outputs, width), BLOCK, each=False)
    return found


def _quantize(x: Tensor, found: Fp8, grid: list[int], size: tuple[int, int], rows: int, each: bool) -> None:
    constants = {"ROWS": rows, "BLOCK": BLOCK, "EACH": each, "UPCAST": upcast()}
    warps = 4 if each else 8
    launch(quantize_kernel, grid, x, found.codes, found.scale, *size, grid[1], **constants, num_warps=warps)


def turned(stack: Fp8 | Fp8Table) -> Fp8:
    """The stack [E, I, O] of a stack [E, O, I]; blocks of 128 x 128 keep their scales."""
    experts, outputs, inputs = stack.shape
    grid = [triton.cdiv(outputs, BLOCK), triton.cdiv(inputs, BLOCK), experts]
    codes = empty([experts, inputs, outputs], "float8_e4m3fn", stack.codes)
    found = Fp8(codes, empty([experts, grid[1], grid[0]], "float32", stack.codes))
    form = {"APART": isinstance(stack, Fp8Table), "EVEN": inputs % BLOCK == 0, "BLOCK": BLOCK}
    operands = (stack.codes, stack.scale, found.codes, found.scale)
    launch(turn_kernel, grid, *operands, outputs, inputs, **form, num_warps=8)
    return found


def grouped_fp8(
    x: Fp8,
    rows: Rows,
    stack: Fp8 | Fp8Table,
    dtype: str,
    factor: Factor | None = None,
    forward: bool = True,
) -> Tensor:
    """x W^T of quantised rows sorted by expert, or x W for the input gradient, in `dtype` -> [N, O or I].

    Tensor cores want both operands of FP8 along the inner axis, so the gradient's stack is turned first, into
    memory that lasts as long as the call: as many bytes as the stack has.
    """
    stack = stack if forward else turned(stack)
    _, outputs, inputs = stack.shape
    y = empty([rows.total, outputs], dtype, x.codes)
    shape = tiles("fp8", "e4m3", TILES)
    tiles_m = rows.tiles(shape["BLOCK_M"])
    pair = (y, y) if factor is None else (factor.narrow, factor.wide)
    operands = (x.codes, x.scale, stack.codes, stack.scale, *pair, y, rows.counts)
    sizes = (rows.experts, tiles_m, outputs, inputs, rank_of(factor))
    lora = {"LORA": factor is not None, "R": padded_rank(rank_of(factor)), "FORWARD": forward}
    form = {"APART": isinstance(stack, Fp8Table), "EVEN": inputs % BLOCK == 0, "BLOCK": BLOCK}
    constants = {**form, **lora, **row_constants(rows), **shape}
    del constants["GATHER"]
    launch(fp8_kernel, [tiles_m * triton.cdiv(outputs, shape["BLOCK_N"])], *operands, *sizes, **constants)
    return y
