"""Supervised fine-tuning: the sum of a micro-batch's token losses, and how many tokens it sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import paddle
from ernietune_kernels import linear_cross_entropy
from paddle import Tensor

from ernietune.data.collate import Batch
from ernietune.media.image import normalize
from ernietune.models.decoder import CausalLM, Inputs
from ernietune.text.template import IGNORE


@dataclass(frozen=True)
class LossSums:
    """What an objective returns: a loss summed over `count` tokens (fp32 scalar) and sums to be logged."""

    total: Tensor
    count: int
    metrics: dict[str, float] = field(default_factory=dict)


Objective = Callable[[CausalLM, Batch], LossSums]


def to_inputs(batch: Batch) -> Inputs:
    """The model's tensors of a micro-batch; pixels are normalised here, in fp32."""
    return Inputs(
        ids=paddle.to_tensor(batch.ids),
        positions=paddle.to_tensor(batch.positions),
        visible_until=paddle.to_tensor(batch.visible_until),
        is_vision=paddle.to_tensor(batch.is_vision),
        patches=paddle.to_tensor(normalize(batch.patches)) if len(batch.patches) else None,
        grids=tuple((int(t), int(h), int(w)) for t, h, w in batch.grids),
    )


def sft(model: CausalLM, batch: Batch, loss_chunk: int | None = None) -> LossSums:
    """Cross-entropy of the supervised positions; logits exist for those rows only, `loss_chunk` at a time."""
    hidden = model(to_inputs(batch))
    rows = (batch.labels != IGNORE).nonzero()[0]
    picked = paddle.gather(hidden, paddle.to_tensor(rows))
    losses = linear_cross_entropy(picked, model.head_weight, paddle.to_tensor(batch.labels[rows]), loss_chunk)
    return LossSums(losses.sum(), len(rows))
