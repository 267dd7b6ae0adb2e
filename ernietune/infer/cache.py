"""Keys and values of many sequences in blocks of fixed size, and one step's view of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from ernietune_kernels import cached_attention, causal_plan
from numpy.typing import NDArray
from paddle import Tensor
from paddle.utils.dlpack import from_dlpack

HOST_DTYPES = ("float32", "float64")


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

    def step(self, spans: Sequence[Span]) -> StepCache:
        """The view that one forward pass over the new tokens of these spans needs."""
        return StepCache(self._rows, spans)


class StepCache:
    """What the model's layers see in one step: each sequence attends to its own tokens."""

    def __init__(self, rows: _HostRows | _DeviceRows, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self._rows = rows
        self._new = rows.index(np.concatenate([span.slots[span.first :] for span in spans]))
        self._seen = [rows.index(span.slots) for span in spans]
        self._plans = [causal_plan(span.stop - span.start, span.length) for span in spans]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, KV, d] of the new tokens; what their queries [T, H, d] see of their sequences."""
        self._rows.write(layer, self._new, k, v)
        outputs = []
        for span, seen, plan in zip(self.spans, self._seen, self._plans, strict=True):
            keys, values = self._rows.read(layer, seen)
            outputs.append(cached_attention(q[span.start : span.stop], keys, values, plan))
        return paddle.concat(outputs) if len(outputs) > 1 else outputs[0]


class _HostRows:
    """Keys and values in host memory, by head; the system provides the pages as they are written to.

    They go in and out through numpy: indexing a Paddle tensor on a CPU costs several copies.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, slots: int, dtype: str) -> None:
        self._all: NDArray[Any] = np.empty([layers, 2, kv_heads, slots, head_dim], dtype)

    def index(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        return slots

    def write(self, layer: int, slots: NDArray[np.int64], k: Tensor, v: Tensor) -> None:
        for rows, new in zip(self._all[layer], (k, v), strict=True):
            rows[:, slots] = np.from_dlpack(new.detach()).transpose(1, 0, 2)

    def read(self, layer: int, slots: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(keys, values) in these slots, each contiguous [KV, S, d]."""
        keys, values = self._all[layer]
        return from_dlpack(keys.take(slots, axis=1)), from_dlpack(values.take(slots, axis=1))


class _DeviceRows:
    """The same as Paddle tensors, for a GPU and for types that numpy does not have."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, slots: int, dtype: str) -> None:
        shape = [slots, kv_heads, head_dim]
        self._all = [(paddle.zeros(shape, dtype), paddle.zeros(shape, dtype)) for _ in range(layers)]

    def index(self, slots: NDArray[np.int64]) -> Tensor:
        return paddle.to_tensor(slots)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for rows, new in zip(self._all[layer], (k, v), strict=True):
            paddle.scatter_(rows, slots, new)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) in these slots, each contiguous [KV, S, d]."""
        keys, values = (paddle.gather(rows, slots).transpose([1, 0, 2]) for rows in self._all[layer])
        return keys.contiguous(), values.contiguous()


def on_gpu() -> bool:
    """Whether tensors are made on a GPU here."""
    return str(paddle.get_device()).startswith("gpu")
