"""What the device at hand can compute."""

from __future__ import annotations

import paddle

_LEAST_FOR_FP8 = (8, 9)


def fp8_problem() -> str | None:
    """Why FP8 products cannot be had from the GPU at hand; None where they can."""
    found = paddle.device.cuda.get_device_capability()
    if found >= _LEAST_FOR_FP8:
        return None
    return f"fp8 needs a GPU of compute capability 8.9 or later and this one has {found[0]}.{found[1]}"
