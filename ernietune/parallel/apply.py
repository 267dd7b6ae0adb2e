"""Parallelism put around a finished model, from the inside out.

The order matters: the experts' exchange, then the sums of tensor parallelism around it, then the gathering of
a layer's slices, then recompute, which runs all of that again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor, nn

from ernietune.lora import adapters
from ernietune.memory_modes import Recompute
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM, DecoderLayer
from ernietune.models.moe import MoE, Router
from ernietune.parallel import recompute
from ernietune.parallel.blocks import Block, Waiting
from ernietune.parallel.collectives import copied, summed
from ernietune.parallel.experts import DividedExperts
from ernietune.parallel.team import Team
from ernietune.parallel.trained import Trained

__all__ = ["apply", "build", "same_start"]


def build(config: ModelConfig, dtype: str, team: Team) -> CausalLM:
    """A model of what this process holds; uninitialised. Its routers still choose among all experts."""
    model = CausalLM(team.degrees.local(config), dtype)
    model.config = config
    for layer in model.sublayers():
        if isinstance(layer, MoE):
            for pool, shape in zip((layer.text_experts, layer.vision_experts), config.pools, strict=False):
                if pool is not None:
                    pool.count = shape.count
                    pool.router = Router(config.hidden_size, shape.count, config.moe_k)
    return model


def same_start(model: CausalLM, seed: int, team: Team) -> None:
    """Give fresh adapters the values that one process would draw, whatever this one holds of them."""
    degrees = team.degrees
    if degrees.expert * degrees.tensor == 1:
        return
    paddle.seed(seed)
    for path, adapter in adapters(model):
        name = f"{path}.lora_A"
        shape = degrees.whole_shape(name, adapter.lora_A.shape)
        bound = 1.0 / float(np.sqrt(shape[-1]))
        drawn = paddle.uniform(shape, "float32", -bound, bound).numpy()
        adapter.lora_A.set_value(np.ascontiguousarray(team.holding.cut(name, drawn)))


def apply(
    model: CausalLM,
    team: Team,
    *,
    stage: int,
    base_sharded: bool,
    recomputed: Recompute,
    offload: bool = False,
    waiting: Waiting | None = None,
) -> Trained:
    """Put everything around `model`, adapters included; what trains, as this process holds it.

    `waiting` are frozen weights that are on the host until their layer works.
    """
    blocks = []
    for number, layer in enumerate(model.model.layers):
        if team.expert.size > 1 and isinstance(layer.mlp, MoE):
            _forward_by(layer.mlp, DividedExperts(layer.mlp, team).forward)
        if team.tensor.size > 1:
            _divide_products(layer, team)
        if stage == 3 or base_sharded or waiting is not None:
            path = f"model.layers.{number}"
            block = Block(path, layer, team, trained=stage == 3, frozen=base_sharded, waiting=waiting)
            layer.forward = block.around(layer.forward)
            blocks.append(block)
    recompute.apply(model, recomputed, offload)
    if team.world.size > 1:
        first = model.model.layers[0]
        first.forward = _asking_for_gradients(first.forward)
    return Trained(model, team, stage, blocks)


def _forward_by(layer: nn.Layer, forward: Callable[..., Tensor]) -> None:
    """On the instance, so that parameter paths stay what they are."""
    layer.forward = forward


def _divide_products(layer: DecoderLayer, team: Team) -> None:
    """Attention and MLP work on a part of their inner width: sum their outputs, and inputs' gradients."""
    for module in (layer.self_attn, layer.mlp):
        _forward_by(module, _shared_product(module.forward, team))


def _shared_product(forward: Callable[..., Tensor], team: Team) -> Callable[..., Tensor]:
    return lambda x, *others: summed(forward(copied(x, team.tensor), *others), team.tensor)


def _asking_for_gradients(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backward pass on one process must be one on all: without this, a batch with nothing to train below
    the decoder would end its backward pass earlier than that of a process with pictures.
    """

    def run(x: Tensor, *others: object) -> Tensor:
        if paddle.is_grad_enabled() and x.stop_gradient:
            x = x.detach()
            x.stop_gradient = False
        return forward(x, *others)

    return run
