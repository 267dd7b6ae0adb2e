"""Tile sizes by measuring, in the time that there is: gpu_kernels.py --tune."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import fp8, products, tuning
from gpu.products import Rows, Term
from gpu.runtime import capability
from gpu_layer import Layer, Shapes, quantised
from gpu_timing import random, times

Tiles = dict[str, int]


def tiles(m: int, n: int, k: int, warps: int, stages: int, group: int = 8) -> Tiles:
    """One candidate."""
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group}
    return sizes | {"num_warps": warps, "num_stages": stages}


# By kernel and shape class as products.py asks for them.
LARGE = [
    *(tiles(128, 256, 64, 8, stages) for stages in (3, 4)),
    *(tiles(128, 128, 64, 8, stages) for stages in (3, 4)),
    *(tiles(128, 128, 64, 4, 4), tiles(64, 256, 64, 4, 4), tiles(128, 128, 128, 8, 2)),
    tiles(128, 256, 64, 8, 4, group=16),
]
HALVED = [{**one, "BLOCK_N": one["BLOCK_N"] // 2} for one in LARGE]
SLIM = ((32, 128, 4), (64, 128, 3), (64, 128, 5), (32, 256, 4))
STREAM = [tiles(16, n, k, 4, stages, group=1) for n, k, stages in SLIM]
FP8 = [
    {name: value for name, value in tiles(*sizes).items() if name != "BLOCK_K"}
    for sizes in ((128, 128, 0, 8, 3), (128, 128, 0, 8, 4), (64, 128, 0, 4, 4), (128, 64, 0, 4, 4))
]


def tune(path: Path, limit: float) -> bool:
    """Try the candidates that `limit` seconds allow and add the best to `path`; whether any was measured.

    What is being tried stands in a file beside it: if a candidate hangs, nothing bad is left in `path`.
    """
    trying = path.with_suffix(".trying")
    os.environ[tuning.OWN] = str(trying)
    end, found = time.monotonic() + limit, 0
    for kernel, key, candidates, run in _work():
        best = _best(kernel, key, candidates, run, trying, end)
        if best is not None:
            found += 1
            tuning.record(kernel, key, best[1], path)
            print(f"tuned {kernel}/{key}: {1e3 * best[0]:.4g} ms with {best[1]}", flush=True)
    trying.unlink(missing_ok=True)
    return found > 0


def _work() -> list[tuple[str, str, list[Tiles], Callable[[], Any]]]:
    s = Shapes()
    layer = Layer.make(s)
    rows, _ = layer.sorted()
    own, h = Rows(rows.total, rows.counts), random(rows.total, s.inner)
    gate, up, down = (Term(p.stack) for p in layer.trio)
    one = layer.with_tokens(4)
    few, _ = one.sorted()
    work = [
        ("gate_up", "large", HALVED, lambda: products.gate_up(layer.x, rows, gate, up)),
        ("grouped", "large", LARGE, lambda: products.grouped(h, own, [down])),
        ("grouped_back", "large", LARGE, lambda: products.grouped(h, own, [gate], forward=False)),
        ("gate_up", "stream", STREAM, lambda: products.gate_up(one.x, few, gate, up)),
    ]
    low = Term(quantised(layer.gate.stack.codes, 8, 1))
    work.append(("gate_up", "stream/int8", STREAM, lambda: products.gate_up(one.x, few, low, low)))
    if capability() >= 89:
        x, stack = fp8.quantize_rows(layer.x[rows.source]), fp8.quantize_blocks(layer.gate.stack.codes)
        work.insert(3, ("fp8", "e4m3", FP8, lambda: fp8.grouped_fp8(x, own, stack, "bfloat16")))
    return work


def _best(
    kernel: str, key: str, candidates: list[Tiles], run: Callable[[], Any], path: Path, end: float
) -> tuple[float, Tiles] | None:
    best = None
    for candidate in candidates:
        if time.monotonic() > end:
            break
        tuning.record(kernel, key, candidate, path)
        try:
            seconds = times([run])[0]
        except Exception as error:  # Too much shared memory, or whatever else: the next one may do.
            print(f"{kernel}/{key} {candidate}: {type(error).__name__}", file=sys.stderr)
            continue
        if best is None or seconds < best[0]:
            best = (seconds, candidate)
    return best
