"""An expert layer with random weights on a card, and what it computes by torch in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu import experts
from gpu.products import Rows
from gpu.stacks import Stack
from gpu_timing import DEVICE, random


@dataclass(frozen=True)
class Shapes:
    """Sizes of one expert layer and what surrounds it."""

    tokens: int = 8192
    chosen: int = 6
    experts: int = 64
    hidden: int = 2560
    inner: int = 1536
    rank: int = 16
    vocabulary: int = 103_424
    heads: int = 20
    groups: int = 4
    context: int = 8192
    divided: bool = False  # the tokens are rows of one expert each that came from other cards


SMALL = Shapes(24, 2, 4, 256, 128, 8, 600, 4, 2, 300)


@dataclass
class Layer:
    """One expert layer with adapters, and tokens routed through it."""

    shapes: Shapes
    gate: experts.Projection
    up: experts.Projection
    down: experts.Projection
    x: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor

    @staticmethod
    def make(s: Shapes, tokens: int | None = None) -> Layer:
        """Random weights; every token draws its experts."""

        def projection(outputs: int, inputs: int) -> experts.Projection:
            stack = random(s.experts, outputs, inputs, scale=inputs**-0.5)
            a = random(s.experts, s.rank, inputs, scale=inputs**-0.5)
            return experts.Projection(Stack(stack), a, random(s.experts, outputs, s.rank, scale=0.1), 0.5)

        sizes = [(s.inner, s.hidden), (s.inner, s.hidden), (s.hidden, s.inner)]
        layer = Layer(s, *(projection(*size) for size in sizes), *[torch.empty(0)] * 3)
        return layer.with_tokens(tokens or s.tokens)

    def with_tokens(self, count: int) -> Layer:
        """The same weights and other tokens."""
        s = self.shapes
        draws = torch.rand(count, s.experts, device=DEVICE)
        chosen = draws.argsort(1)[:, : s.chosen].contiguous()
        weights = torch.softmax(draws.gather(1, chosen), 1).contiguous()
        return Layer(s, self.gate, self.up, self.down, random(count, s.hidden), weights, chosen)

    @property
    def trio(self) -> tuple[experts.Projection, ...]:
        """The three projections."""
        return self.gate, self.up, self.down

    def sorted(self) -> tuple[Rows, torch.Tensor]:
        """Rows in expert order with their source, and that order's inverse, both by torch."""
        flat = self.chosen.reshape(-1)
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=self.shapes.experts).to(torch.int32)
        return Rows(order.numel(), counts, order // self.shapes.chosen), order.argsort()


def plain(x: torch.Tensor, rows: Rows, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in fp32, expert by expert."""
    parts = x.float().split(rows.counts.tolist())
    return torch.cat([part @ weight[e].float().T for e, part in enumerate(parts)])


def plain_lora(x: torch.Tensor, rows: Rows, p: experts.Projection, a: Any, b: Any) -> torch.Tensor:
    """The same with the low-rank part."""
    return plain(x, rows, p.stack.codes) + p.scale * plain(plain(x, rows, a), rows, b)


@dataclass
class Truth:
    """Output and gradients of a layer by torch's autograd in fp32."""

    y: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    factors: list[torch.Tensor]

    @staticmethod
    def of(layer: Layer, grad: torch.Tensor) -> Truth:
        """For the gradient of the output that is given."""
        rows, inverse = layer.sorted()
        x, weights = (t.float().requires_grad_() for t in (layer.x, layer.weights))
        pairs = [[f.float().requires_grad_() for f in (p.a, p.b)] for p in layer.trio]
        wide = x[rows.source]
        gate, up = (plain_lora(wide, rows, p, *pair) for p, pair in zip(layer.trio, pairs[:2], strict=False))
        h = torch.nn.functional.silu(gate) * up * weights.reshape(-1)[inverse.argsort()][:, None]
        out = plain_lora(h, rows, layer.down, *pairs[2])[inverse]
        y = out.reshape(x.shape[0], layer.shapes.chosen, -1).sum(1)
        y.backward(grad.float())
        return Truth(y.detach(), x.grad, weights.grad, [f.grad for pair in pairs for f in pair])


def quantised(weight: torch.Tensor, bits: int, group: int) -> Stack:
    """int8 with a scale an output, or int4 with one for `group` inputs."""
    values = weight.float()
    if bits == 16:
        return Stack(weight)
    if bits == 8:
        scale = values.abs().amax(-1) / 127
        return Stack((values / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale, 8)
    grouped = values.reshape(*values.shape[:2], -1, group)
    scale = grouped.abs().amax(-1) / 7
    codes = ((grouped / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(values.shape)
    return Stack((codes[..., ::2] | codes[..., 1::2] << 4).contiguous(), scale, 4, group)


def numbers(stack: Stack) -> torch.Tensor:
    """What the codes stand for, fp32 [E, O, I]."""
    if stack.bits == 16:
        return stack.codes.float()
    if stack.bits == 8:
        return stack.codes.float() * stack.scale[..., None]
    pairs = torch.stack([stack.codes & 15, stack.codes >> 4], -1).flatten(-2).float() - 8.0
    return pairs * stack.scale.repeat_interleave(stack.group, -1)


def fp8_numbers(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What e4m3 codes stand for: rows with a scale for 128 columns, or a stack with one for 128 x 128."""
    wide = scale.repeat_interleave(128, -1)[..., : codes.shape[-1]]
    if codes.ndim == 3:
        wide = wide.repeat_interleave(128, 1)[:, : codes.shape[1]]
    return codes.float() * wide
