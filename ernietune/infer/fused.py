"""Steps over a few tokens on a CPU outside of Paddle, for models whose weights are in a stored form.

A step takes some sixty small operations a layer; called one by one they cost as much as the int8 weights
take to read. So one token of each sequence, the end of a prompt whose beginning is cached and guesses to
check all go through C; where the processor has tiles, prompts of a few hundred tokens too. The layers' own
`forward` stays the truth, and the way for everything else: long prompts, pictures, adapters, fp32 weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from ernietune_kernels.cpu.decode import WIDEST_HEAD, Decode, Geometry, LayerWeights, MlpWeights
from ernietune_kernels.cpu.library import kernels
from ernietune_kernels.stored import StoredWeight
from numpy.typing import NDArray
from paddle import Tensor, nn

from ernietune.infer.cache import Span
from ernietune.models.decoder import CausalLM, DecoderLayer
from ernietune.models.layers import SwiGLU
from ernietune.models.moe import ExpertPool, MoE
from ernietune.models.packed import PackedExperts, PackedLinear

_FEW_ROWS = 32  # more are better off as large products, where the C has none
_MANY_ROWS = 512
_MOST_PAIRS = 1 << 18  # of many rows and the keys that they see: each pair is in a list
# The C reads the keys of a sequence for sixteen queries at a time, `cached_attention` for 64 of them. So many
# products of a query's numbers with keys take about as long as the calls of one layer.
_MOST_PRODUCTS = 1 << 24


class _Unsuited(Exception):
    """A layer is of a kind that the C code does not know, such as an adapter."""


class FusedDecoder:
    """The model's layers for one new token of each of some sequences of text."""

    def __init__(self, model: CausalLM, decode: Decode) -> None:
        self._model, self._decode = model, decode
        self._width = model.config.num_attention_heads * model.config.head_dim

    @classmethod
    def of(cls, model: object, cache: NDArray[np.float32] | None) -> FusedDecoder | None:
        """None when the model or its cache is of a kind that only Paddle can compute."""
        library = kernels() if cache is not None else None
        if library is None or cache is None or not isinstance(model, CausalLM):
            return None
        config = model.config
        if config.head_dim > WIDEST_HEAD:
            return None
        geometry = Geometry(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
        )
        try:
            layers = [_layer(layer) for layer in model.model.layers]
        except _Unsuited:
            return None
        return cls(model, Decode(library, geometry, layers, model.model.norm.weight, cache))

    def suits(self, spans: Sequence[Span]) -> bool:
        """Whether this is the faster way to read text tokens of so many sequences."""
        seen = [(span.stop - span.start, span.length) for span in spans]
        rows = sum(count for count, _ in seen)
        if rows <= _FEW_ROWS:
            again = sum(count * length for count, length in seen if count > 1)
            return again * self._width <= _MOST_PRODUCTS
        many = self._decode.library.takes_many_rows and rows <= _MANY_ROWS
        return many and sum(count * length for count, length in seen) <= _MOST_PAIRS

    def forward(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        spans: Sequence[Span],
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states [rows, H] of the text tokens of these spans, whose keys and values are kept.

        Of the wanted rows, which rise, alone, where they are given.
        """
        x = self._model.model.embed_tokens(paddle.to_tensor(ids)).contiguous()
        cos, sin = self._model.rotary(paddle.to_tensor(positions))
        slots = [slots for span in spans for slots in _seen(span)]
        self._decode.step(x, cos.contiguous(), sin.contiguous(), slots, wanted)
        return x if wanted is None else x[: len(wanted)]


def _seen(span: Span) -> list[NDArray[np.int64]]:
    """The slots that each new token sees, its own last; a layer stores all new keys before it reads any."""
    return [span.slots[:stop] for stop in range(span.first + 1, span.length + 1)]


def _layer(layer: DecoderLayer) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    projections = [
        _stored(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    ]
    if isinstance(mlp, SwiGLU):
        return LayerWeights(*norms, *projections, _mlp(mlp))
    if not isinstance(mlp, MoE):
        raise _Unsuited
    pool = mlp.text_experts
    shared = None if mlp.shared_experts is None else _mlp(mlp.shared_experts)
    router = pool.router
    return LayerWeights(
        *norms, *projections, shared, _mlp(pool), router.weight, router.correction_bias, router.chosen
    )


def _mlp(mlp: SwiGLU | ExpertPool) -> MlpWeights:
    return MlpWeights(_stored(mlp.gate_proj), _stored(mlp.up_proj), _stored(mlp.down_proj))


def _stored(layer: nn.Layer) -> StoredWeight:
    if not isinstance(layer, (PackedLinear, PackedExperts)) or not isinstance(layer.stored, StoredWeight):
        raise _Unsuited
    if isinstance(layer, PackedLinear) and layer.bias is not None:
        raise _Unsuited
    return layer.stored
