"""Supervised fine-tuning, and what every objective shares: inputs, token losses, sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle import Tensor

from ernietune.data.collate import Batch
from ernietune.media.image import normalize
from ernietune.models.decoder import CausalLM, Inputs
from ernietune.text.template import IGNORE


@dataclass(frozen=True)
class LossSums:
    """What an objective returns for one micro-batch: sums, which the loop turns into means over a whole step.

    The loss is the sum of its terms, each an fp32 scalar divided by the step's total of the count of the same
    name in `Batch.counts`. Metrics are sums as well, each under the name of the count it is a mean over:
    {"pairs": {"rewards/margins": 3.0}}.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


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


def sft(
    model: CausalLM, batch: Batch, loss_chunk: int | None = None, neftune_alpha: float | None = None
) -> LossSums:
    """Cross-entropy of the supervised positions; logits exist for those rows only, `loss_chunk` at a time.

    Where labels have weights, the sum and the divisor have them too: a weight of 2 is the answer twice.
    `neftune_alpha` adds noise to the words while the model trains (`noise`).
    """
    inputs = to_inputs(batch)
    if neftune_alpha is None or not model.training:
        hidden = model(inputs)
    else:
        words = model.embed(inputs)
        hidden = model.model(words + noise(words, batch, neftune_alpha), model.shared(inputs))
    losses = token_losses(model, hidden, batch, loss_chunk)
    if batch.weights is not None:
        losses = losses * paddle.to_tensor(batch.weights[batch.labels != IGNORE])
    return LossSums({"tokens": losses.sum()})


def noise(words_TD: Tensor, batch: Batch, alpha: float) -> Tensor:
    """NEFTune: uniform in [-1, 1] times alpha / sqrt(tokens of the sample * D), on words, not on pictures.

    Drawn from Paddle's generator, which every step seeds anew: a resumed run draws the same.
    """
    ends, counts = np.unique(batch.visible_until, return_counts=True)
    lengths = counts[np.searchsorted(ends, batch.visible_until)]
    scales = np.where(batch.is_vision, 0.0, alpha / np.sqrt(lengths * words_TD.shape[1]))
    drawn = paddle.uniform(words_TD.shape, "float32", -1.0, 1.0)
    return (drawn * paddle.to_tensor(scales.astype(np.float32)).unsqueeze(1)).astype(words_TD.dtype)


def token_losses(model: CausalLM, hidden: Tensor, batch: Batch, loss_chunk: int | None) -> Tensor:
    """Negative log-likelihood of every label of a batch in order, fp32 [supervised]."""
    rows = (batch.labels != IGNORE).nonzero()[0]
    if not len(rows):
        # Empty, yet with a backward pass: other processes may wait for this one's.
        return hidden.reshape([-1])[:0].astype("float32")
    picked = paddle.gather(hidden, paddle.to_tensor(rows))
    labels = paddle.to_tensor(batch.labels[rows])
    return model.cross_entropy(picked, model.head_weight, labels, loss_chunk)
