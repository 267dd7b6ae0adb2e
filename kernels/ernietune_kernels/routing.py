"""Expert selection and the sorting of rows by expert."""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernietune_kernels import fused, fused_experts, reference

__all__ = ["Permutation", "permute", "route", "unpermute"]


def route(logits_NE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights [N, k] that sum to one and experts [N, k]: softmax in fp32; the bias selects only."""
    if fused.available(logits_NE):
        return fused.route(logits_NE, bias_E, k)
    return reference.route(logits_NE, bias_E, k)


@dataclass(frozen=True)
class Permutation:
    """Where each of the N x k (row, choice) pairs stands once they are sorted by expert.

    `order` [N*k] lists the pairs in expert order; `inverse` [N*k] is where a pair went; `counts` [E] is the
    number of pairs per expert, on the host because it sizes the products.
    """

    order: Tensor
    inverse: Tensor
    counts: list[int]
    choices: int


def permute(x_ND: Tensor, experts_Nk: Tensor, experts: int) -> tuple[Tensor, Permutation]:
    """Copy each row once per chosen expert, sorted by expert; ties keep the order of the rows."""
    choices = experts_Nk.shape[1]
    if fused.available(x_ND):
        order, inverse, counts = fused_experts.sort_by_expert(experts_Nk, experts)
        rows = fused_experts.rows_by_expert(x_ND, order, inverse, choices)
        return rows, Permutation(order, inverse, counts.tolist(), choices)
    flat = experts_Nk.reshape([-1])
    order = paddle.argsort(flat, stable=True)
    counts = paddle.bincount(flat, minlength=experts)
    plan = Permutation(order, paddle.argsort(order), counts.tolist(), choices)
    return paddle.gather(x_ND, order // choices), plan


def unpermute(rows: Tensor, weights_Nk: Tensor, plan: Permutation) -> Tensor:
    """Bring the experts' rows back and add the k of each token by weight, always in the same order."""
    if fused.available(rows):
        return fused_experts.combined(rows, weights_Nk, plan.inverse)
    restored = paddle.gather(rows, plan.inverse).reshape([-1, plan.choices, rows.shape[-1]])
    return paddle.matmul(weights_Nk.astype(rows.dtype).unsqueeze(1), restored).squeeze(1)
