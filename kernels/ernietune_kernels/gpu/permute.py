"""Sorting (token, choice) pairs by expert, the router's choice, and bringing the experts' rows back."""

from __future__ import annotations

import triton
import triton.language as tl

from .runtime import launch
from .tensors import Tensor, dtype_name, empty, zeros


@triton.jit
def route_kernel(logits, bias, weights, chosen, experts, k, E: tl.constexpr, K: tl.constexpr):
    """Softmax in fp32; the k largest of probability + bias; their probabilities, summing to one.

    Ties go to the lower expert. One program a token.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, E)
    inside = index < experts
    values = tl.load(logits + row * experts + index, mask=inside, other=float("-inf")).to(tl.float32)
    exponentials = tl.exp(values - tl.max(values, 0))
    probabilities = exponentials / tl.sum(exponentials, 0)
    ranked = tl.where(inside, probabilities + tl.load(bias + index, mask=inside, other=0.0), float("-inf"))
    choice = tl.arange(0, K)
    picked = tl.zeros([K], tl.float32)
    ids = tl.zeros([K], tl.int64)
    for place in range(k):
        best = tl.min(tl.where(ranked == tl.max(ranked, 0), index, E), 0)
        picked = tl.where(choice == place, tl.sum(tl.where(index == best, probabilities, 0.0), 0), picked)
        ids = tl.where(choice == place, best.to(tl.int64), ids)
        ranked = tl.where(index == best, float("-inf"), ranked)
    total = tl.maximum(tl.sum(picked, 0), 1e-12)
    tl.store(weights + row * k + choice, picked / total, mask=choice < k)
    tl.store(chosen + row * k + choice, ids, mask=choice < k)


@triton.jit
def route_backward_kernel(grad, weights, chosen, grad_logits, experts, k, E: tl.constexpr, K: tl.constexpr):
    """The chosen weights are a softmax over the chosen logits alone; the others take no gradient."""
    row = tl.program_id(0).to(tl.int64)
    choice, index = tl.arange(0, K), tl.arange(0, E)
    inside = choice < k
    outer = tl.load(grad + row * k + choice, mask=inside, other=0.0)
    weight = tl.load(weights + row * k + choice, mask=inside, other=0.0)
    ids = tl.load(chosen + row * k + choice, mask=inside, other=-1)
    inner = weight * (outer - tl.sum(outer * weight, 0))
    spread = tl.sum(tl.where(ids[:, None] == index[None, :], inner[:, None], 0.0), 0)
    tl.store(grad_logits + row * experts + index, spread, mask=index < experts)


@triton.jit
def count_kernel(chosen, counts, pairs, experts, E: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, e]: pairs of a block of BLOCK that chose expert e."""
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + pair, mask=pair < pairs, other=-1)
    hits = (expert[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)
    index = tl.arange(0, E)
    tl.store(counts + block * experts + index, tl.sum(hits, 0), mask=index < experts)


@triton.jit
def offset_kernel(counts, totals, blocks, experts, E: tl.constexpr, MANY: tl.constexpr):
    """counts[block, e] becomes the place of the block's first pair of expert e; totals[e] the rows of e.

    One program takes MANY blocks at a time: one after the other would wait for the memory once a block.
    """
    index, line = tl.arange(0, E), tl.arange(0, MANY)
    running = tl.zeros([E], tl.int32)
    for start in range(0, blocks, MANY):
        inside = (start + line[:, None] < blocks) & (index[None, :] < experts)
        places = (start + line[:, None]) * experts + index[None, :]
        running += tl.sum(tl.load(counts + places, mask=inside, other=0), 0)
    tl.store(totals + index, running, mask=index < experts)
    place = tl.cumsum(running, 0) - running
    for start in range(0, blocks, MANY):
        inside = (start + line[:, None] < blocks) & (index[None, :] < experts)
        places = (start + line[:, None]) * experts + index[None, :]
        count = tl.load(counts + places, mask=inside, other=0)
        tl.store(counts + places, place[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        place += tl.sum(count, 0)


@triton.jit
def sort_kernel(chosen, places, order, inverse, pairs, experts, E: tl.constexpr, BLOCK: tl.constexpr):
    """A stable counting sort: a pair's place is its expert's, plus the earlier pairs of the block with it."""
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    expert = tl.load(chosen + pair, mask=inside, other=-1)
    index = tl.arange(0, E)
    hits = (expert[:, None] == index[None, :]).to(tl.int32)
    first = tl.load(places + block * experts + index, mask=index < experts, other=0)
    earlier = tl.cumsum(hits, 0) - hits
    place = tl.sum(hits * (first[None, :] + earlier), 1).to(tl.int64)
    tl.store(inverse + pair, place, mask=inside)
    tl.store(order + place, pair.to(tl.int64), mask=inside)


@triton.jit
def combine_kernel(rows, inverse, weights, y, k, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """A token's k rows added in fp32, in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(k):
        place = tl.load(inverse + token * k + choice)
        value = tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * k + choice)
        total += value
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def spread_kernel(grad, rows, inverse, weights, grad_rows, grad_weights, k, width, BLOCK: tl.constexpr):
    """The way back of a weighted combine: a token's gradient times the weight to each of its rows, and its
    product with the row to the weight. One program a pair, so that the sum has one order.
    """
    pair = tl.program_id(0).to(tl.int64)
    place = tl.load(inverse + pair)
    weight = tl.load(weights + pair)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        outer = tl.load(grad + pair // k * width + column, mask=inside, other=0.0).to(tl.float32)
        total += outer * tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            grad_rows + place * width + column, (outer * weight).to(grad_rows.dtype.element_ty), mask=inside
        )
    tl.store(grad_weights + pair, tl.sum(total, 0))


SORT_BLOCK = 256
OFFSET_BLOCKS = 64
COMBINE_BLOCK = 1024


def route(logits_NE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights fp32 [N, k] that sum to one, experts int64 [N, k]); the bias selects only."""
    rows, experts = logits_NE.shape
    weights, chosen = empty([rows, k], "float32", logits_NE), empty([rows, k], "int64", logits_NE)
    sizes = {"E": triton.next_power_of_2(experts), "K": triton.next_power_of_2(k)}
    launch(route_kernel, [rows], logits_NE, bias_E, weights, chosen, experts, k, num_warps=1, **sizes)
    return weights, chosen


def route_backward(grad_Nk: Tensor, weights_Nk: Tensor, chosen_Nk: Tensor, experts: int) -> Tensor:
    """Gradient of the logits fp32 [N, E] by that of the weights."""
    rows, k = weights_Nk.shape
    grad = empty([rows, experts], "float32", weights_Nk)
    sizes = {"E": triton.next_power_of_2(experts), "K": triton.next_power_of_2(k)}
    launch(route_backward_kernel, [rows], grad_Nk, weights_Nk, chosen_Nk, grad, experts, k, **sizes)
    return grad


def sort_by_expert(experts_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order int64 [N k], inverse int64 [N k], counts int32 [E]) of a stable sort on the device."""
    pairs = experts_Nk.shape[0] * experts_Nk.shape[1]
    blocks, e = triton.cdiv(pairs, SORT_BLOCK), triton.next_power_of_2(experts)
    order, inverse = (empty([pairs], "int64", experts_Nk) for _ in range(2))
    places = empty([max(blocks, 1), experts], "int32", experts_Nk)
    counts = zeros([experts], "int32", experts_Nk)
    sizes = {"E": e, "BLOCK": SORT_BLOCK, "num_warps": 8}
    launch(count_kernel, [blocks], experts_Nk, places, pairs, experts, **sizes)
    launch(offset_kernel, [min(blocks, 1)], places, counts, blocks, experts, E=e, MANY=OFFSET_BLOCKS)
    launch(sort_kernel, [blocks], experts_Nk, places, order, inverse, pairs, experts, **sizes)
    return order, inverse, counts


def combine(rows: Tensor, inverse: Tensor, k: int, weights_Nk: Tensor | None = None) -> Tensor:
    """Rows [N k, D] back at their tokens, each token's k added (by fp32 weight where given) -> [N, D]."""
    tokens, width = inverse.shape[0] // k, rows.shape[1]
    y = empty([tokens, width], dtype_name(rows), rows)
    weighted = weights_Nk is not None
    grid = [tokens, triton.cdiv(width, COMBINE_BLOCK)]
    weights = weights_Nk if weighted else y
    launch(combine_kernel, grid, rows, inverse, weights, y, k, width, WEIGHTED=weighted, BLOCK=COMBINE_BLOCK)
    return y


def spread(grad_TD: Tensor, rows: Tensor, inverse: Tensor, weights_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the rows [T k, D], of the fp32 weights [T, k]) by that of a weighted `combine`."""
    tokens, k = weights_Tk.shape
    width = grad_TD.shape[1]
    grad_rows = empty([tokens * k, width], dtype_name(rows), rows)
    grad_weights = empty([tokens, k], "float32", rows)
    operands = (grad_TD, rows, inverse, weights_Tk, grad_rows, grad_weights)
    launch(spread_kernel, [tokens * k], *operands, k, width, BLOCK=COMBINE_BLOCK)
    return grad_rows, grad_weights
