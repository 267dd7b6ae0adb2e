"""Compiles the C sources once per machine, with the system's compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_HERE = Path(__file__).parent
_SOURCES = (
    *("linear.c", "tiles.c", "digits.c", "convert.c", "decode.c", "sequence.c"),
    *("attention.c", "lowrank.c", "pointwise.c"),
)
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-std=gnu11")


class BuildError(Exception):
    """There is no usable compiler; the message says what is missing or what it said."""


def library() -> Path:
    """The compiled library, from the user's cache folder or built now; BuildError when that fails."""
    compiler = _compiler()
    path = _cache_folder() / f"kernels-{_key(compiler)}.so"
    if not path.is_file():
        _compile(compiler, path)
    return path


def _compiler() -> str:
    chosen = os.environ.get("CC")
    for name in [chosen] if chosen else ["cc", "gcc", "clang"]:
        if found := shutil.which(name):
            return found
    raise BuildError(f"there is no C compiler ({chosen or 'cc, gcc or clang'}); install gcc")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ernietune"


def _key(compiler: str) -> str:
    """Changes with the sources, the flags, the compiler and the processor: -march=native is of this one."""
    digest = hashlib.sha256("\0".join([*_FLAGS, os.path.realpath(compiler), _processor()]).encode())
    for file in sorted(_HERE.glob("*.[ch]")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, path: Path) -> None:
    """Build beside the final place and rename: of two processes at once both end with a whole file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # A user waits for it before the first step ever: all sources at once, then one link.
            with ThreadPoolExecutor() as pool:
                objects = list(pool.map(lambda name: _object(compiler, name, Path(folder)), _SOURCES))
            built = Path(folder) / path.name
            _run([compiler, *_FLAGS, "-shared", *objects, "-o", str(built), "-lm"])
            os.replace(built, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the kernels cannot be built in {path.parent}: {error}") from error


def _object(compiler: str, source: str, folder: Path) -> str:
    """One source compiled; the path of what came out."""
    path = str(folder / f"{source}.o")
    _run([compiler, *_FLAGS, "-c", str(_HERE / source), "-o", path])
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
