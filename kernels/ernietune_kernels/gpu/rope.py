"""Rotary embedding of all heads of q and k in one launch, in fp32; 1-D and 3-D differ in the angles alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .runtime import launch
from .tensors import Tensor, dtype_name, empty


@triton.jit
def _rotate(x, y, row, heads, cos, sin, sign, pairs, H: tl.constexpr, F: tl.constexpr):
    """The pairs (x[2j], x[2j+1]) of every head of one token, read and written side by side."""
    head, column = tl.arange(0, H)[:, None], tl.arange(0, 2 * F)[None, :]
    inside = (head < heads) & (column < 2 * pairs)
    offsets = (row * heads + head) * (2 * pairs) + column
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(values.reshape(H, F, 2))
    turned = sign * sin
    rotated = tl.join(even * cos - odd * turned, odd * cos + even * turned).reshape(H, 2 * F)
    tl.store(y + offsets, rotated.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_heads,
    k_heads,
    pairs,
    sign,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    F: tl.constexpr,
):
    """One program a token; sign -1 turns back, which is the gradient."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, F)[None, :]
    c = tl.load(cos + row * pairs + pair, mask=pair < pairs, other=0.0)
    s = tl.load(sin + row * pairs + pair, mask=pair < pairs, other=0.0)
    _rotate(q, q_out, row, q_heads, c, s, sign, pairs, HQ, F)
    _rotate(k, k_out, row, k_heads, c, s, sign, pairs, HK, F)


def rope(
    q_THd: Tensor, k_TKd: Tensor, cos_TF: Tensor, sin_TF: Tensor, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k rotated by the tokens' angles (fp32 cos and sin [T, d/2]), or `backward`: their gradients."""
    tokens, q_heads, width = q_THd.shape
    k_heads, pairs = k_TKd.shape[1], width // 2
    q_out = empty(q_THd.shape, dtype_name(q_THd), q_THd)
    k_out = empty(k_TKd.shape, dtype_name(k_TKd), k_TKd)
    sizes = {name: triton.next_power_of_2(n) for name, n in (("HQ", q_heads), ("HK", k_heads), ("F", pairs))}
    sign = -1.0 if backward else 1.0
    arguments = (q_THd, k_TKd, q_out, k_out, cos_TF, sin_TF, q_heads, k_heads, pairs, sign)
    launch(rope_kernel, [tokens], *arguments, **sizes)
    return q_out, k_out
