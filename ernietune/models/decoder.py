"""The ERNIE-4.5 causal language model: dense, text MoE and vision-language MoE, by configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import paddle
from ernietune_kernels import AttentionPlan, causal_plan, linear_cross_entropy
from paddle import Tensor, nn

from ernietune.models.attention import Attention, Cache
from ernietune.models.config import ModelConfig
from ernietune.models.layers import Embedding, Linear, RMSNorm, Rotary, SwiGLU
from ernietune.models.moe import ModalitySplit, MoE
from ernietune.models.vision import Grid, Resampler, VisionTower


@dataclass(frozen=True)
class Inputs:
    """One forward: the T tokens of all rows, one after the other, without padding.

    ids int64 [T]; positions int64 [T, 3] as (t, h, w); visible_until int64 [T], the first position that may
    not see key j (None: all T tokens are one document); is_vision bool [T], required by vision-language
    models; patches float [P, 588] normalised, and one grid (frames, rows, columns) per picture, in the order
    of their tokens. Instead of patches and grids, features [F, H] that `picture_features` gave, for the
    tokens at feature_rows [F]. wanted_rows int64 [N], the tokens whose hidden states are asked for (None:
    all of them).
    """

    ids: Tensor
    positions: Tensor
    visible_until: Tensor | None = None
    is_vision: Tensor | None = None
    patches: Tensor | None = None
    grids: tuple[Grid, ...] = ()
    features: Tensor | None = None
    feature_rows: Tensor | None = None
    wanted_rows: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """Rows [N] of the T tokens, with their modalities, whose hidden states alone are asked for."""

    rows: Tensor
    split: ModalitySplit | None


@dataclass(frozen=True)
class Shared:
    """What all layers of one forward read: angles, visibility, and the tokens of each modality."""

    cos: Tensor
    sin: Tensor
    plan: AttentionPlan | None
    split: ModalitySplit | None
    wanted: Wanted | None = None


class DecoderLayer(nn.Layer):
    """h = x + attention(norm(x)); y = h + mlp(norm(h))."""

    def __init__(self, config: ModelConfig, index: int, dtype: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, index, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.is_moe = config.is_moe_layer(index)
        inner = config.intermediate_size
        self.mlp = MoE(config, dtype) if self.is_moe else SwiGLU(config.hidden_size, inner, dtype)

    def forward(
        self, x: Tensor, shared: Shared, cache: Cache | None = None, wanted: Wanted | None = None
    ) -> Tensor:
        """x [T, H] -> [T, H], or of the wanted rows alone: behind its attention a row needs no other."""
        x = x + self.self_attn(self.input_layernorm(x), shared.cos, shared.sin, shared.plan, cache)
        split = shared.split
        if wanted is not None:
            x, split = paddle.gather(x, wanted.rows), wanted.split
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, split) if self.is_moe else self.mlp(normed))


class Decoder(nn.Layer):
    """Embedding, layers and final norm; the resampler lives here because checkpoints name it so."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.LayerList([DecoderLayer(config, i, dtype) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.resampler_model = Resampler(config, config.vision, dtype) if config.vision else None

    def forward(self, x: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        if shared.wanted is None:
            for layer in self.layers:
                x = layer(x, shared, cache)
            return self.norm(x)
        for layer in self.layers[:-1]:
            x = layer(x, shared, cache)
        return self.norm(self.layers[-1](x, shared, cache, shared.wanted))


class CausalLM(nn.Layer):
    """Tokens (and pictures) in, hidden states out; `logits` or the cross-entropy kernel go on from there."""

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        """Create uninitialised, frozen parameters; `dtype` is theirs and the computation's; routers fp32."""
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Decoder(config, dtype)
        self.vision_model = VisionTower(config.vision, dtype) if config.vision else None
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, dtype)
        self.rotary = Rotary(
            config.head_dim, config.rope_theta, config.freq_allocation if config.vision else 0
        )
        # (hidden [N, H], head_weight, labels [N], rows at a time) -> the labels' losses [N].
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor, int | None], Tensor] = linear_cross_entropy

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, H]: the embedding when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, inputs: Inputs, cache: Cache | None = None) -> Tensor:
        """Hidden states [T, H] after the final norm, or [N, H] of the wanted rows."""
        return self.model(self.embed(inputs), self.shared(inputs, cache), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] in fp32."""
        if self.lm_head is not None:
            return self.lm_head(hidden).astype("float32")
        return paddle.matmul(hidden, self.head_weight, transpose_y=True).astype("float32")

    def embed(self, inputs: Inputs) -> Tensor:
        """Token embeddings [T, H] with the picture features in the place of their placeholders."""
        hidden = self.model.embed_tokens(inputs.ids)
        if inputs.features is not None:
            return paddle.scatter(hidden, inputs.feature_rows, inputs.features)
        if inputs.patches is None or not inputs.grids:
            return hidden
        places = paddle.nonzero(inputs.ids == self.config.image_token_id).reshape([-1])
        features = self.picture_features(inputs.patches, list(inputs.grids))
        assert places.shape[0] == features.shape[0], (places.shape, features.shape)
        return paddle.scatter(hidden, places, features)

    def picture_features(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """[P, 588] -> one embedding per image token."""
        tower, resampler = self.vision_model, self.model.resampler_model
        assert tower is not None, "a text model was given pictures"
        assert resampler is not None
        return resampler(tower(patches.astype(self.dtype), grids), grids)

    def shared(self, inputs: Inputs, cache: Cache | None = None) -> Shared:
        """What the layers share; ValueError without routing ids, which would silently route all as text."""
        if self.config.is_vl and inputs.is_vision is None:
            raise ValueError("a vision-language model needs is_vision for every token")
        cos, sin = self.rotary(inputs.positions)
        tokens = inputs.ids.shape[0]
        plan = causal_plan(tokens, tokens, inputs.visible_until) if cache is None else None
        split = ModalitySplit.of(inputs.is_vision) if self.config.is_vl else None
        return Shared(cos, sin, plan, split, self._wanted(inputs))

    def _wanted(self, inputs: Inputs) -> Wanted | None:
        rows = inputs.wanted_rows
        if rows is None:
            return None
        is_vision = None if inputs.is_vision is None else paddle.gather(inputs.is_vision, rows)
        return Wanted(rows, ModalitySplit.of(is_vision) if self.config.is_vl else None)
