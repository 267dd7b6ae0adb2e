"""Every Triton kernel is compiled for cards that are not here, and what makes it fast is in the machine code.

The command is benchmarks/gpu_compiled.py, in a process of its own: in this one the kernels may belong to
Triton's interpreter.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not (TOOLS / "nvdisasm").exists(), reason="this Triton comes without nvdisasm and cuobjdump"
)
# What one block may have of shared memory, in bytes: sm_80 163 KiB, sm_90 and sm_100 227 KiB.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# VL-28B's experts for text have the shape of 21B's; a card's of 300B read rows that came from others.
HOPPER = ("--only", "bf16 FP8 int8 int4/64 cross-entropy decode combine sort")
SHAPES = {"21b", "vl28b-vision", "300b-ep8"}


@cache
def lines(*arguments: str) -> list[dict[str, Any]]:
    """The command's figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.json"
        command = [sys.executable, ROOT / "benchmarks" / "gpu_compiled.py", *arguments, "--json", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return list(json.loads(path.read_text(encoding="utf-8")))


def hopper(kernel: str, *calls: str) -> list[dict[str, Any]]:
    """Lines of a kernel on sm_90, of calls that hold one of the words."""
    found = [
        line
        for line in lines(*HOPPER)
        if line["kernel"] == kernel and any(word in call for call in line["calls"] for word in calls)
    ]
    assert found, (kernel, calls)
    return found


def test_every_kernel_compiles_for_ampere_and_blackwell() -> None:
    found = lines("--cards", "80", "100", "--once", "--models", "21b")
    kernels = {
        node.name.removesuffix("_kernel")
        for path in (ROOT / "kernels" / "ernietune_kernels" / "gpu").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    # An A100 has no e4m3: FP8 takes the plain path there.
    assert {line["kernel"] for line in found if line["card"] == 100} == kernels
    without = kernels - {"fp8", "quantize", "turn"}
    assert {line["kernel"] for line in found if line["card"] == 80} == without
    for line in found:
        assert line["spilled"] == 0, line
        assert line["shared"] <= SHARED[line["card"]], line
        assert line["blocks"] >= 1, line


def test_every_shape_and_every_number_of_heads_is_compiled() -> None:
    for call in ("gate+up bf16 train", "down int8 train", "FP8 forward train", "gate+up int4/64 decode"):
        kernel = "fp8" if call.startswith("FP8") else "gate_up" if "up" in call else "grouped"
        assert {name for line in hopper(kernel, call) for name in line["bounds"]} == SHAPES
    # 21B and VL-28B have 20 query and 4 key/value heads, 0.3B 16 and 2, 300B 64 and 8.
    heads = {name for line in hopper("decode", "decode attention") for name in line["bounds"]}
    assert heads == SHAPES | {"0.3b"}
    assert hopper("spread", "combine, weighted, back")
    assert hopper("combine", "combine, one choice")


def test_nothing_spills_and_all_fits_on_hopper() -> None:
    for line in lines(*HOPPER):
        assert line["spilled"] == 0, line
        assert line["shared"] <= SHARED[90], line
        assert line["blocks"] >= 1, line


@pytest.mark.parametrize(
    ("kernel", "calls"),
    [
        ("gate_up", ["gate+up bf16 train", "gate+up int8 train", "gate+up int4/64 train"]),
        ("grouped", ["down bf16 train", "back bf16", "back int8", "down int8 train", "down int4/64 train"]),
        ("fp8", ["FP8 forward", "FP8 input gradient"]),
        ("logits", ["cross-entropy"]),
    ],
)
def test_large_products_run_on_warpgroups_and_read_ahead(kernel: str, calls: list[str]) -> None:
    """m16n8k16, the tensor cores' older instruction, cannot reach 70 % of a Hopper card."""
    for line in hopper(kernel, *calls):
        assert "HGMMA" in line["tensor_core"], line
        assert "HMMA" not in line["tensor_core"].split("+"), line
        assert ("QGMMA" in line["tensor_core"]) == (kernel == "fp8"), line
        assert line["ahead"] > 0, line


def test_tiles_of_bf16_and_fp8_are_copied_in_16_bytes_without_waiting() -> None:
    for kernel in ("gate_up", "grouped"):
        for line in hopper(kernel, "bf16"):
            assert line["ahead"] == line["wide"] > 0, line
            assert line["waiting"] == 0, line
    for line in hopper("fp8", "FP8"):
        assert line["ahead"] == line["wide"] > 0, line


def test_unpacking_for_few_rows_takes_less_time_than_the_memory() -> None:
    """A turn's instructions take no longer than its bytes at 75 % of 4.8 TB/s."""
    for kernel in ("gate_up", "grouped"):
        for line in hopper(kernel, "decode"):
            for bound in line["bounds"].values():
                assert int(re.search(r"I (\d+)%", bound)[1]) >= 75, line
