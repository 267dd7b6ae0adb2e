"""ERNIE's three rotary coordinates (t, h, w) of every token of one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MERGE_SIZE = 2
"""Patches per side that the resampler joins into one token."""
TEMPORAL_SIZE = 2
"""Video frames that the resampler joins into one token."""


def positions_3d(
    length: int, media: Sequence[tuple[int, int]], grids: Sequence[tuple[int, int, int]]
) -> NDArray[np.int64]:
    """Positions int64 [length, 3] in the order (t, h, w), starting at 0.

    `media` holds (first placeholder index, placeholder count) per picture or video in order of appearance,
    `grids` its patch grid (frames, rows, columns). Text, and the start and end tokens around a picture, has
    the same value on the three axes; what follows a picture continues at the largest coordinate plus one.
    """
    assert len(media) == len(grids), f"{len(media)} media spans but {len(grids)} grids"
    positions = np.empty((length, 3), np.int64)
    index = current = 0
    for (start, count), grid in zip(media, grids, strict=True):
        current = _fill_text(positions[index:start], current)
        block = current + _visual_block(grid)
        assert len(block) == count, f"grid {grid} makes {len(block)} tokens, its span has {count}"
        positions[start : start + count] = block
        index, current = start + count, int(block.max()) + 1
    _fill_text(positions[index:], current)
    return positions


def _fill_text(positions: NDArray[np.int64], current: int) -> int:
    """Count upwards from `current` on the three axes; return the next position."""
    positions[:] = current + np.arange(len(positions))[:, None]
    return current + len(positions)


def _visual_block(grid: tuple[int, int, int]) -> NDArray[np.int64]:
    """Offsets [n, 3] of one picture's or video's tokens in (frame pair, row, column) order."""
    frames, rows, columns = grid
    shape = (max(frames // TEMPORAL_SIZE, 1), rows // MERGE_SIZE, columns // MERGE_SIZE)
    offsets: NDArray[np.int64] = np.indices(shape, np.int64).reshape(3, -1).T
    return offsets
