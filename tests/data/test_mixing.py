from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from letters import LIMITS, VISION, LetterTemplate, turn, write_lines

from ernietune.data.dataset import Dataset, Encoder
from ernietune.data.mixing import epoch_order, interleaved_order
from ernietune.data.sources import open_source
from ernietune.data.stream import Stream, StreamOptions, count_batches, sample_lengths
from ernietune.errors import DataError


def test_three_to_one_by_hand() -> None:
    """Six records of the first source and two of the second, the second's due in the middle of each half."""
    order = interleaved_order([4, 4], [3, 1], seed=None, epoch=0)
    assert order.tolist() == [0, 1, 4, 2, 3, 0, 5, 1]


@pytest.mark.parametrize("seed", [None, 3])
def test_every_beginning_has_its_shares(seed: int | None) -> None:
    lengths, weights = [50, 7, 23], [0.5, 0.2, 0.3]
    order = interleaved_order(lengths, weights, seed, epoch=2)
    assert len(order) == 80
    sources = np.searchsorted(np.cumsum(lengths), order, side="right")
    for taken in range(1, 81):
        counts = np.bincount(sources[:taken], minlength=3)
        assert np.abs(counts - taken * np.array(weights)).max() <= 1


def test_a_source_goes_on_where_the_last_epoch_left_it() -> None:
    """40 records an epoch of the 60 in the second source: three epochs read each of them twice."""
    read = np.concatenate([interleaved_order([20, 60], [1, 1], 5, epoch) for epoch in range(3)])
    first, second = read[read < 20], read[read >= 20]
    assert (len(first), len(second)) == (120, 120)
    assert np.bincount(first).tolist() == [6] * 20
    assert np.bincount(second - 20).tolist() == [2] * 60
    assert (second[:60] - 20).tolist() == epoch_order(60, 5, 0).tolist()
    assert (second[60:] - 20).tolist() == epoch_order(60, 5, 1).tolist()


@pytest.fixture
def mixed(tmp_path: Path) -> Dataset:
    paths = [
        write_lines(tmp_path / f"{name}.jsonl", [{"messages": turn("q" * n, name)} for n in range(1, count)])
        for name, count in (("a", 9), ("b", 4))
    ]
    encoder = Encoder(LetterTemplate(), 16, vision=VISION, limits=LIMITS)
    return Dataset([open_source(path) for path in paths], encoder, weights=[0.4, 0.6])


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_a_mixture_resumes_exactly(mixed: Dataset, taken: int) -> None:
    options = StreamOptions(max_length=16, rows=1, seed=1, epochs=4, buffer=4)
    straight = list(Stream(mixed, options))
    assert len(straight) == count_batches(mixed, sample_lengths(mixed), options)
    stream = Stream(mixed, options)
    for _ in range(taken):
        next(stream)
    resumed = Stream(mixed, options)
    resumed.load_state_dict(stream.state_dict())
    assert [batch.ids.tolist() for batch in resumed] == [batch.ids.tolist() for batch in straight[taken:]]


def test_other_weights_cannot_resume(mixed: Dataset) -> None:
    options = StreamOptions(max_length=16)
    state = Stream(mixed, options).state_dict()
    mixed.weights = [0.5, 0.5]
    with pytest.raises(DataError, match=r"weights was \[0.4, 0.6\] and is \[0.5, 0.5\]"):
        Stream(mixed, options).load_state_dict(state)
