"""From a checkpoint folder to a model whose weights stay in a stored form: bf16, or codes made on the way."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from ernietune_kernels import fp8, nf4
from ernietune_kernels.frozen import Weight
from ernietune_kernels.quantized import QuantizedWeight
from ernietune_kernels.stored import quantize_into

from ernietune.checkpoint.dtypes import Array, to_float32
from ernietune.checkpoint.load import fill_from, read_part, stored_entries
from ernietune.checkpoint.names import Source, sources
from ernietune.checkpoint.safetensors import Reader
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM
from ernietune.models.forms import Form, Scheme
from ernietune.models.packed import Packed, PackedLinear, convert, packed_layers
from ernietune.parallel.degrees import Degrees, Holding

_EMBEDDING = "model.embed_tokens.weight"
_ALIGNMENT = 64
_BLOCK = 1 << 26
_STRIP = 1 << 23  # numbers of a matrix that are rounded at a time: fp32 copies of them are what it costs


def load_packed(
    folder: str | Path,
    scheme: Scheme,
    config: ModelConfig,
    dtype: str = "float32",
    build: Callable[[ModelConfig, str], CausalLM] = CausalLM,
    holding: Holding | None = None,
) -> tuple[CausalLM, list[str]]:
    """The model of a checkpoint folder, and notes on what `scheme` could not do; it computes in `dtype`.

    One tensor is copied or converted at a time; with a `holding`, `build` makes a process's part of the model
    and only that is read, as codes of the whole model's. CheckpointError lists all that does not fit.
    """
    reader, holding = Reader(folder), holding or Holding(Degrees())
    parts = sources(stored_entries(reader, config))
    model, notes = _skeleton(partial(build, config, dtype), scheme, holding.degrees)
    loading = _Loading(reader, holding, _Arena())
    fill_from(model.state_dict(), parts, reader, holding)
    for path, layer in packed_layers(model):
        if f"{path}.weight" in parts:
            layer.take(_read(layer, parts[f"{path}.weight"], loading))
    head = model.lm_head
    if config.tie_word_embeddings and isinstance(head, PackedLinear):
        embedding = model.model.embed_tokens
        head.take(embedding.weight if head.form.bits == 16 else _read(head, parts[_EMBEDDING], loading))
    return model, notes


def _skeleton(build: Callable[[], CausalLM], scheme: Scheme, degrees: Degrees) -> tuple[CausalLM, list[str]]:
    """The model with layers to be filled. Made in host memory, where weights that are never touched cost
    nothing, and moved without those that became packed.
    """
    device = paddle.get_device()
    paddle.set_device("cpu")
    try:
        model = build()
        notes = convert(model, scheme, degrees.whole_shape)
    finally:
        paddle.set_device(device)
    if device != "cpu":
        model.to(device)
    return model, notes


def stored_dtype(folder: str | Path, config: ModelConfig) -> str:
    """The safetensors dtype of the checkpoint's token embedding, which stands for all weights."""
    reader = Reader(folder)
    entry, _ = sources(stored_entries(reader, config))[_EMBEDDING][0]
    return reader.info(entry.name).dtype


class _Arena:
    """Memory for weights in huge pages: with small ones, finding a page's place costs a product a third."""

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """An array that nobody else has; its block of memory lives as long as one of its arrays."""
        count = math.prod(shape)
        size = -(-count * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._block is None or self._used + size > len(self._block):
            self._block, self._used = _pages(max(size, _BLOCK)), 0
        array = np.frombuffer(self._block, dtype, count, self._used).reshape(shape)
        self._used += size
        return array


def _pages(size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones are never huge
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@dataclass(frozen=True)
class _Matrix:
    """A matrix [out, in] on disk, its place in a stack, and how this process's part is cut out of it."""

    place: int | None
    whole: Array
    dtype: str
    cut: Callable[[Array], Array]

    @property
    def part(self) -> Array:
        """What this process holds of it."""
        return self.cut(self.whole)


@dataclass(frozen=True)
class _Loading:
    """Where weights are read from, how much of each, and the memory that they are put in."""

    reader: Reader
    holding: Holding
    arena: _Arena

    def matrices(self, parts: list[Source], shape: tuple[int, ...]) -> Iterator[_Matrix]:
        """The matrices of a weight, or of a stack, of which this process holds something."""
        for entry, target in parts:
            index = target.index
            place = None if index is None else self.holding.place(target.param, index, shape[0])
            if index is not None and place is None:
                continue
            whole = target.region(self.reader.array(entry.name))
            cut = partial(self.holding.cut_matrix, target.param)
            yield _Matrix(place, whole, self.reader.info(entry.name).dtype, cut)
            self.reader.release(entry.name)


def _read(layer: Packed, parts: list[Source], loading: _Loading) -> Any:
    if layer.form.bits != 16:
        return _coded(layer.shape, layer.form, parts, loading)
    buffer = loading.arena.take(layer.shape, np.uint16)
    for part in parts:
        read_part(buffer, part, loading.reader, "BF16", loading.holding)
    return _tensor(buffer)


def _tensor(array: Array) -> Any:
    """A Paddle tensor over an array, or a copy of it on the GPU; uint16 are the bits of bfloat16."""
    shared = _shared(array)
    return shared if paddle.get_device() == "cpu" else shared.cuda()


def _shared(array: Array) -> Any:
    """A tensor over an array in host memory; it keeps it alive."""
    return paddle.Tensor(
        value=array, place=paddle.CPUPlace(), persistable=False, zero_copy=True, name="", stop_gradient=True
    )


def _coded(shape: tuple[int, ...], form: Form, parts: list[Source], loading: _Loading) -> Weight:
    """Round part by part: each is a whole matrix, of a stack or alone."""
    if form.kind == "nf4":
        return _nf4(shape, form, parts, loading)
    if form.kind == "fp8":
        return _fp8(shape, parts, loading)
    return _quantized(shape, form, parts, loading)


def _nf4(shape: tuple[int, ...], form: Form, parts: list[Source], loading: _Loading) -> nf4.Nf4Weight:
    *front, width = shape
    codes = loading.arena.take((*front, width // 2), np.uint8)
    scale = loading.arena.take((*front, width // form.group), np.float32)
    for found in loading.matrices(parts, shape):
        where = ... if found.place is None else found.place
        for first, rows in _strips(found):
            strip = slice(first, first + len(rows))
            codes[where][strip], scale[where][strip] = nf4.codes_of(rows, form.group)
    return nf4.Nf4Weight(_tensor(codes), _tensor(scale), form.group, shape)


def _fp8(shape: tuple[int, ...], parts: list[Source], loading: _Loading) -> fp8.Fp8Weight:
    matrices = {}
    for found in loading.matrices(parts, shape):
        strips = [
            fp8.quantize_blocks(paddle.to_tensor(rows[None], place=paddle.CPUPlace()))
            for _, rows in _strips(found)
        ]
        codes, scale = (paddle.concat(pieces, 1) for pieces in zip(*map(_both, strips), strict=True))
        on_cpu = paddle.get_device() == "cpu"
        stack = fp8.Fp8Stack(codes, scale) if on_cpu else fp8.Fp8Stack(codes.cuda(), scale.cuda())
        matrices[found.place or 0] = stack
    return fp8.Fp8Weight(tuple(matrices[index] for index in sorted(matrices)), shape)


def _both(stack: fp8.Fp8Stack) -> tuple[Any, Any]:
    return stack.codes, stack.scale


def _strips(found: _Matrix) -> Iterator[tuple[int, Array]]:
    """(first row, rows in fp32) of this process's part, whole FP8 blocks of rows at a time."""
    stored = found.part
    step = max(fp8.BLOCK, _STRIP // stored.shape[1] // fp8.BLOCK * fp8.BLOCK)
    for first in range(0, stored.shape[0], step):
        yield first, np.ascontiguousarray(to_float32(stored[first : first + step], found.dtype))


def _quantized(shape: tuple[int, ...], form: Form, parts: list[Source], loading: _Loading) -> QuantizedWeight:
    """int8 or int4 codes."""
    *front, width = shape
    group = form.group if form.bits == 4 else width
    scales = (*front, width // group) if form.bits == 4 else tuple(front)
    codes = loading.arena.take((*front, width * form.bits // 8), np.int8 if form.bits == 8 else np.uint8)
    scale = loading.arena.take(scales, np.float32)
    host = QuantizedWeight(_shared(codes), _shared(scale), form.bits, group, shape)
    for found in loading.matrices(parts, shape):
        if form.bits == 8 and found.part.shape[1] < found.whole.shape[1]:
            where = ... if found.place is None else found.place
            codes[where], scale[where] = _of_whole_rows(found)
        else:
            quantize_into(host, found.place, _readable(found.part, found.dtype))
    return QuantizedWeight(_tensor(codes), _tensor(scale), form.bits, group, shape)


def _of_whole_rows(found: _Matrix) -> tuple[Array, Array]:
    """int8 codes of some columns, and the scales, which are those of whole rows."""
    outputs, width = found.whole.shape
    codes, scale = np.empty((outputs, width), np.int8), np.empty(outputs, np.float32)
    whole = QuantizedWeight(_shared(codes), _shared(scale), 8, width, (outputs, width))
    quantize_into(whole, None, _readable(found.whole, found.dtype))
    return found.cut(codes), scale


def _readable(stored: Array, dtype: str) -> Array:
    """What the codes are made from: bf16 bits or fp32."""
    return stored if dtype in ("BF16", "F32") else to_float32(stored, dtype)
