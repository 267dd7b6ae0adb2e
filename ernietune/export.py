"""Merging an adapter into its base model: W + scale * B A, in the base's own names, layout and dtypes.

The base is streamed tensor by tensor; what the adapter does not touch is copied byte for byte. The result is
read back and compared before it appears under its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ernietune import hub
from ernietune.checkpoint.adapter import CONFIG_FILE, Float, read_adapter, read_adapter_config
from ernietune.checkpoint.adapter_config import refuse_paddle_adapter
from ernietune.checkpoint.dtypes import Array, from_float32, to_float32
from ernietune.checkpoint.folder import copy_side_files, staged
from ernietune.checkpoint.load import stored_entries
from ernietune.checkpoint.names import DiskTensor, Target
from ernietune.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, Reader, Writer
from ernietune.checkpoint.state import STATE, checkpoint_in
from ernietune.errors import CheckpointError
from ernietune.models.config import ModelConfig

# Half a rounding step relative to the number, by the dtype a merged tensor is stored in.
_HALF_STEP = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
# What fp32 sums of a low-rank product may lose, relative to the largest number that went in.
_FP32_SLACK = 2.0**-19
_BLOCK_ROWS = 128  # a block and its temporaries stay in the cache
_COMPARED_BYTES = 1 << 24


@dataclass(frozen=True)
class ExportReport:
    """What an export has written and how far any merged number is from the exact sum."""

    output: Path
    changed: int
    copied: int
    nbytes: int
    max_error: float

    def __str__(self) -> str:
        merged = f"{self.changed} tensors merged (largest rounding error {self.max_error:.3g}), "
        size = f"{self.nbytes / 1e9:.2f} GB"
        return f"{merged}{self.copied} copied unchanged, {size} in {self.output}; read back and compared"


def export(
    adapter_or_run: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    max_shard_bytes: int | None = None,
) -> ExportReport:
    """Write the finished model of a run, checkpoint or adapter folder as a new model folder.

    An adapter is merged into its base (`base` overrides the path it was trained from); a full fine-tune is
    copied and checked. CheckpointError for a missing base, an adapter that does not fit it, an output folder
    that is not empty, a full disk, or a result that does not read back as computed.
    """
    folder = checkpoint_in(Path(adapter_or_run))
    refuse_paddle_adapter(folder)
    if (folder / CONFIG_FILE).is_file():
        return _merge(folder, Path(output), base, max_shard_bytes)
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{folder} holds neither {CONFIG_FILE} nor model weights; name a run or adapter folder"
        )
    if base is not None:
        raise CheckpointError(
            f"{folder} holds a whole model, not an adapter: there is no base to merge it into"
        )
    reader = Reader(folder)
    entries = stored_entries(reader, ModelConfig.from_folder(folder))
    return _write(_Merge(reader, entries, {}, 0.0), Path(output), max_shard_bytes)


def _merge(folder: Path, output: Path, base: str | Path | None, max_shard_bytes: int | None) -> ExportReport:
    _, trained_from = read_adapter_config(folder)
    if base is None and not trained_from:
        raise CheckpointError(f"{folder / CONFIG_FILE} names no base model; give it explicitly")
    try:
        base_folder = hub.resolve(str(base or trained_from))
    except CheckpointError as error:
        raise CheckpointError(f"the base model is not there: {error}; say where it is now") from error
    config, reader = ModelConfig.from_folder(base_folder), Reader(base_folder)
    entries = stored_entries(reader, config)
    adapter = read_adapter(config, folder)
    merge = _Merge(reader, entries, adapter.factors, adapter.spec.scale)
    return _write(merge, output, max_shard_bytes)


Change = tuple[Target, Float, Float]


@dataclass(frozen=True)
class _Merge:
    """The base tensors and, by layer and expert, the factors that are added to them."""

    reader: Reader
    entries: list[DiskTensor]
    factors: dict[tuple[str, int | None], tuple[Float, Float]]
    scale: float

    def changes(self, entry: DiskTensor) -> list[Change]:
        """The regions of a disk tensor that change, with A and B."""
        keys = [(target, (target.param.removesuffix(".weight"), target.index)) for target in entry.targets]
        return [(target, *self.factors[key]) for target, key in keys if key in self.factors]

    def tensor(self, entry: DiskTensor) -> Array:
        """The tensor as it will be stored: raw bytes when untouched, the rounded sum otherwise."""
        changes = self.changes(entry)
        if not changes:
            return self.reader.raw(entry.name)
        dtype = self.reader.info(entry.name).dtype
        if dtype not in _HALF_STEP:
            raise CheckpointError(
                f"{self.reader.path}: {entry.name} is stored as {dtype}; cannot merge into that"
            )
        numbers = self.reader.float32(entry.name)
        for target, a, b in changes:
            region = target.region(numbers)
            region += np.float32(self.scale) * (b @ a)
        if not np.isfinite(numbers).all():
            raise CheckpointError(
                f"{entry.name} is not finite after the merge; the adapter or the base holds NaN"
            )
        return from_float32(numbers, dtype)


def _write(merge: _Merge, output: Path, max_shard_bytes: int | None) -> ExportReport:
    infos = merge.reader.infos
    with staged(output) as part:
        copy_side_files(merge.reader.path, part, without=(STATE,))
        with Writer(part, infos, max_shard_bytes) as writer:
            for entry in merge.entries:
                writer.add(entry.name, merge.tensor(entry))
        error = _verify(merge, Reader(part))
    changed = sum(bool(merge.changes(entry)) for entry in merge.entries)
    total = sum(info.nbytes for info in infos)
    return ExportReport(output, changed, len(infos) - changed, total, error)


def _verify(merge: _Merge, written: Reader) -> float:
    """Compare what is on disk now with the base and the exact sums; return the largest deviation."""
    base = {info.name: info for info in merge.reader.infos}
    if base != {info.name: info for info in written.infos}:
        raise CheckpointError(f"{written.path}: names, dtypes or shapes read back differ from the base model")
    largest = 0.0
    for entry in merge.entries:
        changes = merge.changes(entry)
        if not changes:
            _require_equal(merge.reader.raw(entry.name), written.raw(entry.name), entry.name)
            continue
        before, after = merge.reader.array(entry.name), written.array(entry.name)
        _require_equal_elsewhere(entry, changes, before, after)
        for change in changes:
            largest = max(
                largest, _compare(entry.name, base[entry.name].dtype, change, merge.scale, before, after)
            )
    return largest


def _require_equal(before: Array, after: Array, name: str) -> None:
    for start in range(0, before.size, _COMPARED_BYTES):
        if not np.array_equal(
            before[start : start + _COMPARED_BYTES], after[start : start + _COMPARED_BYTES]
        ):
            raise CheckpointError(
                f"{name} read back differs from the base, although the adapter does not touch it"
            )


def _require_equal_elsewhere(entry: DiskTensor, changes: list[Change], before: Array, after: Array) -> None:
    """A fused tensor may change in one part only; its other parts must be the base's."""
    touched = [target for target, _, _ in changes]
    for target in entry.targets:
        if target not in touched and not np.array_equal(target.region(before), target.region(after)):
            raise CheckpointError(
                f"{entry.name}: {target.param} read back differs, although nothing touches it"
            )


def _compare(name: str, dtype: str, change: Change, scale: float, before: Array, after: Array) -> float:
    """Check one region against W + scale * B A, within the rounding of its dtype; return the largest error.

    The product is formed anew in fp64; the rest in fp32, whose own rounding is the slack.
    """
    target, a, b = change
    exact_a, exact_b = scale * a.astype(np.float64), b.astype(np.float64)
    largest = 0.0
    for base, found, rows in _row_blocks(target.region(before), target.region(after), dtype):
        delta = (exact_b[rows] @ exact_a).astype(np.float32)
        slack = _FP32_SLACK * (np.abs(base).max() + np.abs(delta).max())
        exact = np.add(base, delta, out=delta)
        error = np.abs(np.subtract(found, exact, out=found), out=found)
        allowed = np.abs(exact, out=exact) * np.float32(_HALF_STEP[dtype]) + slack
        if not (error <= allowed).all():
            raise CheckpointError(
                f"{name} read back is off by up to {error.max():.3g}; the export was not kept"
            )
        largest = max(largest, float(error.max()))
    return largest


def _row_blocks(
    before: Array, after: Array, dtype: str
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], slice]]:
    for start in range(0, before.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        yield to_float32(before[rows], dtype), to_float32(after[rows], dtype), rows
