"""ERNIE's (t, h, w) positions of a token sequence with images or videos in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TEMPORAL_MERGE = 2


def media_shape(grid: Sequence[int], merge: int = 2) -> tuple[int, int, int]:
    """Patch grid (t, gh, gw) -> tokens along (t, h, w): frames go in pairs, an image counts as one."""
    frames, height, width = (int(side) for side in grid)
    return max(1, frames // TEMPORAL_MERGE), height // merge, width // merge


def media_tokens(grid: Sequence[int], merge: int = 2) -> int:
    """How many placeholder tokens an image or a video with this patch grid has."""
    t, h, w = media_shape(grid, merge)
    return t * h * w


def positions_3d(
    length: int, slots: Sequence[tuple[int, int]], grids: Sequence[Sequence[int]], merge: int = 2
) -> NDArray[np.int64]:
    """Positions int64 [length, 3] in the order (t, h, w), starting at 0.

    `slots` are (first placeholder, count) in order, `grids` the patch grid (t, gh, gw) of each. A text token
    moves all three axes by one; a medium lays its tokens out on a grid, and what follows continues after its
    longest side.
    """
    assert len(slots) == len(grids), f"{len(slots)} media slots, {len(grids)} grids"
    positions = np.empty((length, 3), dtype=np.int64)
    filled, current = 0, 0
    for (first, count), grid in zip(slots, grids, strict=True):
        shape = media_shape(grid, merge)
        assert count == np.prod(shape), f"{count} placeholders for a medium of {shape} tokens"
        current = _fill_text(positions, filled, first, current)
        positions[first : first + count] = current + np.indices(shape).reshape(3, -1).T
        filled, current = first + count, current + max(shape)
    _fill_text(positions, filled, length, current)
    return positions


def _fill_text(positions: NDArray[np.int64], first: int, end: int, current: int) -> int:
    """Number the text tokens first..end from `current` on; returns the next free position."""
    positions[first:end] = np.arange(current, current + end - first)[:, None]
    return current + end - first
