"""Causal grouped-query attention with rotary positions."""

from __future__ import annotations

from typing import Protocol

from ernietune_kernels import AttentionPlan, apply_rope, attention, causal_plan
from paddle import Tensor, nn

from ernietune.models.config import ModelConfig
from ernietune.models.layers import Linear


class Cache(Protocol):
    """Keys (after RoPE) and values of what has been read so far."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [T, KV, d] of one layer; return all [S, KV, d] of it, the new ones last."""
        ...


class Attention(nn.Layer):
    """q/k/v/o projections without bias; key/value head i serves the query heads i*g .. i*g+g-1."""

    def __init__(self, config: ModelConfig, index: int, dtype: str) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.index = config.num_attention_heads, config.num_key_value_heads, index
        self.q_proj = Linear(width, self.heads * self.head_dim, dtype)
        self.k_proj = Linear(width, self.kv_heads * self.head_dim, dtype)
        self.v_proj = Linear(width, self.kv_heads * self.head_dim, dtype)
        self.o_proj = Linear(self.heads * self.head_dim, width, dtype)

    def forward(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan | None, cache: Cache | None
    ) -> Tensor:
        """`plan` says who sees whom; with a cache, every new token sees all earlier ones."""
        q = self.q_proj(x_TD).reshape([-1, self.heads, self.head_dim])
        k = self.k_proj(x_TD).reshape([-1, self.kv_heads, self.head_dim])
        v = self.v_proj(x_TD).reshape([-1, self.kv_heads, self.head_dim])
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        if plan is None:
            plan = causal_plan(q.shape[0], k.shape[0])
        return self.o_proj(attention(q, k, v, plan).reshape([-1, self.heads * self.head_dim]))
