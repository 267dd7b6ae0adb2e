"""Model folders as a whole: everything beside the weights, and output that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ernietune.checkpoint.safetensors import sync_folder
from ernietune.errors import CheckpointError

_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".pdparams", ".gguf", ".onnx")


def side_files(folder: Path) -> list[Path]:
    """Return config, tokenizer, template and other files of a folder: all but weights and hidden files."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if not path.name.endswith(_WEIGHT_SUFFIXES)]


def copy_side_files(source: Path, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Copy every side file of `source` into `folder`, unchanged, but for the names in `without`."""
    for path in side_files(source):
        if path.name not in without:
            shutil.copyfile(path, folder / path.name)


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `folder` when the block succeeds and vanishes when not.

    CheckpointError when `folder` already holds something, or when the disk refuses.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another output folder or remove it")
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        sync_folder(part)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
        sync_folder(folder.parent)
    except OSError as error:
        problem = error.strerror or error
        raise CheckpointError(f"{folder} cannot be written ({problem}); nothing was left behind") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
