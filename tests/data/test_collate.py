from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from letters import BEGIN, END_OF_TURN, STOP, letter_dataset, picture, turn, write_lines

from ernietune.data.collate import Batch, collate, shift
from ernietune.text.template import IGNORE

A, B, X, Y = (ord(letter) for letter in "abxy")


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """Two rows: [a -> x, ab -> xy] and [one picture, b -> y]."""
    records = [
        {"messages": turn("a", "x")},
        {"messages": turn("ab", "xy")},
        {"messages": turn("b", "y", picture("red"))},
    ]
    dataset = letter_dataset(write_lines(tmp_path / "d.jsonl", records))
    return collate([[dataset[0], dataset[1]], [dataset[2]]])


def test_rows_lie_one_after_the_other(batch: Batch) -> None:
    assert batch.ids[:10].tolist() == [BEGIN, A, X, END_OF_TURN, BEGIN, A, B, X, Y, END_OF_TURN]
    assert (batch.tokens, batch.samples) == (4 + 6 + 10, 3)


def test_labels_are_the_next_token_inside_a_sample(batch: Batch) -> None:
    picture_sample = [IGNORE] * 7 + [Y, STOP, IGNORE]
    assert batch.labels.tolist() == [
        *[IGNORE, X, STOP, IGNORE],
        *[IGNORE, IGNORE, X, Y, STOP, IGNORE],
        *picture_sample,
    ]
    assert batch.supervised == 2 + 3 + 2


def test_a_key_is_visible_to_the_end_of_its_own_sample(batch: Batch) -> None:
    assert batch.visible_until.tolist() == [4] * 4 + [10] * 6 + [20] * 10
    assert batch.visible_until.dtype == np.int64


def test_positions_start_again_and_pictures_are_stacked(batch: Batch) -> None:
    assert batch.positions[[0, 3, 4, 9, 10], 0].tolist() == [0, 3, 0, 5, 0]
    assert batch.grids.tolist() == [[1, 4, 4]]
    assert batch.patches.shape == (16, 588)
    assert np.flatnonzero(batch.is_vision).tolist() == list(range(11, 17))


def test_shift_by_hand() -> None:
    assert shift(np.array([5, 6, 7])).tolist() == [6, 7, IGNORE]
