"""Whole decode steps in C: sequences that each have one new token go through all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
from paddle import Tensor

from ernietune_kernels.cpu.library import Library, Matrix
from ernietune_kernels.stored import StoredWeight

WIDEST_HEAD = 256


@dataclass(frozen=True)
class MlpWeights:
    """gate, up and down of a dense MLP or of the shared experts [out, in]; stacks for routed experts."""

    gate: StoredWeight
    up: StoredWeight
    down: StoredWeight


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: norms fp32 [hidden]; router [E, hidden] and bias [E] fp32, None in a dense one."""

    input_norm: Tensor
    middle_norm: Tensor
    q: StoredWeight
    k: StoredWeight
    v: StoredWeight
    o: StoredWeight
    mlp: MlpWeights | None
    experts: MlpWeights | None = None
    router: Tensor | None = None
    bias: Tensor | None = None
    chosen: int = 0


@dataclass(frozen=True)
class Geometry:
    """Heads and widths of the decoder, and the epsilon of its norms."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float


class _Layer(Structure):
    """`Layer` of decode.h."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("middle_norm", c_void_p),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("router", c_void_p),
        ("bias", c_void_p),
        *((name, Matrix) for name in ("expert_gate", "expert_up", "expert_down")),
        ("experts", c_int64),
        ("chosen", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class _Decoder(Structure):
    """`Decoder` of decode.h."""

    _fields_ = [
        ("layers", POINTER(_Layer)),
        ("norm", c_void_p),
        *((name, c_int64) for name in ("count", "hidden", "heads", "kv_heads", "head_dim", "slots")),
        ("epsilon", c_float),
    ]


class _Step(Structure):
    """`Step` of decode.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "cos", "sin", "seen", "starts", "wanted")),
        ("rows", c_int64),
        ("wanted_rows", c_int64),
    ]


class Decode:
    """The layers of one model over one cache, as the C code sees them; keeps what they point to."""

    def __init__(
        self,
        library: Library,
        geometry: Geometry,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        cache: np.ndarray,
    ) -> None:
        """`cache` is fp32 [layers, 2, kv_heads, slots, head_dim]: keys, then values."""
        assert cache.flags.c_contiguous, "the cache has to be one block"
        assert geometry.head_dim <= WIDEST_HEAD, geometry
        self.library, self._kept = library, (tuple(layers), norm, cache)
        structures = (_Layer * len(layers))(
            *(_layer(layer, kv) for layer, kv in zip(layers, cache, strict=True))
        )
        self._decoder = _Decoder(
            structures,
            norm.data_ptr(),
            len(layers),
            geometry.hidden,
            geometry.heads,
            geometry.kv_heads,
            geometry.head_dim,
            cache.shape[3],
            geometry.epsilon,
        )

    def step(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Sequence[np.ndarray],
        wanted: Sequence[int] | None = None,
    ) -> None:
        """Replace the embeddings x fp32 [rows, hidden] by the hidden states after the final norm.

        cos, sin fp32 [rows, head_dim / 2]; slots: where each row's tokens are, the new one, which is stored
        now, last. The hidden states of wanted rows, in rising order, come first; those behind them mean
        nothing then. MemoryError when there is none for the activations.
        """
        seen = np.concatenate(slots).astype(np.int64, copy=False)
        starts = np.cumsum([0, *(len(s) for s in slots)], dtype=np.int64)
        rows = np.array(wanted or (), np.int64)
        assert (np.diff(rows) > 0).all(), wanted
        step = _Step(
            *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), seen.ctypes.data, starts.ctypes.data),
            *(rows.ctypes.data if rows.size else None, len(slots), rows.size),
        )
        if self.library.c.ernie_decode(byref(self._decoder), byref(step)):
            raise MemoryError("no memory for the activations of one step")


def _layer(layer: LayerWeights, cache: np.ndarray) -> _Layer:
    made = _Layer(
        input_norm=layer.input_norm.data_ptr(),
        middle_norm=layer.middle_norm.data_ptr(),
        q=layer.q.matrix,
        k=layer.k.matrix,
        v=layer.v.matrix,
        o=layer.o.matrix,
        keys=cache[0].ctypes.data,
        values=cache[1].ctypes.data,
    )
    if layer.mlp is not None:
        made.gate, made.up, made.down = (w.matrix for w in (layer.mlp.gate, layer.mlp.up, layer.mlp.down))
    if layer.experts is not None:
        experts = layer.experts
        made.expert_gate, made.expert_up = experts.gate.matrix, experts.up.matrix
        made.expert_down = experts.down.matrix
    if layer.router is not None and layer.bias is not None:
        made.router, made.bias = layer.router.data_ptr(), layer.bias.data_ptr()
        made.experts, made.chosen = layer.router.shape[0], layer.chosen
    return made
