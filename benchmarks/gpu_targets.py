"""What the kernels are meant to reach on an H200, and whether the rows of gpu_kernels.py reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_timing import Row

BATCHES = (1, 4, 16)
HEADS = ("20/4", "16/2", "64/8")
FORMS = ("16 bits, 1", "8 bits, 1", "4 bits, 64", "4 bits, 128")
LAYER = "2560 -> 1536, 6 of 64"
SHARE, BESIDE, MEMORY = "share", "beside", "memory"


@dataclass(frozen=True)
class Target:
    """`rows` reach `limit`: of a ceiling, as many times a peer's speed, or not more than as many MiB."""

    what: str
    rows: tuple[str, ...]
    kind: str
    limit: float

    def verdict(self, rows: dict[str, Row]) -> str:
        """The line of one target; its figure is the worst of its rows."""
        values = [self._value(rows.get(name)) for name in self.rows]
        known = [value for value in values if value is not None]
        failed = any(rows[name].wrong for name in self.rows if name in rows)
        if failed:
            return f"{self._words()} missed: a row is wrong or failed"
        if len(known) < len(values):
            return f"{self._words()} not measured"
        worst = max(known) if self.kind == MEMORY else min(known)
        met = worst <= self.limit if self.kind == MEMORY else worst >= self.limit
        return f"{self._words()} {'met' if met else 'missed'}: {self._text(worst)}"

    def _value(self, row: Row | None) -> float | None:
        if row is None:
            return None
        return {SHARE: row.share, BESIDE: row.beside, MEMORY: row.memory}[self.kind]

    def _words(self) -> str:
        sign = "<=" if self.kind == MEMORY else ">="
        return f"target {self.what} {sign} {self._text(self.limit)}:"

    def _text(self, value: float) -> str:
        return {SHARE: f"{value:.1%}", BESIDE: f"{value:.2f} x", MEMORY: f"{value:.0f} MiB"}[self.kind]


def _attention(batch: int) -> tuple[str, ...]:
    return tuple(f"decode attention, {heads} heads, batch {batch}" for heads in HEADS)


def _experts(batch: int) -> tuple[str, ...]:
    return tuple(f"decode {part}, {batch} tokens, {form}" for form in FORMS for part in ("gate+up", "down"))


PRODUCTS = ("gate+up, LoRA, SwiGLU", "down, LoRA")
TARGETS = (
    Target("grouped products with LoRA, forward, of a dense product's speed", PRODUCTS, SHARE, 0.70),
    Target("the same, input gradient", ("input gradient, LoRA",), SHARE, 0.65),
    Target("whole expert layer, forward, sorting and all", (f"layer forward, {LAYER}",), SHARE, 0.70),
    Target("whole expert layer, backward, every gradient", (f"layer backward, {LAYER}",), SHARE, 0.65),
    Target("FP8 forward beside our bf16", ("FP8 forward",), BESIDE, 1.5),
    Target("FP8 input gradient beside our bf16", ("FP8 input gradient",), BESIDE, 1.5),
    Target("cross-entropy beside Liger's", ("linear cross-entropy",), BESIDE, 1.0),
    Target("cross-entropy's memory beyond its results", ("  its memory",), MEMORY, 256),
    *(Target(f"decode attention of a copy's speed, batch {b}", _attention(b), SHARE, 0.75) for b in BATCHES),
    *(Target(f"decode experts of a copy's speed, batch {b}", _experts(b), SHARE, 0.75) for b in BATCHES),
)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each target."""
    named = {row.name: row for row in rows}
    return [target.verdict(named) for target in TARGETS]
