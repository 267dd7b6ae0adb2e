"""Activation recompute, put around the layers of a finished model, or around parts of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.utils import recompute

from ernietune.errors import ConfigError
from ernietune.memory_modes import Recompute
from ernietune.models.decoder import CausalLM, DecoderLayer
from ernietune.models.layers import SwiGLU
from ernietune.models.moe import ExpertPool, MoE
from ernietune.parallel.saved import SavedTensors
from ernietune.parallel.sequence import Gathering

Forward = Callable[..., Tensor]
WHOLE = Recompute(1)


def apply(model: CausalLM, mode: Recompute = WHOLE, offload: bool = False) -> None:
    """Make the graph of `model` keep less; the backward pass computes or fetches the rest.

    `mode` says what is computed again; with `offload` what is still kept waits on the host. Each `forward` is
    replaced on its instance, so that parameter paths stay what they are. ConfigError when the model has
    nothing of a part that `mode` names.
    """
    blocks = blocks_of(model)
    if "moe" in mode.parts and not any(isinstance(block.mlp, MoE) for _, block in blocks):
        raise ConfigError("train.recompute: names moe, but this model has no experts; leave it out")
    for index, block in blocks:
        saved = SavedTensors(block, offload)
        if mode.whole(index):
            block.forward = _recomputed(block, block.forward)
        elif mode.parts:
            _recompute_parts(block, mode.parts, saved)
        if offload or {"norm", "activation"} & set(mode.parts):
            block.forward = saved.around(block.forward)


def blocks_of(model: CausalLM) -> list[tuple[int, Any]]:
    """(index, layer) of all decoder layers, then of all vision blocks."""
    vision = model.vision_model.blocks if model.vision_model is not None else []
    return [*enumerate(model.model.layers), *enumerate(vision)]


def _recompute_parts(block: Any, parts: tuple[str, ...], saved: SavedTensors) -> None:
    decoder = isinstance(block, DecoderLayer)
    if "attention" in parts:
        attention: Any = block.self_attn if decoder else block.attn
        attention.forward = _recomputed(attention, attention.forward)
    if "moe" in parts and isinstance(block.mlp, MoE):
        experts: Any = block.mlp
        experts.forward = _recomputed(experts, experts.forward)
    if "norm" in parts:
        _form_norms_again(block, saved)
    if "activation" in parts:
        for layer in block.sublayers():
            if isinstance(layer, (SwiGLU, ExpertPool)):
                layer.activation = saved.again(layer.activation)


def _form_norms_again(block: Any, saved: SavedTensors) -> None:
    decoder = isinstance(block, DecoderLayer)
    first = block.input_layernorm if decoder else block.norm1
    second = block.post_attention_layernorm if decoder else block.norm2
    for norm in (first, second):
        norm.forward = saved.again(norm.forward)
    for layer in block.sublayers():
        if isinstance(layer, Gathering):  # what is kept of a norm's output is all rows of it
            layer.gathered = saved.again(layer.gathered)


def _recomputed(layer: nn.Layer, forward: Forward) -> Forward:
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
