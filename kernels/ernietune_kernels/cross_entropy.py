"""Cross-entropy of a linear head without the tokens x vocabulary matrix in memory."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernietune_kernels import fused

# Logits of one chunk: 2^24 fp32 values are 64 MiB, whatever the vocabulary.
CHUNK_ELEMENTS = 1 << 24


def chunk_rows(vocabulary: int, rows: int | None) -> int:
    """Rows whose logits exist at a time: `rows`, or as many as take 64 MiB."""
    return rows or max(16, CHUNK_ELEMENTS // vocabulary)


def _softmax_chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood [c], probabilities [c, V]) of one chunk, in fp32."""
    logits = head_logits(hidden, weight).astype("float32")
    peak = logits.max(-1, keepdim=True)
    picked = paddle.take_along_axis(logits, labels.unsqueeze(1), axis=1)
    exponentials = (logits - peak).exp_()
    total = exponentials.sum(-1, keepdim=True)
    nll = (total.log() + peak - picked).squeeze(1)
    return nll, exponentials.divide_(total)


def _panels(weight: Tensor) -> list[slice]:
    """Rows of a head in another type than its products', which are widened at a time."""
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[c, D] -> [c, V], for a head of the same type or of another."""
    if weight.dtype == hidden.dtype:
        return paddle.matmul(hidden, weight, transpose_y=True)
    parts = (weight[rows].astype(hidden.dtype) for rows in _panels(weight))
    return paddle.concat([paddle.matmul(hidden, part, transpose_y=True) for part in parts], axis=1)


def hidden_gradient(logits: Tensor, weight: Tensor, dtype: Any) -> Tensor:
    """d logits [c, V] times the head, in the type of the hidden states."""
    if weight.dtype == dtype:
        return paddle.matmul(logits.astype(dtype), weight)
    total = paddle.zeros([logits.shape[0], weight.shape[1]], dtype)
    for rows in _panels(weight):
        total.add_(paddle.matmul(logits[:, rows].astype(dtype), weight[rows].astype(dtype)))
    return total


def _logit_gradient(probabilities: Tensor, labels: Tensor) -> Tensor:
    """d nll / d logits = probabilities minus one at the label; overwrites its argument."""
    minus_one = paddle.full([labels.shape[0], 1], -1.0, "float32")
    return probabilities.put_along_axis_(labels.unsqueeze(1), minus_one, 1, reduce="add")


class _LinearCrossEntropy(PyLayer):
    """A row's loss depends on that row alone, so d nll / d hidden is formed in the forward pass and only
    scaled by the incoming gradient later. A trainable head needs the logits again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
        losses, gradients = [], []
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], labels[start : start + rows]
            nll, probabilities = _softmax_chunk(part, weight, target)
            losses.append(nll)
            if not hidden.stop_gradient:
                logits = _logit_gradient(probabilities, target)
                gradients.append(hidden_gradient(logits, weight, hidden.dtype))
        ctx.rows = rows
        ctx.grad_hidden = paddle.concat(gradients) if gradients else None
        ctx.save_for_backward(hidden, weight, labels)
        return paddle.concat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, labels = ctx.saved_tensor()
        grad_hidden = None
        if ctx.grad_hidden is not None:
            grad_hidden = ctx.grad_hidden * grad.unsqueeze(1).astype(hidden.dtype)
        grad_weight = None
        if not weight.stop_gradient:
            grad_weight = paddle.zeros_like(weight)
            for start in range(0, hidden.shape[0], ctx.rows):
                part = slice(start, start + ctx.rows)
                _, probabilities = _softmax_chunk(hidden[part], weight, labels[part])
                logits = _logit_gradient(probabilities, labels[part]) * grad[part].unsqueeze(1)
                grad_weight += paddle.matmul(logits.astype(weight.dtype), hidden[part], transpose_x=True)
        return grad_hidden, grad_weight, None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, rows: int | None = None
) -> Tensor:
    """Negative log-likelihood [N] in fp32 of each row's label under softmax(hidden @ weight^T).

    `rows` is the number of rows whose logits exist at a time; by default they take 64 MiB. A frozen weight
    may be bfloat16 where the products are fp32: 64 MiB of it are widened at a time. Labels must be valid
    ids: drop unlabelled rows before, they would be computed for nothing.
    """
    chunk = chunk_rows(weight_VD.shape[0], rows)
    if not hidden_ND.shape[0]:
        return paddle.zeros([0], "float32")
    if rows is None and fused.available_for_products(hidden_ND):
        return fused.linear_cross_entropy(hidden_ND, weight_VD, labels_N)
    if hidden_ND.stop_gradient and weight_VD.stop_gradient or not paddle.is_grad_enabled():
        parts = [slice(start, start + chunk) for start in range(0, hidden_ND.shape[0], chunk)]
        return paddle.concat([_softmax_chunk(hidden_ND[p], weight_VD, labels_N[p])[0] for p in parts])
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk)
