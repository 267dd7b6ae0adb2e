"""Activation recompute, put around the layers of a finished model."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.utils import recompute

from ernietune.models.decoder import CausalLM


def apply(model: CausalLM) -> None:
    """Keep only the input of each decoder layer and vision block; the backward pass computes the rest again.

    Each layer's `forward` is replaced on the instance, so that parameter paths stay what they are.
    """
    blocks = model.vision_model.blocks if model.vision_model is not None else []
    for layer in [*model.model.layers, *blocks]:
        layer.forward = _recomputed(layer, layer.forward)


def _recomputed(layer: nn.Layer, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *others: object) -> Tensor:
        if not paddle.is_grad_enabled():
            return forward(x, *others)
        if x.stop_gradient:
            if all(parameter.stop_gradient for parameter in layer.parameters()):
                return forward(x, *others)
            # Paddle gives a recomputed block's parameters no gradient unless an input asks for one.
            x = x.detach()
            x.stop_gradient = False
        return recompute(forward, x, *others)

    return run
