"""Activation recompute, put around the layers of a finished model."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.distributed.fleet.utils import recompute

from ernietune.models.decoder import CausalLM


def apply(model: CausalLM) -> None:
    """Keep only the input of each decoder layer and vision block; compute the rest again in the backward pass.

    Each layer's `forward` is replaced on the instance, so that parameter paths stay what they are.
    """
    blocks = model.vision_model.blocks if model.vision_model is not None else []
    for layer in [*model.model.layers, *blocks]:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: object) -> Tensor:
        if not paddle.is_grad_enabled():
            return forward(*inputs)
        return recompute(forward, *inputs)

    return run
