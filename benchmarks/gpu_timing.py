"""Checks and times of calls on a card, as rows of a table; every row survives the failure of another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

CARD = torch.cuda.is_available()
if not CARD:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if CARD else "cpu"
BF16 = torch.bfloat16
# More than the second-level cache of any card: calls take turns on so many bytes of operands.
BEYOND_CACHE = 256 << 20
ROUND = 0.05  # seconds a round of repetitions takes at least

Run = Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    """What torch reaches on this card: FLOP/s of dense products, bytes/s of a copy; 0 is unknown."""

    bf16: float = 0.0
    fp8: float = 0.0
    copy: float = 0.0


@dataclass
class Row:
    """A line of the table. `wrong` says what is the matter with it, if anything is.

    `share` is of a ceiling, `beside` how many times as fast as the peer, `memory` in MiB.
    """

    name: str
    error: float | None = None
    milliseconds: float | None = None
    rate: str = ""
    share: float | None = None
    beside: float | None = None
    peer: str = ""
    memory: float | None = None
    wrong: str = ""

    def cells(self) -> tuple[str, ...]:
        """As printed."""
        error = "" if self.error is None else f"{self.error:.1e}"
        time = "" if self.milliseconds is None else f"{self.milliseconds:.4g}"
        rate = self.rate if self.memory is None else f"{self.memory:.0f} MiB"
        share = "" if self.share is None else f"{self.share:.0%}"
        peer = self.peer if self.beside is None else f"{self.beside:.2f} x {self.peer}"
        return self.name, error, time, rate, share, peer, self.wrong


@dataclass(frozen=True)
class Sheet:
    """Prints a row as JSON as soon as it is known, so that a killed process leaves what it had."""

    ceilings: Ceilings

    def add(
        self,
        name: str,
        run: Run | Sequence[Run],
        truth: Callable[[], tuple[Any, torch.Tensor]] | None = None,
        tolerance: float = 0.01,
        flops: float = 0.0,
        moved: float = 0.0,
        peer: tuple[str, Run] | None = None,
        fp8: bool = False,
    ) -> None:
        """Check and time a call, or calls that take turns on different memory.

        `truth` gives what was found and what is right; their difference is relative, root mean square.
        """
        row, runs = Row(name), [run] if callable(run) else list(run)
        try:
            if truth is not None:
                self._check(row, truth, tolerance)
            if CARD and runs:
                self._time(row, runs, flops, moved, peer, fp8)
        except Exception as error:  # A kernel that fails may raise anything, and the others are to run.
            row.wrong = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.put(row)

    @staticmethod
    def put(row: Row) -> None:
        """Hand a row to whoever reads this process's output."""
        print(json.dumps(asdict(row)), flush=True)

    def _check(self, row: Row, truth: Callable[[], Any], tolerance: float) -> None:
        row.error = relative(*truth())
        # Without a card everything is computed in fp32, and only what is quantised may differ.
        limit = tolerance if CARD or tolerance > 0.01 else 1e-5
        if not row.error <= limit:
            row.wrong = f"wrong: off by more than {limit:g}"

    def _time(self, row: Row, runs: list[Run], flops: float, moved: float, peer: Any, fp8: bool) -> None:
        ceiling = (self.ceilings.fp8 if fp8 else self.ceilings.bf16) if flops else self.ceilings.copy
        runs_too, row.peer = _tried(peer) if peer else (None, "")
        seconds, other = times(runs, runs_too)
        rate = (flops or moved) / seconds
        row.milliseconds = 1e3 * seconds
        row.rate = f"{rate / 1e12:.2f} {'TFLOP/s' if flops else 'TB/s'}" if rate else ""
        row.share = rate / ceiling if ceiling and rate else None
        row.beside = other / seconds if other else None


def _tried(peer: tuple[str, Run]) -> tuple[Run | None, str]:
    """A peer that works and its name, or none and what it said: it is no fault of the row's."""
    name, run = peer
    try:
        run()
        torch.cuda.synchronize()
    except Exception as error:  # Another version's signature, a shape it refuses, a compiler's complaint.
        return None, f"{name}: {type(error).__name__}"
    return run, name


def times(runs: list[Run], peer: Run | None = None) -> tuple[float, float | None]:
    """Seconds a call: best of three rounds, the peer's in between."""
    ours, theirs = _replayed(runs), (lambda: peer()) if peer else None
    best, other = float("inf"), float("inf")
    for _ in range(3):
        best = min(best, _round(ours) / len(runs))
        other = min(other, _round(theirs)) if theirs else other
    return best, other if peer else None


def _replayed(runs: list[Run]) -> Run:
    """The calls as one graph: what the processor needs to launch them is no part of a kernel's time."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def _round(run: Run) -> float:
    run()
    repeats = max(3, min(1000, int(ROUND / max(_elapsed(run, 3), 1e-6))))
    return _elapsed(run, repeats)


def _elapsed(run: Run, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats / 1e3


def turns(moved: float) -> int:
    """How many operands have to take turns so that none is still in the cache."""
    return max(1, min(64, int(-(-BEYOND_CACHE // max(moved, 1.0))))) if CARD else 1


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    """Normal values on the device; in the interpreter fp32, which is what it computes in."""
    values = torch.randn(shape, device=DEVICE, dtype=torch.float32) * scale
    return values.to(dtype if CARD else torch.float32)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return float(((found.float() - truth.float()).norm() / truth.float().norm()).item())


def ceilings() -> Ceilings:
    """A dense product in bf16 and in FP8 and a copy, all by torch."""
    if not CARD:
        return Ceilings()
    x, y = random(8192, 8192), random(8192, 8192)
    bf16 = 2 * 8192**3 / times([lambda: x @ y])[0]
    big = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(big)
    copy = 2 * big.numel() / times([lambda: other.copy_(big)])[0]
    return Ceilings(bf16, _fp8_ceiling(x, y), copy)


def _fp8_ceiling(x: torch.Tensor, y: torch.Tensor) -> float:
    """torch._scaled_mm with one scale a tensor; 0 where this card or build has none."""
    if torch.cuda.get_device_capability() < (8, 9) or "_scaled_mm" not in dir(torch):
        return 0.0
    a, b = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).T
    one = torch.ones([], device=DEVICE)
    try:
        seconds = times([lambda: torch._scaled_mm(a, b, one, one, out_dtype=BF16)])[0]
    except (RuntimeError, TypeError) as error:
        print(f"torch._scaled_mm: {error}")
        return 0.0
    return 2 * 8192**3 / seconds


def show(rows: list[Row]) -> None:
    """Print the table."""
    head = ("kernel", "error", "ms", "rate", "of ceiling", "beside a peer", "")
    lines = [head, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
