"""Launching a Triton kernel on Paddle tensors (no copy, Paddle's stream), on torch's, or in the interpreter.

Triton's interpreter (TRITON_INTERPRET=1, set before a kernel is imported) computes on CPU tensors; it is how
the tests run the kernels without a GPU. It cannot add or multiply bfloat16, so kernels take a constant UPCAST
and convert to float32 right behind a load when it is set; `upcast` says when.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

from .tensors import Tensor, contiguous, is_tensor, is_torch, on_gpu

# A100, H100 and H200, B200 and B300: the tiles are made for their shared memory, which other cards have not.
CAPABILITIES = (80, 90, 100, 103)
LEAST_FP8 = 90
LEAST_TRITON = (3, 8)  # the first that asks no torch for a launch


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


upcast = interpreted


@functools.cache
def installed() -> bool:
    """Whether there is a Triton to import that is recent enough."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= LEAST_TRITON


def usable(tensor: Tensor) -> bool:
    """Whether kernels can run fast where this tensor lies; if not, the caller takes the plain path.

    False in the interpreter, which only tests ask for, by calling the kernels' functions themselves.
    """
    return on_gpu(tensor) and installed() and not interpreted() and capability() in CAPABILITIES


def has_fp8() -> bool:
    """Whether the card multiplies e4m3 numbers; the interpreter does."""
    return interpreted() or capability() >= LEAST_FP8


@functools.cache
def capability() -> int:
    """Compute capability of the current card: 90 for Hopper; 0 in the interpreter."""
    if interpreted():
        return 0
    driver = _cuda_driver()
    major, minor = driver.get_device_capability(driver.get_current_device())
    return int(10 * major + minor)


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on a grid of one to three sizes; nothing happens when one of them is 0.

    Tensors among the arguments are all Paddle's or all torch's; constants are the kernel's constexprs and
    Triton's own (num_warps, num_stages). Kernels write into whole tensors of their caller's making; what they
    read may be a view with strides of its own, as autograd hands them out on a GPU, and is copied then.
    """
    if not all(grid):
        return
    arguments = tuple(contiguous(a) if is_tensor(a) else a for a in arguments)
    paddles = any(is_tensor(a) and not is_torch(a) for a in arguments)
    if paddles and interpreted():
        arguments = tuple(_Storage(a) if is_tensor(a) else a for a in arguments)
    elif paddles:
        _activate_paddle()
    # Named, because Triton's own choice changes with its version, and with it the last bit of results.
    kernel[tuple(grid)](*arguments, enable_fp_fusion=True, **constants)


class _Storage:
    """A Paddle CPU tensor with the storage methods that the interpreter asks of a torch tensor.

    All of them give the tensor itself: the kernel reads and writes its memory in place.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.dtype, self.shape = tensor.dtype, tensor.shape

    def data_ptr(self) -> int:
        return int(self.tensor.data_ptr())

    def untyped_storage(self) -> _Storage:
        return self

    def cpu(self) -> _Storage:
        return self

    def new_empty(self, size: int, device: str) -> _Storage:
        return self

    def set_(self, *storage: Any) -> None:
        """The storage is this tensor's already."""

    def copy_(self, other: _Storage) -> None:
        """The memory is the same."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> list[int]:
        return list(self.shape)

    def stride(self) -> list[int]:
        return list(self.tensor.strides)


@functools.cache
def _cuda_driver() -> Any:
    """Triton's CUDA driver as it is, or one that asks no torch where a torch without CUDA is loaded."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    return driver.active if CudaDriver.is_active() else _without_torch()


def _without_torch() -> Any:
    """A driver that asks CUDA itself: Triton's own asks torch in every process that has loaded one."""
    from triton.backends.nvidia.driver import CudaDriver

    cuda = CudaDriver()
    cuda.get_device_capability = cuda._get_device_capability
    cuda.get_current_device = cuda._get_current_device
    cuda.set_current_device = cuda._set_current_device
    return cuda


@functools.cache
def _activate_paddle() -> None:
    """Make Triton launch on Paddle's current device and stream, also in a process that has loaded torch.

    Needs Triton 3.8 or later, the first that asks no torch for a launch. Not run yet: see docs/hardware.md.
    """
    import paddle
    from triton.runtime import driver

    cuda = _without_torch()
    cuda.get_current_stream = paddle._C._cuda_getCurrentRawStream
    driver.set_active(cuda)
