from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ernietune.data.packing import Packer, efficiency, pack

MAX = 16
LENGTHS = st.lists(st.integers(1, MAX), max_size=60)


@given(LENGTHS, st.integers(0, 20))
def test_every_sample_once_and_no_row_too_long(lengths: list[int], buffer: int) -> None:
    rows = list(pack(enumerate(lengths), MAX, buffer))
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= MAX for row in rows)


@given(LENGTHS, st.integers(0, 20))
def test_never_more_than_the_buffer_waits(lengths: list[int], buffer: int) -> None:
    packer: Packer[int] = Packer(MAX, buffer)
    for item, length in enumerate(lengths):
        packer.add(item, length)
        assert len(packer) <= buffer


@given(LENGTHS)
def test_packing_is_never_worse_than_one_sample_a_row(lengths: list[int]) -> None:
    rows = [sum(lengths[item] for item in row) for row in pack(enumerate(lengths), MAX)]
    assert efficiency(rows, MAX) >= efficiency(lengths, MAX)


@given(LENGTHS, st.integers(0, 60), st.integers(1, 20))
def test_reopened_rows_continue_the_same(lengths: list[int], stop: int, buffer: int) -> None:
    whole: Packer[int] = Packer(MAX, buffer)
    for item, length in enumerate(lengths[:stop]):
        whole.add(item, length)
    again: Packer[int] = Packer(MAX, buffer)
    for row in whole.rows:
        again.reopen([(item, lengths[item]) for item in row.items])
    for item, length in enumerate(lengths[stop:], start=len(lengths[:stop])):
        assert whole.add(item, length) == again.add(item, length)
    assert list(iter(whole.pop, None)) == list(iter(again.pop, None))


def test_best_fit_by_hand() -> None:
    # 10 opens a row, 9 another; 5 fits both and goes to the fuller; 6 only fits beside 9; 7 opens a third.
    rows = list(pack(zip("abcde", [10, 9, 5, 6, 7], strict=True), MAX))
    assert rows == [["a", "c"], ["b", "d"], ["e"]]


def test_a_full_row_leaves_at_once() -> None:
    packer: Packer[str] = Packer(MAX)
    assert packer.add("a", 10) is None
    assert packer.add("b", 6) == ["a", "b"]
    assert packer.pop() is None


def test_without_buffer_every_sample_has_its_own_row() -> None:
    assert list(pack(zip("abc", [3, 3, 3], strict=True), MAX, buffer=0)) == [["a"], ["b"], ["c"]]


def test_efficiency_of_known_rows() -> None:
    assert efficiency([16, 8], MAX) == 0.75
    assert efficiency([], MAX) == 0.0
