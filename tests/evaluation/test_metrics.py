from __future__ import annotations

import pytest

from ernietune.evaluation.metrics import exact_match, normalize_answer, wilson_interval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Red. ", "red"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("红色。", "红色"),
        ("red !?\n", "red"),
        ("3.5", "3.5"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match_is_not_containment() -> None:
    assert exact_match("Red", "red.")
    assert not exact_match("red", "It is red")
    assert not exact_match("-1", "1")


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # The upper end of 0 of n is z2 / (n + z2); the others are examples of Newcombe 1998.
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=6e-5)
