"""Products of expert blocks: rows sorted by expert, one weight matrix per block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.utils import dlpack

from ernietune_kernels import fused, fused_experts
from ernietune_kernels.cpu import blas


def expert_views(stack: Tensor) -> list[Tensor]:
    """One tensor per expert that shares the stack's memory.

    On a CPU `stack[e]` copies the matrix (strided views are off, see ernietune.environment), which costs as
    much as a small product; the array protocol gives true views.
    """
    if stack.place.is_cpu_place():
        array = np.from_dlpack(stack.detach())
        return [dlpack.from_dlpack(array[e]) for e in range(array.shape[0])]
    return [stack[e] for e in range(stack.shape[0])]


def row_blocks(x: Tensor, counts: list[int]) -> dict[int, Tensor]:
    """Expert -> its rows of x, without a copy on a CPU; experts without rows are left out."""
    if not x.place.is_cpu_place():
        return {e: x[a:b] for e, a, b in blocks(counts)}
    array = np.from_dlpack(x.detach())
    return {e: dlpack.from_dlpack(array[a:b]) for e, a, b in blocks(counts)}


def blocks(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
        start += count


def expert_products(
    x: Tensor, weight: Tensor, counts: list[int], views: list[Tensor], forward: bool
) -> Tensor:
    """Rows sorted by expert times the matrices of a stack transposed, or as they are for the way back.

    No autograd. With one expert the weight may be its matrix alone.
    """
    if len(counts) == 1:
        return paddle.matmul(x, views[0], transpose_y=forward)
    written = blas.grouped_product(x, weight, counts, forward)
    if written is not None:
        return written
    pieces = [paddle.matmul(rows, views[e], transpose_y=forward) for e, rows in row_blocks(x, counts).items()]
    return paddle.concat(pieces) if pieces else paddle.zeros([0, weight.shape[1 if forward else 2]], x.dtype)


class _GroupedLinear(PyLayer):
    """One node for all experts: Paddle's own graph would scatter a full weight gradient per expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int], views: list[Tensor]) -> Tensor:
        ctx.counts, ctx.views = counts, views
        ctx.save_for_backward(x, weight)
        return expert_products(x, weight, counts, views, forward=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensor()
        grad_x = None
        if not x.stop_gradient:
            grad_x = expert_products(grad, weight, ctx.counts, ctx.views, forward=False)
        grad_w = None
        if not weight.stop_gradient:
            cut = row_blocks(grad, ctx.counts)
            inputs = row_blocks(x, ctx.counts)
            per_expert = {e: paddle.matmul(cut[e], rows, transpose_x=True) for e, rows in inputs.items()}
            empty = paddle.zeros(weight.shape[1:], weight.dtype)
            grad_w = paddle.stack([per_expert.get(e, empty) for e in range(weight.shape[0])])
        return grad_x, grad_w


def grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor, counts: list[int], views: list[Tensor] | None = None
) -> Tensor:
    """[N, O]: block e of the rows (counts[e] of them, sorted by expert) times weight[e] transposed.

    `views` are the weight's `expert_views`, kept by the caller so that they are made once per weight.
    """
    if weight_EOI.stop_gradient and fused.available_for_products(x_NI):
        return fused_experts.grouped_linear(x_NI, weight_EOI, counts)
    return _GroupedLinear.apply(x_NI, weight_EOI, counts, views or expert_views(weight_EOI))
