"""A frozen linear layer with its low-rank product beside it, as one node: y = x W^T + s (x A^T) B^T.

Paddle's own graph for this makes a second y-sized product, an addition over it and, for experts, the row
blocks of x twice. Here the low-rank product is added in place and the blocks are cut once; on a CPU in fp32
the low-rank half is C (`cpu/lowrank.c`): thin matrices are what a BLAS is slow at. W takes no gradient.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernietune_kernels import fused, fused_experts
from ernietune_kernels.cpu import lowrank
from ernietune_kernels.cpu.library import Library
from ernietune_kernels.grouped_gemm import expert_products, expert_views, grouped_linear, row_blocks


def _forward(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y, s x A^T)."""
    narrow = paddle.matmul(x, a, transpose_y=True).scale_(scale)
    return paddle.matmul(x, w, transpose_y=True).add_(paddle.matmul(narrow, b, transpose_y=True)), narrow


def _backward_x(grad: Tensor, w: Tensor, a: Tensor, narrow_grad: Tensor) -> Tensor:
    return paddle.matmul(grad, w).add_(paddle.matmul(narrow_grad, a))


class _LoRALinear(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y, narrow = _forward(x, w, a, b, scale)
        ctx.scale = scale
        ctx.save_for_backward(x, w, a, b, narrow)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        x, w, a, b, narrow = ctx.saved_tensor()
        narrow_grad = paddle.matmul(grad, b).scale_(ctx.scale)
        grad_x = None if x.stop_gradient else _backward_x(grad, w, a, narrow_grad)
        grad_a = None if a.stop_gradient else paddle.matmul(narrow_grad, x, transpose_x=True)
        grad_b = None if b.stop_gradient else paddle.matmul(grad, narrow, transpose_x=True)
        return grad_x, None, grad_a, grad_b


class _GroupedLoRALinear(PyLayer):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        counts: list[int],
        views: list[Tensor],
    ) -> Tensor:
        ctx.scale, ctx.counts, ctx.views = scale, counts, views
        a_views, b_views = expert_views(a), expert_views(b)
        rows = row_blocks(x, counts)
        pieces = [_forward(rows[e], views[e], a_views[e], b_views[e], scale) for e in rows]
        if not pieces:
            ctx.save_for_backward(x, a, b, paddle.zeros([0, a.shape[1]], x.dtype))
            return paddle.zeros([0, w.shape[1]], x.dtype)
        ctx.save_for_backward(x, a, b, paddle.concat([narrow for _, narrow in pieces]))
        return paddle.concat([y for y, _ in pieces])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        x, a, b, narrow = ctx.saved_tensor()
        a_views, b_views = expert_views(a), expert_views(b)
        pieces, grads_a, grads_b = [], {}, {}
        rows, narrows = row_blocks(x, ctx.counts), row_blocks(narrow, ctx.counts)
        for e, block in row_blocks(grad, ctx.counts).items():
            narrow_grad = paddle.matmul(block, b_views[e]).scale_(ctx.scale)
            grads_a[e] = paddle.matmul(narrow_grad, rows[e], transpose_x=True)
            grads_b[e] = paddle.matmul(block, narrows[e], transpose_x=True)
            if not x.stop_gradient:
                pieces.append(_backward_x(block, ctx.views[e], a_views[e], narrow_grad))
        grad_x = None
        if not x.stop_gradient:
            grad_x = paddle.concat(pieces) if pieces else paddle.zeros_like(x)
        grad_a = None if a.stop_gradient else _stacked(grads_a, a)
        grad_b = None if b.stop_gradient else _stacked(grads_b, b)
        return grad_x, None, grad_a, grad_b


def _stacked(per_expert: dict[int, Tensor], stack: Tensor) -> Tensor:
    """Gradients of a stack; experts without rows get zeros."""
    empty = paddle.zeros(stack.shape[1:], stack.dtype)
    return paddle.stack([per_expert.get(e, empty) for e in range(stack.shape[0])])


class _CompiledLoRA(PyLayer):
    """Both of the above with the low-rank half in C; a linear layer is one expert that has all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        counts: list[int],
        views: list[Tensor],
        library: Library,
    ) -> Tensor:
        y = expert_products(x, w, counts, views, forward=True)
        narrow = lowrank.add(library, x, a, b, scale, counts, y)
        ctx.scale, ctx.counts, ctx.views, ctx.library = scale, counts, views, library
        ctx.save_for_backward(x, w, a, b, narrow)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        x, w, a, b, narrow = ctx.saved_tensor()
        grad_x = None if x.stop_gradient else expert_products(grad, w, ctx.counts, ctx.views, forward=False)
        saved = (x, a, b, narrow)
        grad_a, grad_b = lowrank.gradients(ctx.library, saved, ctx.scale, ctx.counts, grad, grad_x)
        return grad_x, None, None if a.stop_gradient else grad_a, None if b.stop_gradient else grad_b


def lora_linear(x: Tensor, w_OI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """x W^T + scale (x A^T) B^T for x [.., I]; W is frozen, all in x's dtype."""
    rows = x.reshape([-1, x.shape[-1]])
    library = lowrank.library_for(rows, a_rI, b_Or)
    if library is None:
        y = _LoRALinear.apply(rows, w_OI, a_rI, b_Or, scale)
    else:
        y = _CompiledLoRA.apply(rows, w_OI, a_rI, b_Or, scale, [rows.shape[0]], [w_OI], library)
    return y.reshape([*x.shape[:-1], w_OI.shape[0]])


def grouped_lora_linear(
    x_NI: Tensor,
    w_EOI: Tensor,
    a_ErI: Tensor,
    b_EOr: Tensor,
    scale: float,
    counts: list[int],
    views: list[Tensor] | None = None,
) -> Tensor:
    """The same for rows sorted by expert, counts[e] of them for expert e; `views` as in `grouped_linear`."""
    if fused.available_for_products(x_NI):
        low_rank = fused_experts.grouped_low_rank(x_NI, a_ErI, b_EOr, scale, counts)
        return fused_experts.grouped_linear(x_NI, w_EOI, counts) + low_rank
    views, library = views or expert_views(w_EOI), lowrank.library_for(x_NI, a_ErI, b_EOr)
    if library is None:
        return _GroupedLoRALinear.apply(x_NI, w_EOI, a_ErI, b_EOr, scale, counts, views)
    return _CompiledLoRA.apply(x_NI, w_EOI, a_ErI, b_EOr, scale, counts, views, library)


def grouped_low_rank(x_NI: Tensor, a_ErI: Tensor, b_EOr: Tensor, scale: float, counts: list[int]) -> Tensor:
    """scale (x A^T) B^T alone, for rows sorted by expert whose base product is another operation's."""
    if fused.available_for_products(x_NI):
        return fused_experts.grouped_low_rank(x_NI, a_ErI, b_EOr, scale, counts)
    return grouped_linear(grouped_linear(x_NI, a_ErI, counts) * scale, b_EOr, counts)
