"""benchmarks/gpu_kernels.py in Triton's interpreter: the kernels on torch tensors, against torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

FOLDER = Path(__file__).parents[2] / "benchmarks"
BAD_ROWS = """
import torch
from gpu_timing import Ceilings, Sheet
sheet = Sheet(Ceilings())
sheet.add("right", [], lambda: (torch.ones(3), torch.ones(3)), 0.0)
sheet.add("wrong", [], lambda: (torch.ones(3), torch.full([3], 1.1)))
sheet.add("no number", [], lambda: (torch.full([3], float("nan")), torch.ones(3)))
sheet.add("broken", [], lambda: 1 / 0)
"""


def test_every_kernel_agrees_with_torch() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    command = [sys.executable, FOLDER / "gpu_kernels.py", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    total = re.search(r"(\d+) rows, 0 wrong or failed", done.stdout)
    assert total
    assert int(total[1]) >= 80


def test_a_row_that_is_wrong_or_fails_is_said_and_the_next_one_runs() -> None:
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", BAD_ROWS], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    rows = {row["name"]: row["wrong"] for row in map(json.loads, done.stdout.splitlines())}
    assert rows["right"] == ""
    assert rows["wrong"].startswith("wrong")
    assert rows["no number"].startswith("wrong")
    assert rows["broken"] == "failed: ZeroDivisionError: division by zero"
