"""Embedding and head divided by vocabulary over a tensor group: process i has the rows i V/t .. (i+1) V/t.

A token's embedding is the sum of what all have of it, which is nothing but for one. The loss of a row needs
three numbers from each process, in fp32: its largest logit, its sum of exponentials, and the label's logit
where that is here. Nobody ever has all logits of a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
from ernietune_kernels.cross_entropy import chunk_rows, head_logits, hidden_gradient
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernietune.models.decoder import CausalLM
from ernietune.parallel.collectives import Group, all_reduce


def divide_vocabulary(model: CausalLM, group: Group) -> None:
    """Let a model that has its part of the rows look up words and work out losses with the others."""
    embedding: nn.Layer = model.model.embed_tokens
    embedding.forward = partial(_embedded, embedding, embedding.forward, group)
    model.cross_entropy = partial(_cross_entropy, group)


def _placed(ids: Tensor, held: int, group: Group) -> tuple[Tensor, Tensor]:
    """(the row of every id among the `held` of this process, 0 for those elsewhere; whether it is here)."""
    rows = ids - group.index * held
    here = paddle.logical_and(rows >= 0, rows < held)
    return paddle.where(here, rows, paddle.zeros_like(rows)), here


def _embedded(embedding: nn.Layer, forward: Any, group: Group, ids: Tensor) -> Tensor:
    assert embedding.weight.stop_gradient, "what trains beside divided products are adapters"
    rows, here = _placed(ids, embedding.weight.shape[0], group)
    words = forward(rows)
    return all_reduce(words * here.astype(words.dtype).unsqueeze(1), group)


def _cross_entropy(
    group: Group, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, rows: int | None = None
) -> Tensor:
    """As `ernietune_kernels.linear_cross_entropy`, of which every process has a part of the vocabulary."""
    assert weight_VD.stop_gradient, "what trains beside divided products are adapters"
    if not hidden_ND.shape[0]:
        return paddle.zeros([0], "float32")
    step = chunk_rows(weight_VD.shape[0], rows)
    labels, here = _placed(labels_N, weight_VD.shape[0], group)
    if hidden_ND.stop_gradient or not paddle.is_grad_enabled():
        parts = [slice(start, start + step) for start in range(0, hidden_ND.shape[0], step)]
        return paddle.concat([_chunk(hidden_ND[p], weight_VD, labels[p], here[p], group)[0] for p in parts])
    return _CrossEntropy.apply(hidden_ND, weight_VD, labels, here, step, group)


def _chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, here: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood [c], probabilities [c, V/t]) of some rows."""
    logits = head_logits(hidden, weight).astype("float32")
    peak = all_reduce(logits.max(-1), group, largest=True)
    picked = paddle.take_along_axis(logits, labels.unsqueeze(1), axis=1).squeeze(1)
    picked = paddle.where(here, picked, paddle.zeros_like(picked))
    exponentials = (logits - peak.unsqueeze(1)).exp_()
    total, picked = all_reduce(paddle.stack([exponentials.sum(-1), picked]), group).unbind(0)
    return total.log() + peak - picked, exponentials.divide_(total.unsqueeze(1))


def _slopes(probabilities: Tensor, labels: Tensor, here: Tensor) -> Tensor:
    """d nll / d logits: less one at the label, where that is here; overwrites its argument."""
    taken = -here.astype("float32").unsqueeze(1)
    return probabilities.put_along_axis_(labels.unsqueeze(1), taken, 1, reduce="add")


class _CrossEntropy(PyLayer):
    """d nll / d hidden is formed and summed in the forward pass, as the kernel of one process does."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, here: Tensor, step: int, group: Group
    ) -> Tensor:
        losses, gradients = [], []
        for start in range(0, hidden.shape[0], step):
            p = slice(start, start + step)
            nll, probabilities = _chunk(hidden[p], weight, labels[p], here[p], group)
            losses.append(nll)
            gradients.append(
                hidden_gradient(_slopes(probabilities, labels[p], here[p]), weight, hidden.dtype)
            )
        ctx.gradient = all_reduce(paddle.concat(gradients), group)
        return paddle.concat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient * grad.unsqueeze(1).astype(ctx.gradient.dtype), None, None, None
