"""Every Triton kernel on the card at hand: checked against fp32, timed, and set beside ceilings and peers.

    python benchmarks/gpu_kernels.py               all groups of rows (21B: 8,192 tokens, top 6 of 64 experts)
    python benchmarks/gpu_kernels.py --tune FILE   try tile sizes first, record the best in FILE and use it
    python benchmarks/gpu_kernels.py --group head  one group, as lines of JSON
    python benchmarks/gpu_kernels.py --small       tiny shapes: a check of this script, also without a card

Needs torch and triton, not paddle. Ceilings (dense products by torch in bf16 and FP8, a copy) are measured in
the same call; calls are replayed as graphs, and small ones take turns on more memory than the cache holds.
Each group is a process with a time limit: a kernel that fails, hangs or damages the card's state costs the
rows of its group. Peers (torch's grouped product, Liger) that are not there leave their column empty, those
that fail the error's name. Below the table each target has a line: met, missed or not measured. The exit code
is 1 if any row is wrong, failed or missing, not for a target. Without a card, `--small` runs the kernels in
Triton's interpreter and prints errors but no times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The folder of the kernels as a package of its own: ernietune_kernels itself imports paddle.
sys.path[:0] = [str(HERE.parent / "kernels" / "ernietune_kernels"), str(HERE)]

import torch  # noqa: E402

# First: without a card it turns Triton's interpreter on, which has to be before a kernel is imported.
from gpu_timing import CARD, Ceilings, Row, Sheet, ceilings, show  # noqa: E402  isort: skip
import gpu_layer  # noqa: E402  isort: skip
import gpu_rows  # noqa: E402  isort: skip
import gpu_targets  # noqa: E402  isort: skip
import gpu_tune  # noqa: E402  isort: skip
from gpu import tuning  # noqa: E402  isort: skip

GROUPS: dict[str, Callable[[Sheet, gpu_layer.Shapes], None]] = {
    "experts": gpu_rows.expert_rows,
    "head": gpu_rows.head_rows,
    "quantised": gpu_rows.quantised_rows,
    "decode attention": gpu_rows.attention_rows,
    "decode experts": gpu_rows.decode_expert_rows,
    "small": gpu_rows.small_rows,
    "vision experts": gpu_rows.shape_rows,
    "300B, a card of 8": gpu_rows.shape_rows,
}
SHAPES = {
    "vision experts": gpu_layer.Shapes(inner=512),
    "300B, a card of 8": gpu_layer.Shapes(65_536, 1, 8, 8192, 3584, heads=64, groups=8, divided=True),
}
# Seconds: ceilings and all groups stay below seven minutes even if each runs into its limit.
LIMIT, TUNING_LIMIT = 45, 110


def run_group(name: str, small: bool, known: Ceilings) -> None:
    """The rows of one group, in this process."""
    torch.manual_seed(0)
    shapes = SHAPES.get(name, gpu_layer.Shapes())
    if small:
        small_shapes = {
            "vision experts": replace(gpu_layer.SMALL, inner=64),
            "300B, a card of 8": replace(gpu_layer.SMALL, chosen=1, divided=True),
        }
        shapes = small_shapes.get(name, gpu_layer.SMALL)
    GROUPS[name](Sheet(known), shapes)


def in_process(arguments: list[str], limit: float | None) -> tuple[list[str], str]:
    """(lines that this script printed with the arguments, what went wrong)."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return text.splitlines(), f"stopped after {limit:.0f} s"
    said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return done.stdout.splitlines(), said[0] if done.returncode else ""


def rows_of(name: str, small: bool, known: Ceilings) -> list[Row]:
    """The rows of a group from a process of its own, and one more if it did not reach its end."""
    arguments = ["--group", name, "--known", json.dumps(asdict(known)), *(["--small"] if small else [])]
    printed, problem = in_process(arguments, LIMIT if CARD else None)
    rows = [Row(**json.loads(line)) for line in printed if line.startswith("{")]
    return rows + ([Row(name, wrong=f"failed: {problem}")] if problem else [])


def tuned(path: Path) -> bool:
    """Whether tile sizes were measured; the kernels of the processes that follow use them."""
    if not CARD:
        print("--tune needs a card: nothing was measured")
        return False
    printed, problem = in_process(["--tuning", str(path)], TUNING_LIMIT + LIMIT)
    print("\n".join([*printed, *([f"tuning: {problem}"] if problem else [])]))
    os.environ[tuning.OWN] = str(path)
    return not problem


def measured() -> tuple[Ceilings, str]:
    """The ceilings, and what kept them from being measured."""
    printed, problem = in_process(["--ceilings"], LIMIT)
    found = [json.loads(line) for line in printed if line.startswith("{")]
    return Ceilings(**found[-1]) if found else Ceilings(), problem


def table(small: bool) -> bool:
    """Measure and print everything; whether all of it is right."""
    known, problem = measured() if CARD else (Ceilings(), "")
    if CARD:
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {problem or 'dense products'}",
            end=" ",
        )
        print(f"{known.bf16 / 1e12:.0f} (bf16) and {known.fp8 / 1e12:.0f} (FP8) TFLOP/s,", end=" ")
        print(f"a copy {known.copy / 1e12:.2f} TB/s")
    rows = []
    for name in GROUPS:
        rows += rows_of(name, small, known)
        print(f"{name}: done", file=sys.stderr)
    show(rows)
    print("\n".join(gpu_targets.verdicts(rows)))
    wrong = [row for row in rows if row.wrong]
    print(f"{len(rows)} rows, {len(wrong)} wrong or failed")
    return not wrong and not problem


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tune", type=Path, metavar="FILE")
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--known", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--tuning", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not CARD and not options.small:
        sys.exit("there is no CUDA card here; --small checks the kernels in Triton's interpreter")
    if options.ceilings:
        print(json.dumps(asdict(ceilings())))
    elif options.tuning:
        sys.exit(0 if gpu_tune.tune(options.tuning, TUNING_LIMIT) else "no tile sizes were measured")
    elif options.group:
        run_group(options.group, options.small, Ceilings(**json.loads(options.known)))
    else:
        well = tuned(options.tune) if options.tune else True
        if not table(options.small) or not well:
            sys.exit(1)


if __name__ == "__main__":
    main()
