"""Launching kernels from Paddle tensors, and tables of tile sizes."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import ernietune  # noqa: F401  (sets the environment before paddle)

pytest.importorskip("triton")

import numpy as np
import paddle
from ernietune_kernels import reference
from ernietune_kernels.gpu import norm, runtime, tuning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [96, 128])
def test_rms_norm_writes_into_paddle_memory(dtype: str, width: int) -> None:
    paddle.seed(0)
    x, weight = paddle.randn([5, width]).astype(dtype), paddle.randn([width]).astype(dtype)
    y, inverse = norm.rms_norm(x, weight, 1e-5)
    x64, w64 = (t.astype("float32").numpy().astype(np.float64) for t in (x, weight))
    scale = 1 / np.sqrt((x64**2).mean(-1) + 1e-5)
    np.testing.assert_allclose(inverse.numpy(), scale, rtol=1e-6)
    truth = x64 * scale[:, None] * w64
    found = y.astype("float32").numpy()
    # Two roundings to bfloat16 (the norm, then the product) of relative size 2^-9 each, and one ulp of the
    # interpreter's own rounding.
    np.testing.assert_allclose(found, truth, rtol=2e-6 if dtype == "float32" else 2**-6, atol=1e-6)
    if dtype == "float32":
        np.testing.assert_allclose(found, reference.rms_norm(x, weight, 1e-5).numpy(), rtol=2e-6, atol=1e-6)


def test_a_view_is_read_by_its_values_not_by_its_memory() -> None:
    """On a GPU Paddle hands out views with strides, gradients among them; kernels know of none."""
    rows, weight = paddle.randn([96, 5]), paddle.ones([96])
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})
    try:
        view = rows.transpose([1, 0])
        assert not view.is_contiguous()
        found = norm.rms_norm(view, weight, 1e-5)[0]
    finally:
        paddle.set_flags(before)
    truth = reference.rms_norm(paddle.to_tensor(rows.numpy().T.copy()), weight, 1e-5)
    np.testing.assert_allclose(found.numpy(), truth.numpy(), rtol=2e-6, atol=1e-6)


def test_a_users_tile_table_overrides_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    default = {"BLOCK_M": 64, "num_warps": 4}
    assert tuning.tiles("k", "bf16", default) == default
    tuning.record("k", "bf16", {"BLOCK_M": 128}, path)
    monkeypatch.setenv(tuning.OWN, str(path))
    tuning.record("other", "bf16", {"BLOCK_M": 16}, path)
    assert tuning.tiles("k", "bf16", default) == {"BLOCK_M": 128, "num_warps": 4}
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("3.9.0", 90, True),
        ("3.8.0+git1", 80, True),
        ("3.7.1", 90, False),
        (None, 90, False),
        ("3.9.0", 89, False),
        ("3.9.0", 70, False),
        ("3.9.0", 120, False),
    ],
)
def test_kernels_are_taken_where_they_can_run(
    version: str | None, capability: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Triton, an old one, a card whose shared memory is too small for the tiles: the plain path."""

    def installed(name: str) -> str:
        assert name == "triton"
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", installed)
    monkeypatch.setattr(runtime, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(runtime, "interpreted", lambda: False)
    monkeypatch.setattr(runtime, "capability", lambda: capability)
    runtime.installed.cache_clear()
    try:
        assert runtime.usable(paddle.zeros([1])) == expected
    finally:
        runtime.installed.cache_clear()


def test_a_torch_without_cuda_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's driver asks whatever torch the process has loaded, also one that knows no card."""
    from triton.backends.nvidia import driver

    class Driver:
        """Triton's, as it is beside a torch without CUDA."""

        def __init__(self) -> None:
            self.get_current_device = self.get_device_capability = self._torch

        @staticmethod
        def is_active() -> bool:
            return False

        def _torch(self, *device: int) -> int:
            raise AssertionError("Torch not compiled with CUDA enabled")

        def _get_current_device(self) -> int:
            return 1

        def _set_current_device(self, device: int) -> None:
            raise AssertionError(device)

        def _get_device_capability(self, device: int) -> tuple[int, int]:
            return {1: (9, 0)}[device]

    own = {name for name in vars(Driver) if name.endswith(("_device", "_capability"))}
    assert own <= vars(driver.CudaDriver).keys()
    monkeypatch.setattr(driver, "CudaDriver", Driver)
    monkeypatch.setattr(runtime, "interpreted", lambda: False)
    for cached in (runtime.capability, runtime._cuda_driver):
        cached.cache_clear()
    try:
        assert runtime.capability() == 90
    finally:
        for cached in (runtime.capability, runtime._cuda_driver):
            cached.cache_clear()


def test_without_triton_every_operation_is_there() -> None:
    """No module of the package imports Triton before a kernel is launched."""
    program = """
import sys
sys.modules["triton"] = None
import ernietune, paddle, ernietune_kernels as kernels
x, experts = paddle.ones([3, 8]), paddle.to_tensor([[0, 1], [1, 2], [2, 0]])
rows, plan = kernels.permute(kernels.rms_norm(x, paddle.ones([8]), 1e-5), experts, 3)
rows = kernels.grouped_linear(rows, paddle.ones([3, 4, 8]), plan.counts)
y = kernels.unpermute(kernels.swiglu(rows, rows), paddle.full([3, 2], 0.5), plan)
print(float(kernels.linear_cross_entropy(y, paddle.ones([5, 4]), paddle.zeros([3], "int64")).sum()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(3 * np.log(5), rel=1e-5)


def test_a_cpu_takes_the_plain_path() -> None:
    assert not runtime.usable(paddle.zeros([1]))
