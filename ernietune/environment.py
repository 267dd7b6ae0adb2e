"""The process environment Paddle needs, set once before `import paddle`.

Paddle reads these variables when its library is loaded, so they are set by `import ernietune`
(`ernietune/__init__.py`), which every entry point passes. A value the user has set always wins, and
ERNIETUNE_KEEP_ENV=1 switches the whole thing off. On a CPU it is worth about 4x.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys
import warnings
from importlib import metadata

from ernietune.errors import MissingPackage

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
INSTALL_PADDLE = (
    "PaddlePaddle 3.3 is not installed; for a CPU run `pip install 'ernietune[cpu]'`, for a GPU run "
    "`pip install 'ernietune[gpu]' --extra-index-url https://www.paddlepaddle.org.cn/packages/stable/cu126/`"
)


def prepare() -> None:
    """Set the variables Paddle reads at import, unless the user did or paddle is already loaded."""
    if os.environ.get("ERNIETUNE_KEEP_ENV") == "1" or "paddle" in sys.modules:
        return
    # The bundled BLAS starts with one thread; a launched worker shares the cores with its siblings.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))))
    defaults = {"MKL_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "GLOG_minloglevel": "2"}
    if not has_gpu_build():
        # Strided views make every later CPU kernel up to 15x slower than one copy does.
        defaults["FLAGS_use_stride_kernel"] = "0"
    mkl_type = _mkl_type_on_amd()
    if mkl_type:
        defaults["MKL_DEBUG_CPU_TYPE"] = mkl_type
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="No ccache found")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc reuse blocks up to 128 MiB instead of returning them to the kernel after every operation.

    Paddle's CPU allocator asks the C library for each tensor, and touching fresh pages for a result of a few
    megabytes costs more than an element-wise operation on it.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 27)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)  # those of other threads, such as the engine's, are given back all the same


def has_gpu_build() -> bool:
    """True when the installed Paddle is the CUDA build; asks the package metadata, imports nothing."""
    try:
        metadata.version("paddlepaddle-gpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def require_paddle() -> None:
    """Raise MissingPackage with both install commands when there is no paddle to import.

    Also imports it with its start-up warnings about threads and ccache muted: we set the threads on purpose.
    """
    if importlib.util.find_spec("paddle") is None:
        raise MissingPackage(INSTALL_PADDLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _import_quietly()


def _import_quietly() -> None:
    """Import paddle; hide the two lines it prints to stderr when OMP_NUM_THREADS is above one."""
    if "paddle" in sys.modules:
        return
    stderr, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: SIM115 - closed below
    try:
        import paddle  # noqa: F401
    finally:
        hidden, sys.stderr = sys.stderr, stderr
        # It also sets up the logging of the process, which has to write where people read.
        for handler in logging.root.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is hidden:
                handler.setStream(stderr)
        hidden.close()


def _mkl_type_on_amd() -> str | None:
    """The MKL code path to force on AMD: 7 with AVX-512, 5 with AVX2; its own choice is 2.5-5x slower."""
    try:
        with open("/proc/cpuinfo") as handle:
            text = handle.read(8192)
    except OSError:
        return None
    if "AuthenticAMD" not in text:
        return None
    if "avx512f" in text:
        return "7"
    return "5" if "avx2" in text else None
