"""The experts of one modality with their adapters: forward and backward, without weight gradients.

x is never copied per choice: the kernels read a row's token where it lies. The routing weight goes in between
SwiGLU and the down projection (see `activation`), so that a row's own output is needed by nobody. Rows that
came from another process have no weight: their sender applies it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .activation import swiglu, swiglu_backward
from .permute import combine, sort_by_expert
from .products import Factor, Rows, Term, gate_up, grouped, narrow, outer
from .stacks import Stack
from .tensors import Tensor, take


@dataclass(frozen=True)
class Projection:
    """A stack [E, O, I] and its adapter: A [E, r, I] and B [E, O, r] in x's type, or neither."""

    stack: Stack
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Placement:
    """Where the rows of a call stand once they are in expert order.

    `gathered` reads x and dy where they lie, `sorted` what is in expert order. `order` int64 [N] lists the
    rows (of tokens: the pairs of token and choice) in expert order, `inverse` where each went; without both
    the rows lie in expert order and stay there.
    """

    gathered: Rows
    sorted: Rows
    choices: int = 1
    order: Tensor | None = None
    inverse: Tensor | None = None


def by_choice(experts_Tk: Tensor, experts: int) -> Placement:
    """Tokens that go to k experts each, sorted on the device."""
    choices = experts_Tk.shape[1]
    order, inverse, counts = sort_by_expert(experts_Tk, experts)
    total = order.shape[0]
    gathered = Rows(total, counts, order // choices)
    return Placement(gathered, Rows(total, counts), choices, order, inverse)


def by_order(counts_E: Tensor, order_N: Tensor, inverse_N: Tensor) -> Placement:
    """Rows of one expert each, whose order and counts (int32) are known."""
    total = order_N.shape[0]
    return Placement(Rows(total, counts_E, order_N), Rows(total, counts_E), 1, order_N, inverse_N)


def in_order(total: int, counts_E: Tensor) -> Placement:
    """Rows that lie in expert order."""
    rows = Rows(total, counts_E)
    return Placement(rows, rows)


@dataclass(frozen=True)
class Saved:
    """What the backward pass reads: inputs, placement, [gate | up], h, and the rows' low-rank products."""

    x: Tensor
    row_weight: Tensor | None
    placement: Placement
    gate_up: Tensor
    h: Tensor | None  # None: formed again from gate_up, to the same bits
    narrow: tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Gradients:
    """dx as x, d weights fp32 [T, k] where there are any, and (dA, dB) fp32 of gate, up and down, None
    without an adapter.
    """

    x: Tensor
    weights: Tensor | None
    adapters: tuple[tuple[Tensor, Tensor] | None, ...]


def forward(
    x: Tensor,
    weights_Tk: Tensor | None,
    placement: Placement,
    gate: Projection,
    up: Projection,
    down: Projection,
    keep_activation: bool = True,
) -> tuple[Tensor, Saved]:
    """Every row of x through its experts, added by routing weight (None: 1), and what `backward` needs.

    gate and up have adapters of one rank, or neither has. Without `keep_activation` the product of gate and
    up is formed again in the backward pass.
    """
    assert (gate.a is None) == (up.a is None)
    gathered, in_place = placement.gathered, placement.sorted
    row_weight = None if weights_Tk is None else take(weights_Tk.reshape([-1]), placement.order)
    narrow_gate, narrow_up = _narrow(x, gathered, gate), _narrow(x, gathered, up)
    halves, h = gate_up(x, gathered, _term(gate, narrow_gate), _term(up, narrow_up), row_weight)
    narrow_down = _narrow(h, in_place, down)
    y = _home(grouped(h, in_place, [_term(down, narrow_down)]), placement)
    products = (narrow_gate, narrow_up, narrow_down)
    return y, Saved(x, row_weight, placement, halves, h if keep_activation else None, products)


def backward(grad: Tensor, saved: Saved, gate: Projection, up: Projection, down: Projection) -> Gradients:
    """All gradients of `forward` but the stacks'."""
    gathered, in_place = saved.placement.gathered, saved.placement.sorted
    h = swiglu(saved.gate_up, saved.row_weight) if saved.h is None else saved.h
    width = h.shape[1]
    back_down = _narrow_back(grad, gathered, down)
    grad_h = grouped(grad, gathered, [_term_back(down, back_down)], forward=False)
    grad_halves, grad_row_weight = swiglu_backward(grad_h, saved.gate_up, saved.row_weight)
    back_gate = _narrow_back(grad_halves, in_place, gate)
    back_up = _narrow_back(grad_halves, in_place, up, first=width)
    terms = [_term_back(gate, back_gate), _term_back(up, back_up, first=width)]
    grad_x = _home(grouped(grad_halves, in_place, terms, forward=False), saved.placement)
    narrow_gate, narrow_up, narrow_down = saved.narrow
    of_x = (saved.x, gathered)
    adapters = (
        _factor_gradients(gate, (back_gate, *of_x), (narrow_gate, grad_halves, in_place)),
        _factor_gradients(up, (back_up, *of_x), (narrow_up, grad_halves, in_place), first=width),
        _factor_gradients(down, (back_down, h, in_place), (narrow_down, grad, gathered)),
    )
    return Gradients(grad_x, _weights_home(grad_row_weight, saved.placement), adapters)


def _home(rows: Tensor, placement: Placement) -> Tensor:
    """Rows in expert order back where they came from, those of one token added."""
    if placement.inverse is None:
        return rows
    return combine(rows, placement.inverse, placement.choices)


def _weights_home(grad_N: Tensor | None, placement: Placement) -> Tensor | None:
    if grad_N is None:
        return None
    return take(grad_N, placement.inverse).reshape([-1, placement.choices])


def _narrow(x: Tensor, rows: Rows, layer: Projection) -> Tensor | None:
    return None if layer.a is None else narrow(x, rows, layer.a, layer.scale)


def _narrow_back(grad: Tensor, rows: Rows, layer: Projection, first: int = 0) -> Tensor | None:
    return None if layer.b is None else narrow(grad, rows, layer.b, layer.scale, transposed=True, first=first)


def _term(layer: Projection, product: Tensor | None) -> Term:
    return Term(layer.stack, None if product is None else Factor(product, layer.b))


def _term_back(layer: Projection, product: Tensor | None, first: int = 0) -> Term:
    return Term(layer.stack, None if product is None else Factor(product, layer.a), first)


def _factor_gradients(
    layer: Projection,
    of_a: tuple[Tensor | None, Tensor, Rows],
    of_b: tuple[Tensor | None, Tensor, Rows],
    first: int = 0,
) -> tuple[Tensor, Tensor] | None:
    """dA = (s dy B)^T x and dB = dy^T (s x A^T), per expert."""
    if layer.a is None or layer.b is None:
        return None
    back, x, x_rows = of_a
    product, grad, grad_rows = of_b
    return (
        outer(back, x, x_rows, layer.a.shape[2]),
        outer(product, grad, grad_rows, layer.b.shape[1], transposed=True, first=first),
    )
