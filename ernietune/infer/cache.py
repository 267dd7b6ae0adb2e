"""Keys and values of many sequences in blocks of fixed size, and one step's view of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from ernietune_kernels import (
    available_for_products,
    cached_attention,
    causal_plan,
    decode_attention,
    paged_attention,
)
from numpy.typing import NDArray
from paddle import Tensor
from paddle.utils.dlpack import from_dlpack

HOST_DTYPES = ("float32", "float64")
_Room = NDArray[Any]


@dataclass(frozen=True)
class Span:
    """The new tokens of one sequence in a step: rows [start, stop) of the batch.

    `slots` [S] say where the cache keeps each token of the sequence, the new ones last.
    """

    start: int
    stop: int
    slots: NDArray[np.int64]

    @property
    def length(self) -> int:
        """Tokens of the sequence, the new ones included."""
        return len(self.slots)

    @property
    def first(self) -> int:
        """How many tokens of the sequence were there before."""
        return self.length - (self.stop - self.start)


def slots_of(blocks: Sequence[int], size: int, length: int) -> NDArray[np.int64]:
    """The slots of the first `length` tokens that these blocks of `size` slots hold."""
    starts = np.array(blocks, np.int64)[:, None] * size
    slots: NDArray[np.int64] = (starts + np.arange(size)).reshape(-1)[:length]
    return slots


class PagedCache:
    """Room for the keys and values of `slots` tokens in every layer; the caller says whose is which."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, slots: int, dtype: str) -> None:
        kind = _HostRows if dtype in HOST_DTYPES and not on_gpu() else _DeviceRows
        self._rows: _HostRows | _DeviceRows = kind(layers, kv_heads, head_dim, slots, dtype)

    @property
    def host(self) -> NDArray[np.float32] | None:
        """All keys and values, [layers, 2, KV, slots, d], where they are fp32 in host memory."""
        rows = self._rows
        return rows.all if isinstance(rows, _HostRows) and rows.all.dtype == np.float32 else None

    def step(self, spans: Sequence[Span]) -> StepCache:
        """The view that one forward pass over the new tokens of these spans needs."""
        return StepCache(self._rows, spans)


class StepCache:
    """What the model's layers see in one step: each sequence attends to its own tokens.

    Sequences with one new token and about the same length are computed together.
    """

    def __init__(self, rows: _HostRows | _DeviceRows, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self._rows = rows
        self._new = rows.index(np.concatenate([span.slots[span.first :] for span in spans]))
        speaking = _of_similar_length([span for span in spans if span.stop - span.start == 1])
        reading = [span for span in spans if span.stop - span.start > 1]
        largest = max([*(_padded(group) for group in speaking), *(span.length for span in reading)])
        room = rows.room(largest)
        self._parts: list[_Together | _Alone] = [
            *(_Together(rows, group, room) for group in speaking),
            *(_Alone(rows, span, room) for span in reading),
        ]
        order = np.argsort(np.concatenate([part.places for part in self._parts]))
        self._order = None if (order == np.arange(len(order))).all() else paddle.to_tensor(order)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, KV, d] of the new tokens; what their queries [T, H, d] see of their sequences."""
        self._rows.write(layer, self._new, k, v)
        seen = [part.attend(q, self._rows, layer) for part in self._parts]
        whole = paddle.concat(seen) if len(seen) > 1 else seen[0]
        return whole if self._order is None else paddle.gather(whole, self._order)


class _Alone:
    """A sequence that reads several tokens."""

    def __init__(self, rows: _HostRows | _DeviceRows, span: Span, room: _Room) -> None:
        self.places = np.arange(span.start, span.stop)
        self.slots, self._room = rows.index(span.slots), room
        self._start, self._stop = span.start, span.stop
        self._plan = causal_plan(span.stop - span.start, span.length)

    def attend(self, q: Tensor, rows: _HostRows | _DeviceRows, layer: int) -> Tensor:
        keys, values = rows.read(layer, self.slots, self._room)
        return cached_attention(q[self._start : self._stop], keys, values, self._plan)


class _Together:
    """Sequences with one new token each; their slots are padded to the longest with their own first slot."""

    def __init__(self, rows: _HostRows | _DeviceRows, spans: Sequence[Span], room: _Room) -> None:
        self._room = room
        self.places = np.array([span.start for span in spans], np.int64)
        self._places = paddle.to_tensor(self.places)
        lengths = np.array([span.length for span in spans], np.int32)[:, None]
        self._lengths = paddle.to_tensor(lengths[:, 0])
        columns = np.arange(lengths.max())
        slots = np.stack([np.resize(span.slots[:1], columns.size) for span in spans])
        for row, span in zip(slots, spans, strict=True):
            row[: span.length] = span.slots
        self.slots = rows.index(slots)
        self._bias = paddle.to_tensor(np.where(columns < lengths, 0, -np.inf).astype(np.float32))

    def attend(self, q: Tensor, rows: _HostRows | _DeviceRows, layer: int) -> Tensor:
        own = paddle.gather(q, self._places)
        if isinstance(rows, _DeviceRows) and available_for_products(own):
            return paged_attention(own, *rows.pages(layer), self.slots, self._lengths)
        return decode_attention(own, *rows.read(layer, self.slots, self._room), self._bias)


def _padded(spans: Sequence[Span]) -> int:
    """Slots of a group in which all are as long as the longest."""
    return len(spans) * max(span.length for span in spans)


def _of_similar_length(spans: Sequence[Span]) -> list[list[Span]]:
    """Groups in which the longest is at most twice the shortest: less than half of the work is padding."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.length):
        if groups and span.length <= 2 * groups[-1][0].length:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [sorted(group, key=lambda span: span.start) for group in groups]


class _HostRows:
    """Keys and values in host memory, by head; the system provides the pages as they are written to.

    They go in and out through numpy: indexing a Paddle tensor on a CPU costs several copies.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, slots: int, dtype: str) -> None:
        self.all: NDArray[Any] = np.empty([layers, 2, kv_heads, slots, head_dim], dtype)

    def index(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        return slots

    def write(self, layer: int, slots: NDArray[np.int64], k: Tensor, v: Tensor) -> None:
        for rows, new in zip(self.all[layer], (k, v), strict=True):
            rows[:, slots] = np.from_dlpack(new.detach()).transpose(1, 0, 2)

    def room(self, count: int) -> _Room:
        """Memory for the keys and values of so many slots, for one part of a step at a time."""
        _, _, kv_heads, _, head_dim = self.all.shape
        return np.empty([2, kv_heads * count * head_dim], self.all.dtype)

    def read(self, layer: int, slots: NDArray[np.int64], room: _Room) -> tuple[Tensor, Tensor]:
        """(keys, values) in slots [S] or [B, S], each contiguous [KV, S, d] or [KV, B, S, d], in the room.

        New memory for each layer would cost more than what is written into it.
        """
        _, _, kv_heads, _, head_dim = self.all.shape
        shape = (kv_heads, *slots.shape, head_dim)
        found = [part[: math.prod(shape)].reshape(shape) for part in room]
        for rows, part in zip(self.all[layer], found, strict=True):
            rows.take(slots, axis=1, out=part, mode="clip")  # no slot is outside; "raise" makes a copy
        return from_dlpack(found[0]), from_dlpack(found[1])


class _DeviceRows:
    """The same as Paddle tensors, for a GPU and for types that numpy does not have."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, slots: int, dtype: str) -> None:
        shape = [slots, kv_heads, head_dim]
        self._all = [(paddle.zeros(shape, dtype), paddle.zeros(shape, dtype)) for _ in range(layers)]

    def index(self, slots: NDArray[np.int64]) -> Tensor:
        return paddle.to_tensor(slots)

    def room(self, count: int) -> _Room:
        """None is needed: memory of a GPU is kept for the next layer anyway."""
        return np.empty(0)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """All of a layer's keys and values [slots, KV, d], as they lie."""
        return self._all[layer]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for rows, new in zip(self._all[layer], (k, v), strict=True):
            paddle.scatter_(rows, slots, new)

    def read(self, layer: int, slots: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
        """(keys, values) in slots [S] or [B, S], each contiguous [KV, S, d] or [KV, B, S, d]."""
        axes = [slots.ndim, *range(slots.ndim), slots.ndim + 1]
        keys, values = (
            paddle.gather(rows, slots.flatten()).reshape([*slots.shape, *rows.shape[1:]]).transpose(axes)
            for rows in self._all[layer]
        )
        return keys.contiguous(), values.contiguous()


def on_gpu() -> bool:
    """Whether tensors are made on a GPU here."""
    return str(paddle.get_device()).startswith("gpu")
