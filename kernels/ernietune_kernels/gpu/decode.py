"""Attention of one new token a sequence over its cached keys and values, long contexts split over programs.

All query heads of a key/value head are one tile, so that keys and values are read once; splits are joined by
their log-sum-exp in a second, small kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .runtime import launch, upcast
from .stacks import operand
from .tensors import Tensor, dtype_name, empty
from .tuning import tiles

TILES = {"BLOCK_S": 64, "num_warps": 4, "num_stages": 3}
# Enough programs for every multiprocessor of a large card to have two.
PROGRAMS = 264
LEAST_TOKENS = 128


@triton.jit
def decode_kernel(
    q,
    keys,
    values,
    slots,
    lengths,
    partial,
    log_sum,
    groups,
    repeat,
    longest,
    splits,
    per_split,
    scale,
    width,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One split of one key/value head of one sequence: its softmax-weighted values and log-sum-exp."""
    row, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head, column = tl.arange(0, G), tl.arange(0, D)
    query_rows = (row * groups + group) * repeat + head
    inside = (head[:, None] < repeat) & (column[None, :] < width)
    queries = tl.load(q + query_rows[:, None] * width + column[None, :], mask=inside, other=0.0)
    queries = operand(queries, UPCAST)
    length = tl.load(lengths + row)
    start = split * per_split
    stop = tl.minimum(start + per_split, length)
    peak = tl.full([G], float("-inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    output = tl.zeros([G, D], tl.float32)
    for first in range(start, stop, BLOCK_S):
        place = first + tl.arange(0, BLOCK_S)
        here = place < stop
        slot = tl.load(slots + row * longest + place, mask=here, other=0)
        where = (slot * groups + group)[:, None] * width + column[None, :]
        mask = here[:, None] & (column[None, :] < width)
        k = operand(tl.load(keys + where, mask=mask, other=0.0), UPCAST)
        v = operand(tl.load(values + where, mask=mask, other=0.0), UPCAST)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(here[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        output = output * shrink[:, None]
        output = tl.dot(operand(weights, UPCAST), v, output, input_precision="ieee")
        peak = higher
    # A split behind the end of its sequence counts for nothing: weight exp(-inf).
    some = total > 0
    places = query_rows * splits + split
    share = output / tl.where(some, total, 1.0)[:, None]
    tl.store(partial + places[:, None] * width + column[None, :], share, mask=inside)
    log = tl.where(some, tl.log(tl.where(some, total, 1.0)) + peak, float("-inf"))
    tl.store(log_sum + places, log, mask=head < repeat)


@triton.jit
def join_kernel(partial, log_sum, y, splits, width, S: tl.constexpr, D: tl.constexpr):
    """The splits of one query head, weighted by their share of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, S), tl.arange(0, D)
    logs = tl.load(log_sum + row * splits + split, mask=split < splits, other=float("-inf"))
    weights = tl.exp(logs - tl.max(logs, 0))
    weights = weights / tl.sum(weights, 0)
    places = (row * splits + split)[:, None] * width + column[None, :]
    mask = (split[:, None] < splits) & (column[None, :] < width)
    parts = tl.load(partial + places, mask=mask, other=0.0)
    result = tl.sum(parts * weights[:, None], 0)
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=column < width)


def decode_attention(
    q_BHd: Tensor, keys: Tensor, values: Tensor, slots_BS: Tensor, lengths_B: Tensor
) -> Tensor:
    """Attention [B, H, d] over the first `lengths` of each row's slots in keys and values [slots, KV, d].

    slots int64 [B, S], lengths int32 [B], each at least 1; softmax in fp32.
    """
    batch, heads, width = q_BHd.shape
    groups, longest = keys.shape[1], slots_BS.shape[1]
    repeat = heads // groups
    shape = tiles("decode", f"{repeat}x{width}", TILES)
    splits = split_count(batch * groups, longest)
    per_split = triton.cdiv(triton.cdiv(longest, splits), shape["BLOCK_S"]) * shape["BLOCK_S"]
    partial = empty([batch, heads, splits, width], "float32", q_BHd)
    log_sum = empty([batch, heads, splits], "float32", q_BHd)
    y = empty([batch, heads, width], dtype_name(q_BHd), q_BHd)
    d = triton.next_power_of_2(width)
    launch(
        decode_kernel,
        [batch, groups, splits],
        *(q_BHd, keys, values, slots_BS, lengths_B, partial, log_sum),
        *(groups, repeat, longest, splits, per_split, width**-0.5, width),
        **{"G": max(16, triton.next_power_of_2(repeat)), "D": d, "UPCAST": upcast(), **shape},
    )
    s = triton.next_power_of_2(splits)
    launch(join_kernel, [batch * heads], partial, log_sum, y, splits, width, S=s, D=d)
    return y


def split_count(programs: int, longest: int) -> int:
    """How many programs share a context: enough to fill a card, each with some work."""
    return max(1, min(PROGRAMS // programs, longest // LEAST_TOKENS))
