"""Grouped-query attention over packed documents, in blocks of queries.

A key j is visible to the query i when j <= i < until[j] (both counted over all keys), which covers packed
samples (until = the sample's end) and shared-prompt pairs alike. On a GPU this is FlashMask, on a CPU in fp32
the C of `cpu/attention.c`. The plain path, for all others: each block of queries meets only the keys between
the first one it may see and its own last row, and only q, k, v and the output are kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ernietune_kernels.cpu import attention as compiled
from ernietune_kernels.cpu.attention import Sight
from ernietune_kernels.cpu.library import Library

QUERY_BLOCK = 128
_NARROW = 16  # queries of a block that is one of few, so that many threads get some
# Scores of one piece of frame attention: 2^24 fp32 values are 64 MiB.
SCORE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop) against keys [low, high); `bias` [queries, keys] is 0 or -inf, None if all 0."""

    start: int
    stop: int
    low: int
    high: int
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Who sees whom among the last `queries` of `keys` positions, shared by all layers of a forward."""

    queries: int
    keys: int
    until: Tensor | None  # integer [keys]; None: every later query sees key j

    @cached_property
    def blocks(self) -> tuple[_Block, ...]:
        """Blocks of queries with the keys they may see, worked out when a CPU first asks."""
        until = np.full(self.keys, self.keys) if self.until is None else self.until.numpy()
        offset = self.keys - self.queries
        starts = range(0, self.queries, QUERY_BLOCK)
        return tuple(_block(s, min(s + QUERY_BLOCK, self.queries), offset, until) for s in starts)

    @cached_property
    def sight(self) -> Sight:
        """The same for the C kernel."""
        first = np.arange(self.keys)
        until = np.full(self.keys, self.keys) if self.until is None else self.until.numpy().astype(np.int64)
        return Sight.of(first, until, self.queries)

    @cached_property
    def flash_mask(self) -> Tensor | None:
        """`until` in FlashMask's form: int32 [1, 1, keys, 1]."""
        return None if self.until is None else self.until.astype("int32").reshape([1, 1, -1, 1])


def _block(start: int, stop: int, offset: int, until: np.ndarray) -> _Block:
    rows = np.arange(start, stop) + offset
    high = int(rows[-1]) + 1
    visible_to_first = np.flatnonzero(until[:high] > rows[0])
    low = int(visible_to_first[0]) if visible_to_first.size else int(rows[0])
    columns = np.arange(low, high)
    allowed = (columns <= rows[:, None]) & (rows[:, None] < until[low:high])
    bias = None if allowed.all() else paddle.to_tensor(np.where(allowed, 0.0, -np.inf).astype(np.float32))
    return _Block(start, stop, low, high, bias)


@lru_cache(maxsize=8)
def _plain_plan(queries: int, keys: int) -> AttentionPlan:
    return AttentionPlan(queries, keys, None)


def causal_plan(queries: int, keys: int, until: Tensor | None = None) -> AttentionPlan:
    """The plan for the last `queries` of `keys` positions; `until` [keys]: by default unlimited."""
    return _plain_plan(queries, keys) if until is None else AttentionPlan(queries, keys, until)


def _softmax_block(q: Tensor, k: Tensor, block: _Block, repeat: int) -> Tensor:
    """Attention weights [K, repeat * queries, keys] of one block; q is already scaled."""
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32")
    if block.bias is not None:
        rows, columns = block.bias.shape
        scores.reshape([-1, repeat, rows, columns]).add_(block.bias)  # a view: masks in place
    return F.softmax(scores).astype(q.dtype)


def _heads_first(x_TKd: Tensor) -> Tensor:
    return x_TKd.transpose([1, 0, 2]).contiguous()


def _rows(x_KRTd: Tensor, block: _Block) -> Tensor:
    """The block's queries of all heads of a group, one under the other: [K, repeat * queries, d]."""
    groups, _, _, width = x_KRTd.shape
    return x_KRTd[:, :, block.start : block.stop].reshape([groups, -1, width])


def _grouped(x_THd: Tensor, groups: int) -> Tensor:
    tokens, heads, width = x_THd.shape
    return x_THd.reshape([tokens, groups, heads // groups, width]).transpose([1, 2, 0, 3]).contiguous()


def _ungrouped(pieces: list[Tensor], groups: int, repeat: int) -> Tensor:
    """The inverse of `_rows` and `_grouped`: [T, H, d] from the blocks' [K, repeat * queries, d]."""
    width = pieces[0].shape[-1]
    whole = paddle.concat([p.reshape([groups, repeat, -1, width]) for p in pieces], axis=2)
    return whole.transpose([2, 0, 1, 3]).reshape([-1, groups * repeat, width])


def cached_attention(q_THd: Tensor, k_KSd: Tensor, v_KSd: Tensor, plan: AttentionPlan) -> Tensor:
    """`attention` [T, H, d] without gradients over keys and values that are stored by head."""
    library = compiled.library_for(q_THd, k_KSd, v_KSd)
    if library is None:
        return _plain_attention(q_THd, k_KSd, v_KSd, plan)
    if plan.until is None and plan.queries < compiled.QUERIES and q_THd.shape[1] > k_KSd.shape[0]:
        return _few_queries(library, q_THd, k_KSd, v_KSd)
    return compiled.forward(library, q_THd, k_KSd, v_KSd, plan.sight, keep=False, by_head=True)[0]


def _few_queries(library: Library, q_THd: Tensor, k_KSd: Tensor, v_KSd: Tensor) -> Tensor:
    """The heads that share keys as queries of one head: the C reads keys once for a block of queries."""
    tokens, heads, width = q_THd.shape
    groups, keys, _ = k_KSd.shape
    repeat = heads // groups
    sight = _sight_of_groups(tokens, keys, repeat, _NARROW if library.threads > groups else compiled.QUERIES)
    q = q_THd.reshape([tokens, groups, repeat, width]).transpose([0, 2, 1, 3])
    q = q.reshape([tokens * repeat, groups, width])
    output, _ = compiled.forward(library, q, k_KSd, v_KSd, sight, keep=False, by_head=True)
    output = output.reshape([tokens, repeat, groups, width]).transpose([0, 2, 1, 3])
    return output.reshape([tokens, heads, width])


@lru_cache(maxsize=32)  # of the sequences of a step, for all layers
def _sight_of_groups(tokens: int, keys: int, repeat: int, block: int) -> Sight:
    """Causal sight of the last `tokens` of `keys` positions, each `repeat` rows of queries long."""
    rows = tokens * repeat
    # A row's own position, as the C counts it, is row + keys - rows.
    first = keys - rows + repeat * np.maximum(np.arange(keys) - (keys - tokens), 0)
    starts = np.arange(0, rows, block)
    ends = np.minimum(starts + block, rows)
    blocks = np.stack([starts, ends, np.zeros_like(starts), keys - tokens + -(-ends // repeat)], 1)
    return Sight(first, np.full(keys, keys), rows, blocks, np.array([0, len(blocks)]))


def _plain_attention(q_THd: Tensor, k_KSd: Tensor, v_KSd: Tensor, plan: AttentionPlan) -> Tensor:
    groups, repeat = k_KSd.shape[0], q_THd.shape[1] // k_KSd.shape[0]
    queries, keys, values = _grouped(q_THd * q_THd.shape[-1] ** -0.5, groups), k_KSd, v_KSd
    pieces = []
    for block in plan.blocks:
        span = slice(block.low, block.high)
        whole = block.low == 0 and block.high == plan.keys  # a slice of a CPU tensor is a copy
        seen_k, seen_v = (keys, values) if whole else (keys[:, span], values[:, span])
        weights = _softmax_block(_rows(queries, block), seen_k, block, repeat)
        pieces.append(paddle.matmul(weights, seen_v))
    return _ungrouped(pieces, groups, repeat)


def decode_attention(q_BHd: Tensor, k_KBSd: Tensor, v_KBSd: Tensor, bias_BS: Tensor) -> Tensor:
    """One query for each of B sequences over its own keys, padded to S: [B, H, d]; no gradients.

    `bias_BS` is 0 where a key is one and -inf where it is padding, which must be finite nonetheless.
    """
    groups, batch, _, width = k_KBSd.shape
    q = (q_BHd * width**-0.5).reshape([batch, groups, -1, width]).transpose([1, 0, 2, 3])
    scores = paddle.matmul(q, k_KBSd, transpose_y=True).astype("float32") + bias_BS.unsqueeze(1)
    seen = paddle.matmul(F.softmax(scores).astype(v_KBSd.dtype), v_KBSd)
    return seen.transpose([1, 0, 2, 3]).reshape([batch, -1, width])


class _BlockAttention(PyLayer):
    """Keeps q, k, v and the output; the weights of a block are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        output = _plain_attention(q, _heads_first(k), _heads_first(v), plan)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        q, k, v, output = ctx.saved_tensor()
        groups, repeat = k.shape[1], q.shape[1] // k.shape[1]
        scale = q.shape[-1] ** -0.5
        queries, keys, values = _grouped(q * scale, groups), _heads_first(k), _heads_first(v)
        gradient = _grouped(grad, groups)
        # Row sums of P * dP equal the row sums of O * dO, which need no weights.
        inner = (gradient * _grouped(output, groups)).sum(-1, keepdim=True)
        grad_k, grad_v = paddle.zeros_like(keys), paddle.zeros_like(values)
        pieces = []
        for block in ctx.plan.blocks:
            span = slice(block.low, block.high)
            rows, keys_b = _rows(queries, block), keys[:, span]
            weights = _softmax_block(rows, keys_b, block, repeat)
            out_grad = _rows(gradient, block)
            scores = paddle.matmul(out_grad, values[:, span], transpose_y=True)
            scores = scores.subtract_(_rows(inner, block)).multiply_(weights)
            grad_v[:, span] = grad_v[:, span] + paddle.matmul(weights, out_grad, transpose_x=True)
            grad_k[:, span] = grad_k[:, span] + paddle.matmul(scores, rows, transpose_x=True)
            pieces.append(paddle.matmul(scores, keys_b) * scale)
        back = [_ungrouped(pieces, groups, repeat), grad_k.transpose([1, 0, 2]), grad_v.transpose([1, 0, 2])]
        return tuple(None if x.stop_gradient else g for x, g in zip((q, k, v), back, strict=True))


class _CompiledAttention(PyLayer):
    """The same in C, which keeps a log-sum of every query's weights as well."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sight: Sight, library: Library) -> Tensor:
        output, log_sums = compiled.forward(library, q, k, v, sight, keep=True)
        ctx.sight, ctx.library = sight, library
        ctx.save_for_backward(q, k, v, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        saved = ctx.saved_tensor()
        back = compiled.backward(ctx.library, saved, grad, ctx.sight)
        return tuple(None if x.stop_gradient else g for x, g in zip(saved[:3], back, strict=True))


def _compiled(library: Library, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    if _needs_gradient(q, k, v):
        return _CompiledAttention.apply(q, k, v, sight, library)
    return compiled.forward(library, q, k, v, sight, keep=False)[0]


def _needs_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return paddle.is_grad_enabled() and not (q.stop_gradient and k.stop_gradient and v.stop_gradient)


def _flash_mask(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    rows = plan.flash_mask
    output = F.flashmask_attention(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), startend_row_indices=rows, causal=True
    )
    return output.squeeze(0)


def attention(q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention [T, H, d] of T queries over S keys with the visibility of `plan`; softmax in fp32."""
    if q_THd.place.is_gpu_place() and plan.queries == plan.keys:
        return _flash_mask(q_THd, k_SKd, v_SKd, plan)
    library = compiled.library_for(q_THd, k_SKd, v_SKd)
    if library is not None:
        return _compiled(library, q_THd, k_SKd, v_SKd, plan.sight)
    if not _needs_gradient(q_THd, k_SKd, v_SKd):
        return _plain_attention(q_THd, _heads_first(k_SKd), _heads_first(v_SKd), plan)
    return _BlockAttention.apply(q_THd, k_SKd, v_SKd, plan)


def frame_attention(q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor, lengths: list[int]) -> Tensor:
    """Bidirectional attention inside each frame; `lengths` are the frames' patch counts, in order.

    On the plain path neighbouring frames of equal length are computed together, at most 64 MiB of scores at a
    time.
    """
    library = compiled.library_for(q_PHd, k_PHd, v_PHd)
    if library is not None:
        return _compiled(library, q_PHd, k_PHd, v_PHd, _frame_sight(tuple(lengths)))
    pieces, start = [], 0
    for frames, length in _runs(lengths):
        stop = start + frames * length
        q, k, v = (_split_frames(x[start:stop], frames) for x in (q_PHd, k_PHd, v_PHd))
        pieces.append(_join_frames(_dense(q * q.shape[-1] ** -0.5, k, v), frames))
        start = stop
    return paddle.concat(pieces) if len(pieces) > 1 else pieces[0]


@lru_cache(maxsize=8)
def _frame_sight(lengths: tuple[int, ...]) -> Sight:
    ends = np.cumsum(lengths)
    until = np.repeat(ends, lengths)
    return Sight.of(until - np.repeat(lengths, lengths), until, len(until))


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """(number of frames, length) of the stretches of equal length."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return runs


def _split_frames(x_PHd: Tensor, frames: int) -> Tensor:
    _, heads, width = x_PHd.shape
    return (
        x_PHd.reshape([frames, -1, heads, width]).transpose([0, 2, 1, 3]).reshape([frames * heads, -1, width])
    )


def _join_frames(x: Tensor, frames: int) -> Tensor:
    batch, length, width = x.shape
    return x.reshape([frames, batch // frames, length, width]).transpose([0, 2, 1, 3]).reshape(
        [frames * length, batch // frames, width]
    )  # fmt: skip


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v of [batch, length, d] in pieces of the batch, and of the rows of large items."""
    batch, length, _ = q.shape
    step = max(1, SCORE_ELEMENTS // (length * length))
    if step >= batch:
        return _piece(q, k, v)
    pieces = []
    for start in range(0, batch, step):
        item = slice(start, start + step)
        rows = max(1, SCORE_ELEMENTS // (step * length))
        parts = [_piece(q[item, r : r + rows], k[item], v[item]) for r in range(0, length, rows)]
        pieces.append(paddle.concat(parts, axis=1) if len(parts) > 1 else parts[0])
    return paddle.concat(pieces)


def _piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = paddle.matmul(q, k, transpose_y=True).astype("float32")
    return paddle.matmul(F.softmax(scores).astype(v.dtype), v)
