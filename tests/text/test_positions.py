from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ernietune.text.positions import positions_3d


def axes(positions: np.ndarray) -> list[list[int]]:
    return positions.T.tolist()


def test_text_counts_upwards_on_every_axis() -> None:
    positions = positions_3d(4, [], [])
    assert positions.dtype == np.int64
    assert axes(positions) == [[0, 1, 2, 3]] * 3


def test_an_empty_prompt_has_no_positions() -> None:
    assert positions_3d(0, [], []).shape == (0, 3)


def test_one_square_image_between_text() -> None:
    # T I I I I T T with a 4x4-patch image: the example of the published implementations.
    assert axes(positions_3d(7, [(1, 4)], [(1, 4, 4)])) == [
        [0, 1, 1, 1, 1, 3, 4],
        [0, 1, 1, 2, 2, 3, 4],
        [0, 1, 2, 1, 2, 3, 4],
    ]


def test_a_wide_image_continues_after_its_longest_side() -> None:
    # 2x6 patches: one row of three tokens, so the text after it starts at 1 + 3.
    assert axes(positions_3d(5, [(1, 3)], [(1, 2, 6)])) == [
        [0, 1, 1, 1, 4],
        [0, 1, 1, 1, 4],
        [0, 1, 2, 3, 4],
    ]


def test_a_long_video_continues_after_its_last_frame_pair() -> None:
    # Grid 20x4x6 from position 3: ten frame pairs outlast the three columns, text goes on at 3 + 10.
    positions = positions_3d(3 + 60 + 1, [(3, 60)], [(20, 4, 6)])
    assert positions[3].tolist() == [3, 3, 3]
    assert positions[4].tolist() == [3, 3, 4]
    assert positions[6].tolist() == [3, 4, 3]
    assert positions[9].tolist() == [4, 3, 3]
    assert positions[62].tolist() == [12, 4, 5]
    assert positions[63].tolist() == [13, 13, 13]


def test_two_images_follow_each_other() -> None:
    positions = positions_3d(1 + 4 + 1 + 1 + 1, [(1, 4), (6, 1)], [(1, 4, 4), (1, 2, 2)])
    assert axes(positions)[0] == [0, 1, 1, 1, 1, 3, 4, 5]


SIDE = st.integers(1, 4)


@given(st.lists(st.tuples(st.integers(0, 4), SIDE, SIDE, SIDE), max_size=4))
def test_next_text_position_is_the_largest_so_far_plus_one(items: list[tuple[int, int, int, int]]) -> None:
    media, grids, length = [], [], 0
    for gap, pairs, rows, columns in items:
        count = pairs * rows * columns
        media.append((length + gap, count))
        grids.append((2 * pairs, 2 * rows, 2 * columns))
        length += gap + count
    positions = positions_3d(length + 1, media, grids)
    assert positions[-1].tolist() == [(positions[:-1].max() + 1 if length else 0)] * 3
