"""The lines below the table of benchmarks/gpu_kernels.py: whether each target was met."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from benchmarks.gpu_targets import BESIDE, MEMORY, SHARE, TARGETS, Target, verdicts


@dataclass
class Row:
    """What a target asks of a row of the table."""

    name: str
    share: float | None = None
    beside: float | None = None
    memory: float | None = None
    wrong: str = ""


TWO = Target("products", ("one", "two"), SHARE, 0.7)


@pytest.mark.parametrize(
    ("target", "rows", "expected"),
    [
        (TWO, [Row("one", 0.8), Row("two", 0.7)], "target products >= 70.0%: met: 70.0%"),
        (TWO, [Row("one", 0.8), Row("two", 0.699)], "target products >= 70.0%: missed: 69.9%"),
        (TWO, [Row("one", 0.8), Row("two")], "target products >= 70.0%: not measured"),
        (TWO, [Row("one", 0.8)], "target products >= 70.0%: not measured"),
        (
            TWO,
            [Row("one", 0.8), Row("two", wrong="failed")],
            "target products >= 70.0%: missed: a row is wrong or failed",
        ),
        (Target("x", ("a",), BESIDE, 1.5), [Row("a", beside=1.6)], "target x >= 1.50 x: met: 1.60 x"),
        (Target("x", ("a",), MEMORY, 256), [Row("a", memory=257)], "target x <= 256 MiB: missed: 257 MiB"),
        (Target("x", ("a",), MEMORY, 256), [Row("a", memory=203)], "target x <= 256 MiB: met: 203 MiB"),
    ],
)
def test_the_worst_row_decides(target: Target, rows: list[Row], expected: str) -> None:
    assert target.verdict({row.name: row for row in rows}) == expected


def test_every_target_has_a_line_where_nothing_was_measured() -> None:
    lines = verdicts([])
    assert len(lines) == len(TARGETS) == 14
    assert all(line.startswith("target ") and line.endswith(": not measured") for line in lines)
