"""The expert kernels as operations of Paddle's autograd, and the moving of rows to experts and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernietune_kernels.fused import stack_of
from ernietune_kernels.quantized import QuantizedWeight

__all__ = [
    "ExpertFactors",
    "combined",
    "grouped_linear",
    "grouped_low_rank",
    "placed_experts",
    "routed_experts",
    "rows_by_expert",
    "sort_by_expert",
]


@dataclass(frozen=True)
class ExpertFactors:
    """A frozen stack [E, O, I] with the factors of its adapter, A [E, r, I] and B [E, O, r], or without.

    The stack is a tensor, or has int8 or int4 codes.
    """

    weight: Tensor | QuantizedWeight
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


Trio = tuple[ExpertFactors, ExpertFactors, ExpertFactors]


class _Experts(PyLayer):
    """Factors come as tensors of their own so that autograd sees them; `layers` holds the frozen rest."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        placement: Any,
        layers: Trio,
        keep_activation: bool,
        *factors: Tensor,
    ) -> Tensor:
        from ernietune_kernels.gpu.experts import forward

        ctx.projections = _projections(layers)
        y, saved = forward(x, weights, placement, *ctx.projections, keep_activation)
        # The large tensors go through autograd, where whoever saves memory can take hold of them.
        wide = [saved.gate_up] if saved.h is None else [saved.gate_up, saved.h]
        ctx.wide, ctx.rest = len(wide), replace(saved, x=None, gate_up=None, h=None)
        ctx.needs_weights = weights is not None and not weights.stop_gradient
        ctx.tensors = 1 + (weights is not None)
        ctx.save_for_backward(x, *wide, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from ernietune_kernels.gpu.experts import backward

        x, *others = ctx.saved_tensor()
        gate_up, *h = others[: ctx.wide]
        factors = others[ctx.wide :]
        saved = replace(ctx.rest, x=x, gate_up=gate_up, h=h[0] if h else None)
        found = backward(grad, saved, *ctx.projections)
        pairs = [gradient for pair in found.adapters if pair is not None for gradient in pair]
        back = [None if f.stop_gradient else g.astype(f.dtype) for f, g in zip(factors, pairs, strict=True)]
        grad_x = None if x.stop_gradient else found.x
        grad_weights = found.weights if ctx.needs_weights else None
        return (grad_x, grad_weights)[: ctx.tensors] + tuple(back)


def _projections(layers: Trio) -> list[Any]:
    from ernietune_kernels.gpu.experts import Projection

    return [Projection(stack_of(layer.weight), layer.a, layer.b, layer.scale) for layer in layers]


def _applied(
    x: Tensor, weights: Tensor | None, placement: Any, layers: Trio, keep_activation: bool
) -> Tensor:
    factors = [factor for layer in layers for factor in (layer.a, layer.b) if factor is not None]
    return _Experts.apply(x, weights, placement, layers, keep_activation, *factors)


def routed_experts(
    x_TD: Tensor,
    weights_Tk: Tensor,
    experts_Tk: Tensor,
    gate: ExpertFactors,
    up: ExpertFactors,
    down: ExpertFactors,
    keep_activation: bool = True,
) -> Tensor:
    """Every token through its k experts (SwiGLU between gate-and-up and down), added by routing weight.

    Without `keep_activation` the output of SwiGLU is not kept for the backward pass but formed again there.
    """
    from ernietune_kernels.gpu.experts import by_choice

    placement = by_choice(experts_Tk, int(gate.weight.shape[0]))
    return _applied(x_TD, weights_Tk, placement, (gate, up, down), keep_activation)


def placed_experts(
    rows_ND: Tensor,
    counts: list[int],
    order_N: Tensor | None,
    gate: ExpertFactors,
    up: ExpertFactors,
    down: ExpertFactors,
    keep_activation: bool = True,
) -> Tensor:
    """Rows through one expert each, counts[e] of them through expert e, in the order they came in.

    `order` int64 [N] lists them by expert; None: they stand so. Nothing is weighted.
    """
    from ernietune_kernels.gpu import experts

    counts_E = paddle.to_tensor(counts, "int32", place=rows_ND.place)
    if order_N is None:
        placement = experts.in_order(rows_ND.shape[0], counts_E)
    else:
        placement = experts.by_order(counts_E, order_N, paddle.argsort(order_N))
    return _applied(rows_ND, None, placement, (gate, up, down), keep_activation)


def _rows(x: Tensor, counts: list[int]) -> Any:
    from ernietune_kernels.gpu.products import Rows

    return Rows(x.shape[0], paddle.to_tensor(counts, "int32", place=x.place))


class _GroupedLinear(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        from ernietune_kernels.gpu.products import Term, grouped

        ctx.rows, ctx.term = _rows(x, counts), Term(stack_of(weight))
        return grouped(x, ctx.rows, [ctx.term])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from ernietune_kernels.gpu.products import grouped

        return grouped(grad, ctx.rows, [ctx.term], forward=False), None


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    """Rows sorted by expert times a frozen stack: [N, O]."""
    return _GroupedLinear.apply(x_NI, weight_EOI, counts)


class _LowRank(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, counts: list[int]) -> Tensor:
        from ernietune_kernels.gpu.products import Term, grouped, narrow

        ctx.rows, ctx.scale = _rows(x, counts), scale
        product = narrow(x, ctx.rows, a, scale)
        ctx.save_for_backward(x, a, b, product)
        return grouped(product, ctx.rows, [Term(stack_of(b))])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from ernietune_kernels.gpu.products import Term, grouped, narrow, outer

        x, a, b, product = ctx.saved_tensor()
        back = narrow(grad, ctx.rows, b, ctx.scale, transposed=True)
        grads = (
            grouped(back, ctx.rows, [Term(stack_of(a))], forward=False),
            outer(back, x, ctx.rows, a.shape[2]).astype(a.dtype),
            outer(product, grad, ctx.rows, b.shape[1], transposed=True).astype(b.dtype),
        )
        return tuple(None if t.stop_gradient else g for t, g in zip((x, a, b), grads, strict=True))


def grouped_low_rank(x_NI: Tensor, a_ErI: Tensor, b_EOr: Tensor, scale: float, counts: list[int]) -> Tensor:
    """scale (x A^T) B^T for rows sorted by expert: [N, O]."""
    return _LowRank.apply(x_NI, a_ErI, b_EOr, scale, counts)


def sort_by_expert(experts_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order int64 [N k], inverse int64 [N k], counts int32 [E]) of a stable sort of the pairs."""
    from ernietune_kernels.gpu import permute

    return permute.sort_by_expert(experts_Nk, experts)


class _RowsByExpert(PyLayer):
    """Paddle's own way back of a gather adds a token's gradients in whatever order they come, in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.inverse, ctx.choices = inverse, choices
        return paddle.gather(x, order // choices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from ernietune_kernels.gpu import permute

        return permute.combine(grad, ctx.inverse, ctx.choices), None, None


def rows_by_expert(x_ND: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
    """Each row once per choice, in the order of `sort_by_expert`: [N k, D]."""
    return _RowsByExpert.apply(x_ND, order, inverse, choices)


class _Combined(PyLayer):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
        from ernietune_kernels.gpu import permute

        ctx.inverse = inverse
        ctx.save_for_backward(rows, weights)
        return permute.combine(rows, inverse, weights.shape[1], weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from ernietune_kernels.gpu import permute

        rows, weights = ctx.saved_tensor()
        grad_rows, grad_weights = permute.spread(grad, rows, ctx.inverse, weights)
        return (
            None if rows.stop_gradient else grad_rows,
            None if weights.stop_gradient else grad_weights,
            None,
        )


def combined(rows: Tensor, weights_Nk: Tensor, inverse: Tensor) -> Tensor:
    """The k rows of each token added by weight, in fp32 and always in the same order: [N, D]."""
    return _Combined.apply(rows, weights_Nk.astype("float32"), inverse)
