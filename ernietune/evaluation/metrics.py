"""Scores of answers that are right or wrong."""

from __future__ import annotations

import math
import unicodedata

_NORMAL_QUANTILE = 1.959963984540054  # 97.5 % of a normal distribution lie below


def normalize_answer(text: str) -> str:
    """The text in the form that is compared: casefolded, without outer spaces and trailing punctuation."""
    text = text.strip().casefold()
    while text and (text[-1].isspace() or unicodedata.category(text[-1]).startswith("P")):
        text = text[:-1]
    return text


def exact_match(expected: str, got: str) -> bool:
    """True when two answers are equal after normalisation."""
    return normalize_answer(expected) == normalize_answer(got)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy; it also holds for few records and near 0 and 1."""
    if total == 0:
        return 0.0, 1.0
    z2 = _NORMAL_QUANTILE**2
    share = correct / total
    center = share + z2 / (2 * total)
    spread = _NORMAL_QUANTILE * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
