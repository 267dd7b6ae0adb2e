"""Reading and writing of safetensors folders, one tensor at a time.

The format: 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), then the bytes. A
large model is several such files and an index that says which tensor is where. Nothing here needs paddle.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernietune.checkpoint.dtypes import STORAGE, Array, to_float32
from ernietune.errors import CheckpointError, listed

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class TensorInfo:
    """Name, safetensors dtype ("BF16", "F32", ...) and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


class Reader:
    """All tensors of one model folder (or of one .safetensors file), memory-mapped read-only.

    Opening checks every header, so a damaged download fails at once and not in the middle of a load.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tensors: dict[str, tuple[TensorInfo, _File, int]] = {}
        for file in _open_files(self.path):
            for info, start in file.tensors:
                if info.name in self._tensors:
                    other = self._tensors[info.name][1].path.name
                    raise CheckpointError(f"{file.path}: tensor {info.name} is also stored in {other}")
                self._tensors[info.name] = (info, file, start)

    @property
    def infos(self) -> list[TensorInfo]:
        """Every tensor, in file order."""
        return [info for info, _, _ in self._tensors.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of one tensor."""
        return self._tensors[name][0]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the tensor's bytes as a read-only view of the file."""
        info, file, start = self._tensors[name]
        return file.bytes(start, info.nbytes)

    def release(self, name: str) -> None:
        """Let go of a tensor's memory; what is looked at again is read again."""
        info, file, start = self._tensors[name]
        file.release(start, info.nbytes)

    def array(self, name: str) -> Array:
        """Return a read-only view in the storage dtype: BF16 as uint16 bits, float8 as uint8 bits."""
        info = self.info(name)
        return self.raw(name).view(STORAGE[info.dtype]).reshape(info.shape)

    def float32(self, name: str) -> NDArray[np.float32]:
        """Return the tensor's numbers as a new fp32 array."""
        return to_float32(self.array(name), self.info(name).dtype)


class _File:
    """One mapped file: its checked header and views of its data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as handle:
                self._pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._data: Array = np.frombuffer(self._pages, np.uint8)
        self._start, header = _read_header(path, self._data)
        self.tensors = _checked_tensors(path, header, self._data.size - self._start)

    def bytes(self, start: int, size: int) -> NDArray[np.uint8]:
        begin = self._start + start
        return self._data[begin : begin + size]

    def release(self, start: int, size: int) -> None:
        if sys.platform == "linux" and size:
            begin = (self._start + start) // mmap.PAGESIZE * mmap.PAGESIZE
            self._pages.madvise(mmap.MADV_DONTNEED, begin, self._start + start + size - begin)


def _read_header(path: Path, data: Array) -> tuple[int, dict[str, Any]]:
    size = int.from_bytes(data[:8].tobytes(), "little")
    if data.size < 8 or size > min(data.size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is truncated or no safetensors file: {data.size} bytes, header of {size}"
        )
    try:
        header = json.loads(data[8 : 8 + size].tobytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    return 8 + size, header


def _checked_tensors(path: Path, header: Mapping[str, Any], size: int) -> list[tuple[TensorInfo, int]]:
    """Return (info, start) by offset; the ranges must cover the data without gap or overlap."""
    entries = sorted((_entry(path, name, raw) for name, raw in header.items()), key=lambda item: item[1:])
    position = 0
    for info, start, end in entries:
        if start != position:
            raise CheckpointError(f"{path}: tensor {info.name} starts at byte {start}, expected {position}")
        if end - start != info.nbytes:
            raise CheckpointError(
                f"{path}: tensor {info.name} of {info.dtype} {list(info.shape)} takes {info.nbytes} bytes,"
                f" the header gives it {end - start}"
            )
        position = end
    if position != size:
        raise CheckpointError(
            f"{path} is damaged: it holds {size} bytes of tensors, its header describes {position};"
            " download it again"
        )
    return [(info, start) for info, start, _ in entries]


def _entry(path: Path, name: str, raw: object) -> tuple[TensorInfo, int, int]:
    match raw:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            if dtype not in STORAGE:
                raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {dtype}")
            if all(type(n) is int and n >= 0 for n in shape) and 0 <= start <= end:
                return TensorInfo(name, dtype, tuple(shape)), start, end
    raise CheckpointError(f"{path}: the header entry of tensor {name} is malformed: {raw!r}")


def _open_files(path: Path) -> list[_File]:
    if path.is_file():
        return [_File(path)]
    if not path.is_dir():
        raise CheckpointError(f"{path} is no model folder: it does not exist")
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if index.is_file() and single.is_file():
        raise CheckpointError(
            f"{path} holds {SINGLE_FILE} and {INDEX_FILE}; delete the one that is out of date"
        )
    if single.is_file():
        return [_File(single)]
    if index.is_file():
        return _open_indexed(index)
    found = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pdparams", ".pt"))
    hint = f"; found {listed(found)}" if found else ""
    raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _open_indexed(index: Path) -> list[_File]:
    weight_map = _read_index(index)
    missing = sorted(shard for shard in set(weight_map.values()) if not (index.parent / shard).is_file())
    if missing:
        raise CheckpointError(
            f"{index} names shards that are not there: {listed(missing)}; download them again"
        )
    files = [_File(index.parent / shard) for shard in sorted(set(weight_map.values()))]
    stored = {info.name: file.path.name for file in files for info, _ in file.tensors}
    for name, shard in weight_map.items():
        if stored.get(name) != shard:
            raise CheckpointError(f"{index} places tensor {name} in {shard}, which does not hold it")
    extra = sorted(stored.keys() - weight_map.keys())
    if extra:
        raise CheckpointError(f"{index} does not list these tensors of its shards: {listed(extra)}")
    return files


def _read_index(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: {name} points to {shard!r}, which is no file name in that folder"
            )
    return weight_map


class Writer:
    """Writes tensors, announced beforehand and then given one by one in that order, into a model folder.

    Use as a context manager. Files appear under their final names only when everything is written and synced;
    any failure removes what was begun and, for a full disk and the like, raises CheckpointError.
    """

    def __init__(
        self, folder: str | Path, tensors: Sequence[TensorInfo], max_shard_bytes: int | None = None
    ) -> None:
        self.folder = Path(folder)
        shards = _split(tensors, max_shard_bytes or DEFAULT_SHARD_BYTES)
        self._made_folder = not self.folder.exists()
        present = sorted(p.name for p in self.folder.glob("model*.safetensors*"))
        if present:
            raise CheckpointError(
                f"{self.folder} already holds a model ({listed(present, 2)}); choose another folder"
            )
        self._files = [
            _OutFile(self.folder / _shard_name(i, len(shards)), shard) for i, shard in enumerate(shards)
        ]
        self._order = [(info, file) for file in self._files for info in file.infos]
        self._next = 0
        self._total = sum(info.nbytes for info in tensors)

    def __enter__(self) -> Writer:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be created ({error.strerror or error})") from error
        return self

    def add(self, name: str, data: Array) -> None:
        """Write the next tensor, given in its storage dtype or as raw bytes."""
        info, file = self._order[self._next]
        assert (name, data.nbytes) == (info.name, info.nbytes), (name, data.nbytes, info)
        self._next += 1
        with _FailureRemoves(self):
            file.write(name, data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort()
            return
        assert self._next == len(self._order), (
            f"{len(self._order) - self._next} announced tensors were not written"
        )
        with _FailureRemoves(self):
            for file in self._files:
                file.commit()
            if len(self._files) > 1:
                write_json(self.folder / INDEX_FILE, self._index())
            sync_folder(self.folder)

    def abort(self) -> None:
        """Remove everything this writer has made."""
        for file in self._files:
            file.remove()
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        if self._made_folder:
            with suppress(OSError):  # somebody else's file in there: the folder stays
                self.folder.rmdir()

    def _index(self) -> dict[str, Any]:
        weight_map = {info.name: file.path.name for info, file in self._order}
        return {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}


class _FailureRemoves:
    """Turns an OSError of the guarded writes into a CheckpointError after removing the unfinished files."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            self.writer.abort()
            raise CheckpointError(
                f"{self.writer.folder}: writing failed ({error.strerror or error}); nothing was left behind"
            ) from error


class _OutFile:
    """One file being written under a temporary name.

    Inside, tensors lie by falling item size, so that every one of them is aligned to its dtype.
    """

    def __init__(self, path: Path, infos: Sequence[TensorInfo], framework: str = "pt") -> None:
        self.path = path
        self.infos = infos
        self._part = path.with_name(f".{path.name}.part")
        header: dict[str, Any] = {"__metadata__": {"format": framework}}
        position = 0
        for info in sorted(infos, key=lambda item: -STORAGE[item.dtype].itemsize):
            offsets = [position, position + info.nbytes]
            header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
            position += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._starts = {i.name: len(self._head) + header[i.name]["data_offsets"][0] for i in infos}

    def write(self, name: str, data: Array) -> None:
        """Write one tensor at its place; the file appears with the first one."""
        if not self._part.exists():
            self._part.write_bytes(self._head)
        with open(self._part, "r+b") as handle:
            handle.seek(self._starts[name])
            handle.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def commit(self) -> None:
        """Sync the file and give it its final name."""
        if not self.infos:
            self._part.write_bytes(self._head)
        with open(self._part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(self._part, self.path)

    def remove(self) -> None:
        """Remove the file under either name."""
        self._part.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def write_file(path: str | Path, tensors: Mapping[str, tuple[str, Array]], framework: str = "pt") -> None:
    """Write name -> (dtype, stored array), marked for `framework`; an older file goes when all is written."""
    path = Path(path)
    infos = [TensorInfo(name, dtype, data.shape) for name, (dtype, data) in tensors.items()]
    file = _OutFile(path, infos, framework)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, (_, data) in tensors.items():
            file.write(name, data)
        file.commit()
    except OSError as error:
        path.with_name(f".{path.name}.part").unlink(missing_ok=True)
        raise CheckpointError(f"{path}: writing failed ({error.strerror or error})") from error


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, sync and rename it."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as handle:
        json.dump(content, handle, indent=2, ensure_ascii=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(tensors: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Fill shards in order; a tensor larger than `max_bytes` gets a shard of its own."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _shard_name(index: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
