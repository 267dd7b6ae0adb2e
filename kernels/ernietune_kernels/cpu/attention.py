"""Attention in C, forward and backward: nothing of the size queries x keys is ever in memory."""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from ernietune_kernels.cpu.checks import Results, checked
from ernietune_kernels.cpu.library import Library

QUERIES, WIDEST = 64, 256  # of one block, and of a head: as in attention.c
Indices = NDArray[np.int64]


class _Rows(Structure):
    """`Rows` of attention.h."""

    _fields_ = [("numbers", c_void_p), ("token", c_int64), ("head", c_int64)]

    @classmethod
    def of(cls, x_THd: Tensor) -> _Rows:
        _, heads, width = x_THd.shape
        return cls(x_THd.data_ptr(), heads * width, width)

    @classmethod
    def by_head(cls, x_HTd: Tensor) -> _Rows:
        _, tokens, width = x_HTd.shape
        return cls(x_HTd.data_ptr(), width, tokens * width)


class _Attention(Structure):
    """`Attention` of attention.h."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "output")),
        ("log_sums", c_void_p),
        *((name, _Rows) for name in ("gradient", "grad_q", "grad_k", "grad_v")),
        *((name, c_void_p) for name in ("blocks", "first", "until", "units")),
        *((name, c_int64) for name in ("block_count", "unit_count")),
        *((name, c_int64) for name in ("queries", "keys", "heads", "groups", "width")),
        ("scale", c_float),
    ]


@dataclass(frozen=True, eq=False)
class Sight:
    """Which keys the last `queries` of all positions see: position i sees key j if first[j] <= i < until[j].

    `blocks` [n, 4] are rows of queries [row, end) and the keys [low, high) they see at most. A unit is a
    range of blocks that has its keys for itself: unit u has the blocks units[u] to units[u + 1].
    """

    first: Indices
    until: Indices
    queries: int
    blocks: Indices
    units: Indices

    @staticmethod
    def of(first: Indices, until: Indices, queries: int) -> Sight:
        """Cut the queries at the borders that nobody sees across, then into blocks."""
        keys = len(first)
        borders = [0, *_borders(first, until), keys]
        blocks: list[list[int]] = []
        units = [0]
        for low, high in zip(borders, borders[1:], strict=False):
            starts = range(max(low, keys - queries), high, QUERIES)
            blocks += [_stretch(first, until, s, low, high, keys - queries) for s in starts]
            if len(blocks) > units[-1]:
                units.append(len(blocks))
        return Sight(first, until, queries, np.array(blocks, np.int64), np.array(units, np.int64))


def _borders(first: Indices, until: Indices) -> list[int]:
    """Positions p such that nobody from p on sees a key before it, nor the other way round."""
    here = np.arange(1, len(first))
    reach = np.maximum.accumulate(until)[:-1]
    earliest = np.minimum.accumulate(first[::-1])[::-1][1:]
    borders: list[int] = here[(reach <= here) & (earliest >= here)].tolist()
    return borders


def _stretch(first: Indices, until: Indices, start: int, low: int, high: int, offset: int) -> list[int]:
    """(row, end, low, high) of the block of queries that begins at position `start`."""
    stop = min(start + QUERIES, high)
    seen = np.flatnonzero((first[low:high] < stop) & (until[low:high] > start))
    return [start - offset, stop - offset, low + int(seen[0]), low + int(seen[-1]) + 1]


def forward(
    library: Library, q_THd: Tensor, k: Tensor, v: Tensor, sight: Sight, *, keep: bool, by_head: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(output [T, H, d], with `keep` log-sums [H, T]); keys are [S, K, d], or [K, S, d] by head."""
    q, k, v = q_THd.contiguous(), k.contiguous(), v.contiguous()
    output = paddle.empty(q.shape, "float32")
    log_sums = paddle.empty([q.shape[1], q.shape[0]], "float32") if keep else None
    call = _call(q, k, v, output, log_sums, sight, by_head)
    library.c.ernie_attention(byref(call))
    return output, log_sums


def backward(
    library: Library, tensors: tuple[Tensor, ...], gradient: Tensor, sight: Sight
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from (q, k, v, output, log-sums) of `forward` and the output's gradient."""
    q, k, v, output, log_sums = (x.contiguous() for x in tensors)
    gradient = gradient.contiguous()
    grads = paddle.empty_like(q), paddle.zeros_like(k), paddle.zeros_like(v)
    call = _call(q, k, v, output, log_sums, sight, by_head=False)
    call.gradient = _Rows.of(gradient)
    call.grad_q, call.grad_k, call.grad_v = (_Rows.of(x) for x in grads)
    if library.c.ernie_attention_back(byref(call)):
        raise MemoryError("no memory for the gradients of keys and values of one attention")
    return grads


def _call(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sums: Tensor | None, sight: Sight, by_head: bool
) -> _Attention:
    queries, heads, width = q.shape
    rows = _Rows.by_head if by_head else _Rows.of
    return _Attention(
        q=_Rows.of(q),
        k=rows(k),
        v=rows(v),
        output=_Rows.of(output),
        log_sums=None if log_sums is None else log_sums.data_ptr(),
        blocks=sight.blocks.ctypes.data,
        first=sight.first.ctypes.data,
        until=sight.until.ctypes.data,
        units=sight.units.ctypes.data,
        block_count=len(sight.blocks),
        unit_count=len(sight.units) - 1,
        queries=queries,
        keys=len(sight.first),
        heads=heads,
        groups=k.shape[0 if by_head else 1],
        width=width,
        scale=width**-0.5,
    )


def library_for(q: Tensor, k: Tensor, v: Tensor) -> Library | None:
    """The library where it can attend with these tensors: in host memory, fp32, heads not too wide."""
    fits = q.place.is_cpu_place() and 0 < q.shape[0] and q.shape[-1] <= WIDEST
    if not fits or any(x.dtype != paddle.float32 for x in (q, k, v)):
        return None
    return _checked()


@cache
def _checked() -> Library | None:
    return checked("attention", _results)


def _results(library: Library) -> Results:
    """Output and gradients of a small attention of two documents, 70 and 40 tokens."""
    until = np.array([70] * 70 + [110] * 40)
    random = np.random.default_rng(0)
    q, gradient = (random.standard_normal((110, 4, 24)) for _ in range(2))
    k, v = (random.standard_normal((110, 2, 24)) for _ in range(2))
    tensors = tuple(paddle.to_tensor(x.astype(np.float32)) for x in (q, k, v))
    sight = Sight.of(np.arange(110), until, 110)
    output, sums = forward(library, *tensors, sight, keep=True)
    assert sums is not None
    given = paddle.to_tensor(gradient.astype(np.float32))
    found = (output, *backward(library, (*tensors, output, sums), given, sight))
    names = ("output", "grad q", "grad k", "grad v")
    return dict(zip(names, zip(found, _in_float64(q, k, v, gradient, until), strict=True), strict=True))


def _in_float64(
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    gradient: NDArray[np.float64],
    until: Indices,
) -> tuple[NDArray[np.float64], ...]:
    """Output and gradients of q, k and v, as the formulas say."""
    tokens, heads, width = q.shape
    groups = k.shape[1]
    rows = np.arange(tokens)[:, None]
    hidden = (np.arange(tokens) > rows) | (rows >= until)
    k_TH, v_TH = (np.repeat(x, heads // groups, axis=1) for x in (k, v))
    scores = np.where(hidden, -np.inf, np.einsum("ihd,jhd->hij", q, k_TH) * width**-0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slopes = np.einsum("ihd,jhd->hij", gradient, v_TH)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * width**-0.5

    def of_groups(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x.reshape(tokens, groups, -1, width).sum(2)

    return (
        np.einsum("hij,jhd->ihd", weights, v_TH),
        np.einsum("hij,jhd->ihd", slopes, k_TH),
        of_groups(np.einsum("hij,ihd->jhd", slopes, q)),
        of_groups(np.einsum("hij,ihd->jhd", weights, gradient)),
    )
