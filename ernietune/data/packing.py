"""Packing: several samples share one row of at most `max_length` tokens; no sample is split.

Best fit with a look-ahead buffer: a sample goes into the fullest open row it still fits, else it opens a row.
A row is emitted when it is full; when more than `buffer` samples wait in open rows, the fullest one goes.
Nothing depends on time or chance, so the open rows and the next sample are all a resume needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
BUFFER = 128


@dataclass
class Row(Generic[T]):
    """A row being filled."""

    items: list[T]
    tokens: int


class Packer(Generic[T]):
    """Open rows of samples; `add` and `pop` hand out finished rows in a fixed order."""

    def __init__(self, max_length: int, buffer: int = BUFFER) -> None:
        self.max_length = max_length
        self.buffer = buffer
        self.rows: list[Row[T]] = []

    def __len__(self) -> int:
        """Samples waiting in open rows."""
        return sum(len(row.items) for row in self.rows)

    def add(self, item: T, length: int) -> list[T] | None:
        """Place a sample of `length` tokens (1..max_length); returns the row that this finishes, if any."""
        assert 0 < length <= self.max_length, f"a sample of {length} tokens for rows of {self.max_length}"
        row = self._best_row(length)
        row.items.append(item)
        row.tokens += length
        if row.tokens == self.max_length:
            self.rows.remove(row)
            return row.items
        return self.pop() if len(self) > self.buffer else None

    def pop(self) -> list[T] | None:
        """Take out the fullest open row (the oldest of equals); None when there is none."""
        if not self.rows:
            return None
        row = max(self.rows, key=lambda open_row: open_row.tokens)
        self.rows.remove(row)
        return row.items

    def reopen(self, items: list[tuple[T, int]]) -> None:
        """Add an open row as it was saved: (sample, length) pairs in their order."""
        self.rows.append(Row([item for item, _ in items], sum(length for _, length in items)))

    def _best_row(self, length: int) -> Row[T]:
        fitting = [row for row in self.rows if row.tokens + length <= self.max_length]
        if fitting:
            return max(fitting, key=lambda row: row.tokens)
        self.rows.append(Row([], 0))
        return self.rows[-1]


def pack(samples: Iterable[tuple[T, int]], max_length: int, buffer: int = BUFFER) -> Iterator[list[T]]:
    """Pack (sample, length) pairs into rows; every sample comes out once."""
    packer: Packer[T] = Packer(max_length, buffer)
    for item, length in samples:
        row = packer.add(item, length)
        if row is not None:
            yield row
    while (row := packer.pop()) is not None:
        yield row


def efficiency(row_lengths: Sequence[int], max_length: int) -> float:
    """The share of `max_length` that rows use on average: 1.0 is perfect; 0.0 for no rows."""
    return sum(row_lengths) / (len(row_lengths) * max_length) if row_lengths else 0.0
