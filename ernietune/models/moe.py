"""The mixture of experts: one pool per modality, shared experts for all tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import paddle
from ernietune_kernels import (
    ExpertFactors,
    available_for_products,
    permute,
    placed_experts,
    route,
    routed_experts,
    swiglu,
    unpermute,
)
from paddle import Tensor, nn

from ernietune.models.config import ExpertPoolConfig, ModelConfig
from ernietune.models.layers import ExpertLinear, SwiGLU, parameter


@dataclass(frozen=True)
class ModalitySplit:
    """Which tokens go to which pool, worked out once per batch.

    `text` and `vision` are int64 indices into T; `restore` puts [text rows | vision rows] back in token
    order.
    """

    text: Tensor
    vision: Tensor
    restore: Tensor

    @staticmethod
    def of(is_vision_T: Tensor) -> ModalitySplit | None:
        """None when all tokens are text: then nothing has to be gathered."""
        vision = paddle.nonzero(is_vision_T).reshape([-1])
        if vision.shape[0] == 0:
            return None
        text = paddle.nonzero(paddle.logical_not(is_vision_T)).reshape([-1])
        return ModalitySplit(text, vision, paddle.argsort(paddle.concat([text, vision])))


class Router(nn.Layer):
    """Softmax router in fp32; the correction bias decides which experts are selected, never their weights."""

    def __init__(self, width: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.weight = parameter([experts, width], "float32")
        self.register_buffer("correction_bias", paddle.zeros([experts], "float32"))
        # Given (logits [N, E], weights [N, k], experts [N, k]), it returns the weights to go on with.
        self.observer: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(weights [N, k] that sum to one, experts [N, k])."""
        logits = paddle.matmul(x_ND.astype("float32"), self.weight, transpose_y=True)
        weights, experts = route(logits, self.correction_bias, self.chosen)
        if self.observer is not None:
            weights = self.observer(logits, weights, experts)
        return weights, experts


class ExpertPool(nn.Layer):
    """The routed experts of one modality."""

    def __init__(self, width: int, pool: ExpertPoolConfig, chosen: int, dtype: str) -> None:
        super().__init__()
        self.count = pool.count
        self.router = Router(width, pool.count, chosen)
        self.gate_proj = ExpertLinear(pool.count, width, pool.intermediate_size, dtype)
        self.up_proj = ExpertLinear(pool.count, width, pool.intermediate_size, dtype)
        self.down_proj = ExpertLinear(pool.count, pool.intermediate_size, width, dtype)
        self.activation: Callable[[Tensor, Tensor], Tensor] = swiglu

    def forward(self, x_ND: Tensor) -> Tensor:
        """Each row through its k experts, added by routing weight; drop-free."""
        weights, experts = self.router(x_ND)
        fused = self._fused(x_ND)
        if fused:
            # Whoever has put another activation here wants its output formed again.
            return routed_experts(x_ND, weights, experts, *fused, self.activation is swiglu)
        rows, plan = permute(x_ND, experts, self.count)
        return unpermute(self.products(rows, plan.counts), weights, plan)

    def products(self, rows: Tensor, counts: list[int], order: Tensor | None = None) -> Tensor:
        """Rows [N, D] through one expert each, counts[e] of them through expert e, in the order they came in.

        `order` int64 [N] lists them by expert; None: they stand so.
        """
        fused = self._fused(rows)
        if fused:
            return placed_experts(rows, counts, order, *fused, self.activation is swiglu)
        placed = rows if order is None else paddle.gather(rows, order)
        inner = self.activation(self.gate_proj(placed, counts), self.up_proj(placed, counts))
        done = self.down_proj(inner, counts)
        return done if order is None else paddle.gather(done, paddle.argsort(order))

    def _fused(self, x_ND: Tensor) -> list[ExpertFactors]:
        """The three projections for one fused operation where the device has it, else nothing."""
        if not available_for_products(x_ND):
            return []
        found = [layer.factors() for layer in (self.gate_proj, self.up_proj, self.down_proj)]
        whole = [factors for factors in found if factors is not None]
        # Gate and up are one product: both have an adapter, or neither.
        alike = len(whole) == len(found) and (whole[0].a is None) == (whole[1].a is None)
        return whole if alike else []


class MoE(nn.Layer):
    """Routed experts by modality plus the shared experts (one unscaled MLP for every token)."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        super().__init__()
        pools = [ExpertPool(config.hidden_size, pool, config.moe_k, dtype) for pool in config.pools]
        self.text_experts = pools[0]
        self.vision_experts = pools[1] if len(pools) > 1 else None
        inner = config.shared_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, inner, dtype) if inner else None

    def forward(self, x_TD: Tensor, split: ModalitySplit | None) -> Tensor:
        routed = self._routed(x_TD, split)
        return routed if self.shared_experts is None else routed + self.shared_experts(x_TD)

    def _routed(self, x_TD: Tensor, split: ModalitySplit | None) -> Tensor:
        if split is None or self.vision_experts is None:
            return self.text_experts(x_TD)
        vision = self.vision_experts(paddle.gather(x_TD, split.vision))
        if split.text.shape[0] == 0:
            return vision
        text = self.text_experts(paddle.gather(x_TD, split.text))
        return paddle.gather(paddle.concat([text, vision]), split.restore)
