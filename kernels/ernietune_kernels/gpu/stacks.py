"""Reading tiles of a stack of weights [E, O, I] as it is stored: bf16, int8, or two int4 codes a byte."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .tensors import Tensor


@dataclass(frozen=True)
class Stack:
    """Weights [E, O, I] of E experts.

    bits 16: `codes` holds the values. bits 8: int8 codes and a scale fp32 [E, O]. bits 4: uint8 codes
    [E, O, I / 2], the even column in the low half of a byte, 8 added to each; scales fp32 [E, O, I / group].
    """

    codes: Tensor
    scale: Tensor | None = None
    bits: int = 16
    group: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        experts, outputs, inputs = self.codes.shape
        return experts, outputs, inputs * 2 if self.bits == 4 else inputs

    @property
    def scales(self) -> Tensor:
        """The scale, or the codes where there is none and the kernel will not read it."""
        return self.codes if self.scale is None else self.scale


@triton.jit
def operand(values, UPCAST: tl.constexpr):
    """Values in the type that products take: bf16, or fp32 in the interpreter."""
    if UPCAST:
        return values.to(tl.float32)
    else:  # noqa: RET505 (Triton decides at compile time, and compiles what follows a plain return too)
        return values.to(tl.bfloat16)


@triton.jit
def tile_of(counts, experts, tile, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile; expert == experts behind the last tile."""
    index = tl.arange(0, EXPERTS)
    count = tl.load(counts + index, mask=index < experts, other=0)
    needed = (count + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(needed, 0)
    mine = tl.sum(((ends <= tile) & (index < experts)).to(tl.int32), 0)
    before = tl.sum(tl.where(index < mine, needed, 0), 0)
    first = tl.sum(tl.where(index < mine, count, 0), 0)
    end = first + tl.sum(tl.where(index == mine, count, 0), 0)
    return mine, first + (tile - before) * BLOCK_M, end


@triton.jit
def weight_tile(
    codes,
    scale,
    expert,
    o,
    first,
    outs,
    ins,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SCALED: tl.constexpr,
    MASK_O: tl.constexpr,
    MASK_I: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """W[expert, o, first : first + BLOCK_I] as an operand; bare codes unless SCALED.

    `codes` and `scale` are pointers, or [rows, 1] of them where the rows come of several stacks.
    Zero behind the last row where MASK_O and the last column where MASK_I; else nothing may lie there.
    """
    rows = expert.to(tl.int64) * outs + o.to(tl.int64)
    if BITS == 4:
        values = _int4_tile(codes, scale, rows, o, first, outs, ins, GROUP, BLOCK_I, MASK_O, MASK_I)
    else:
        i = first + tl.arange(0, BLOCK_I)
        places = codes + rows[:, None] * ins + i[None, :]
        values = _masked(places, o[:, None] < outs, i[None, :] < ins, 0, MASK_O, MASK_I)
        if SCALED and BITS == 8:
            inside = o[:, None] < outs
            values = values.to(tl.float32) * _masked(
                scale + rows[:, None], inside, inside, 0.0, MASK_O, False
            )
    return operand(values, UPCAST)


@triton.jit
def _masked(places, in_o, in_i, other, MASK_O: tl.constexpr, MASK_I: tl.constexpr):
    """A load without the masks that are not needed: a masked copy costs a predicate and holds up the loop."""
    if MASK_O and MASK_I:
        return tl.load(places, mask=in_o & in_i, other=other)
    elif MASK_O:  # noqa: RET505 (see operand)
        return tl.load(places, mask=in_o, other=other)
    elif MASK_I:
        return tl.load(places, mask=in_i, other=other)
    else:
        return tl.load(places)


# Four bytes of two int4 codes: their low and their high halves as bf16 numbers, 8 taken away. A nibble under
# the byte 0x43 is 128 + nibble in bf16; eleven instructions make eight numbers, and none is a conversion.
NIBBLES = tl.constexpr("""
{
.reg .b32 low, high, top, one, less;
mov.b32 top, 0x43434343;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC308C308;
and.b32 low, $4, 0x0F0F0F0F;
shr.u32 high, $4, 4;
and.b32 high, high, 0x0F0F0F0F;
prmt.b32 $0, low, top, 0x4140;
prmt.b32 $1, low, top, 0x4342;
prmt.b32 $2, high, top, 0x4140;
prmt.b32 $3, high, top, 0x4342;
fma.rn.bf16x2 $0, $0, one, less;
fma.rn.bf16x2 $1, $1, one, less;
fma.rn.bf16x2 $2, $2, one, less;
fma.rn.bf16x2 $3, $3, one, less;
}
""")


@triton.jit
def int4_product(
    left,
    codes,
    scale,
    expert,
    o,
    first,
    outs,
    ins,
    GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    MASK_I: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """left W[expert, o, first : first + BLOCK_I]^T where these columns share a scale, which goes on the sum.

    For few rows, where each weight is used once and unpacking is what takes the time: even and odd columns
    are two products, so that codes need not change their order.
    """
    rows = expert.to(tl.int64) * outs + o.to(tl.int64)
    half = first // 2 + tl.arange(0, BLOCK_I // 2)
    places = tl.multiple_of(codes + rows[:, None] * (ins // 2) + half[None, :], [16, 16])
    packed = _masked(places, o[:, None] < outs, half[None, :] < ins // 2, 0x88, False, MASK_I)
    if UPCAST:
        low, high = (packed & 0xF).to(tl.float32) - 8.0, (packed >> 4).to(tl.float32) - 8.0
    else:
        low, high = tl.inline_asm_elementwise(
            NIBBLES, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    even, odd = tl.split(left.reshape(left.shape[0], BLOCK_I // 2, 2))
    part = tl.dot(even, tl.trans(low), input_precision="ieee")
    part = tl.dot(odd, tl.trans(high), part, input_precision="ieee")
    factors = tl.load(scale + rows[:, None] * (ins // GROUP) + first // GROUP)
    return part * tl.trans(factors)


@triton.jit
def _int4_tile(
    codes,
    scale,
    rows,
    o,
    first,
    outs,
    ins,
    GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    MASK_O: tl.constexpr,
    MASK_I: tl.constexpr,
):
    """Scaled int4 values in fp32. One scale is read a row and group, not one a value."""
    half = first // 2 + tl.arange(0, BLOCK_I // 2)
    places = codes + rows[:, None] * (ins // 2) + half[None, :]
    if GROUP % 32 == 0:  # Then rows are whole 16 bytes, which the compiler cannot know of half a width.
        places = tl.multiple_of(places, [16, 16])
    packed = _masked(places, o[:, None] < outs, half[None, :] < ins // 2, 0x88, MASK_O, MASK_I)
    values = tl.interleave(_small_number(packed & 0xF), _small_number(packed >> 4))
    groups: tl.constexpr = BLOCK_I // GROUP if BLOCK_I > GROUP else 1
    a_row = ins // GROUP
    group = first // GROUP + tl.arange(0, groups)
    where = scale + rows[:, None] * a_row + group[None, :]
    factors = _masked(where, o[:, None] < outs, group[None, :] < a_row, 0.0, MASK_O, MASK_I)
    wide = values.reshape(values.shape[0], groups, BLOCK_I // groups) * factors[:, :, None]
    return wide.reshape(values.shape[0], BLOCK_I)


@triton.jit
def _small_number(nibble):
    """nibble - 8 in fp32: put into the mantissa of 2^23, which is cheaper than converting an integer."""
    return (nibble.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
