"""What only a GPU runs: it stands where docs/hardware.md says, and the installed Paddle has it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import paddle
import pytest

ROOT = Path(__file__).resolve().parent.parent
# What only a GPU can do, by the words in the source, and where it may stand.
WORDS = {
    r"flashmask_attention": ["kernels/ernietune_kernels/block_attention.py"],
    r"_cuda_getCurrentRawStream": ["kernels/ernietune_kernels/gpu/runtime.py"],
    r"CUDAPinnedPlace|pin_memory|stream_guard|wait_stream|device\.Stream": [
        "ernietune/parallel/host_memory.py"
    ],
    r"device\.cuda\.": [
        "ernietune/infer/options.py",
        "ernietune/models/devices.py",
        "ernietune/parallel/accounts.py",
        "ernietune/train/memory.py",
    ],
}
FLASH_MASK = ("query", "key", "value", "startend_row_indices")


@pytest.mark.parametrize("pattern", WORDS)
def test_gpu_calls_stand_where_the_page_says(pattern: str) -> None:
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    files = [*(ROOT / "ernietune").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = [
        str(f.relative_to(ROOT)) for f in sorted(files) if re.search(pattern, f.read_text(encoding="utf-8"))
    ]
    assert found == WORDS[pattern]
    assert all(f"`{name.removeprefix('kernels/')}`" in page for name in found)


def test_flash_mask() -> None:
    parameters = inspect.signature(paddle.nn.functional.flashmask_attention).parameters
    assert tuple(parameters)[:4] == FLASH_MASK
    assert parameters["causal"].default is False


def test_streams() -> None:
    inspect.signature(paddle.device.Stream).bind()
    inspect.signature(paddle.device.Stream.wait_stream).bind(None, None)
    inspect.signature(paddle.device.current_stream).bind()
    inspect.signature(paddle.nn.Layer.to).bind(None, "gpu:0")
    inspect.signature(paddle.device.stream_guard).bind(None)
    assert callable(paddle.CUDAPinnedPlace)
    assert callable(paddle._C._cuda_getCurrentRawStream)


def test_copies_between_places() -> None:
    """The call of the page-locked copies, to the only place that a CPU build has."""
    tensor = paddle.arange(6).reshape([2, 3])
    copy = tensor._copy_to(paddle.CPUPlace(), True)
    assert copy.data_ptr() != tensor.data_ptr()
    assert (copy == tensor).all()
    room = paddle.empty([2, 3], tensor.dtype)
    room.copy_(tensor, False)  # the second says whether to wait, which a CPU always does
    assert (room == tensor).all()


def test_memory_of_the_card() -> None:
    assert "device" in inspect.signature(paddle.device.cuda.get_device_properties).parameters
    for name in ("max_memory_allocated", "memory_allocated", "memory_reserved", "get_device_capability"):
        inspect.signature(vars(paddle.device.cuda)[name]).bind()
