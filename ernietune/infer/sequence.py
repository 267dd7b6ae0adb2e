"""One choice of a request on its way through the engine: its tokens, its blocks, what it has said."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ernietune.infer.blocks import chained
from ernietune.infer.drafts import Speculation
from ernietune.infer.generation import Generation
from ernietune.infer.lowrank import LowRank
from ernietune.infer.request import Delta, Request
from ernietune.text.positions import media_tokens

Grid = tuple[int, int, int]
_arrivals = itertools.count()


@dataclass(frozen=True)
class Medium:
    """A picture or video of a prompt: its tokens [start, stop), its pixels, and a key of its content."""

    start: int
    stop: int
    patches: NDArray[np.float32]
    grid: Grid
    key: bytes


def media_of(request: Request, placeholder: int | None, merge: int) -> tuple[Medium, ...]:
    """The media of a prompt in order; their tokens are its placeholders."""
    if request.patches is None or not request.grids:
        return ()
    return tuple(_media(request.patches, request.grids, np.flatnonzero(request.ids == placeholder), merge))


def _media(
    patches: NDArray[np.float32], grids: tuple[Grid, ...], places: NDArray[np.int64], merge: int
) -> Iterator[Medium]:
    token = patch = 0
    for grid in grids:
        count, pixels = media_tokens(grid, merge), grid[0] * grid[1] * grid[2]
        start = int(places[token])
        own = np.ascontiguousarray(patches[patch : patch + pixels])
        yield Medium(start, start + count, own, grid, chained(repr(grid).encode(), own.data))
        token, patch = token + count, patch + pixels


class Sequence:
    """The prompt and what was generated so far, and how much of it is in the cache."""

    def __init__(
        self,
        request: Request,
        media: tuple[Medium, ...],
        generation: Generation,
        priority: int,
        arrival: int,
        adapter: LowRank | None = None,
    ) -> None:
        self.adapter = adapter
        # The keys of all blocks go on from here: nothing is shared with other adapters and other salts.
        self._root = chained(b"" if adapter is None else adapter.key, (request.cache_salt or "").encode())
        self.media, self.generation, self.rank = media, generation, (priority, arrival, generation.index)
        self.prompt_length = self.length = len(request.ids)
        self.computed = 0  # tokens whose keys and values are in `blocks`
        self.blocks: list[int] = []
        self.cached_tokens: int | None = None  # prompt tokens found in the cache when it was first started
        capacity = self.length + generation.budget
        self.ids = np.empty(capacity, np.int64)
        self.positions = np.empty((capacity, 3), np.int64)
        self.ids[: self.length], self.positions[: self.length] = request.ids, request.positions
        self._next_position = request.next_position
        self._keys: list[bytes] = []

    @property
    def priority(self) -> int:
        """Smaller goes first."""
        return self.rank[0]

    @property
    def pending(self) -> int:
        """Tokens that the model has not read yet."""
        return self.length - self.computed

    @property
    def reusable(self) -> int:
        """How many of the first tokens may come from the cache instead of being read.

        The last one is always read, and where the prompt is scored, what has no score yet.
        """
        unscored = self.generation.unscored_from
        return self.length - 1 if unscored is None else min(self.length - 1, unscored)

    def append(self, token: int) -> None:
        """Add a generated token; its position is one further on all three axes."""
        self._write(token, self.length)
        self.length += 1

    def draft(self, speculation: Speculation, most: int) -> int:
        """Write at most `most` guesses behind the last token, and say how many.

        The token that is drawn behind the last guess has to fit too.
        """
        room = len(self.ids) - self.length - 1
        guesses = speculation.guess(self.ids[: self.length], min(most, room)).tolist()
        for place, token in enumerate(guesses, self.length):
            self._write(token, place)
        return len(guesses)

    def _write(self, token: int, place: int) -> None:
        self.ids[place] = token
        self.positions[place] = self._next_position + place - self.prompt_length

    def keys(self, count: int, size: int) -> list[bytes]:
        """The keys of the first `count` blocks of `size` tokens, each full."""
        assert count * size <= self.length, (count, size, self.length)
        first = len(self._keys) * size
        if first < count * size:
            rows = slice(first, count * size)
            content = np.column_stack((self.ids[rows], self.positions[rows])).data
            for start in range(first, count * size, size):
                self._name(start, size, content[start - first : start - first + size])
        return self._keys[:count]

    def _name(self, start: int, size: int, content: memoryview) -> None:
        """Tokens, positions and pixels decide what a block holds, and everything before it."""
        parent, stop = self._keys[-1] if self._keys else self._root, start + size
        pixels = [medium.key for medium in self.media if medium.start < stop and start < medium.stop]
        self._keys.append(chained(parent, content, *pixels))


@dataclass(frozen=True, eq=False)
class Ticket:
    """A submitted request: its choices, and where their deltas (or the error that ended them) go."""

    sequences: tuple[Sequence, ...]
    deliver: Callable[[Delta | BaseException], None]


def next_arrival() -> int:
    """A number that is larger for each request."""
    return next(_arrivals)
