"""The rows of gpu_kernels.py: what is called, what is right in fp32, and how much work it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from gpu import activation, cross_entropy, decode, experts, fp8, norm, permute, products, rope
from gpu.products import Factor, Rows, Term
from gpu.stacks import Stack
from gpu_layer import Layer, Shapes, Truth, fp8_numbers, numbers, plain, plain_lora, quantised
from gpu_timing import CARD, DEVICE, Row, Sheet, random, turns

E4M3 = 0.05  # what three bits of a number keep, relative and at most


def shape_rows(sheet: Sheet, s: Shapes) -> None:
    """The whole expert layer, forward and backward, with every gradient; twice the same bits."""
    layer = Layer.make(s)
    grad = random(s.tokens, s.hidden)
    truth = Truth.of(layer, grad)
    where = f"{s.hidden} -> {s.inner}, " + ("divided" if s.divided else f"{s.chosen} of {s.experts}")
    pairs = s.tokens * s.chosen
    flops, low = 6.0 * pairs * s.hidden * s.inner, 6.0 * pairs * s.rank * (s.hidden + s.inner)
    rows, inverse = layer.sorted()

    def forward() -> Any:
        if s.divided:  # the exchange knows the order, and the sender weighs
            placement = experts.by_order(rows.counts, rows.source, inverse)
            return experts.forward(layer.x, None, placement, *layer.trio)
        placement = experts.by_choice(layer.chosen, s.experts)
        return experts.forward(layer.x, layer.weights, placement, *layer.trio)

    sheet.add(f"layer forward, {where}", forward, lambda: (forward()[0], truth.y), flops=flops + low)
    saved = forward()[1]

    def backward() -> experts.Gradients:
        return experts.backward(grad, saved, *layer.trio)

    sheet.add(f"layer backward, {where}", backward, lambda: (backward().x, truth.x), flops=flops + 2 * low)
    found, again = backward(), backward()
    if not s.divided:
        sheet.add("  router gradient", [], lambda: (found.weights, truth.weights), 0.02)
    ours = [gradient for pair in found.adapters for gradient in pair]
    for name, mine, right in zip(("gate", "up", "down"), _pairs(ours), _pairs(truth.factors), strict=True):
        sheet.add(f"  dA, dB of {name}", [], lambda mine=mine, right=right: (mine, right), 0.02)
    sheet.add("  the same bits twice", [], lambda: (_flat(again), _flat(found)), 0.0)


def _pairs(factors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.cat([a.reshape(-1), b.reshape(-1)]) for a, b in zip(factors[::2], factors[1::2], strict=True)
    ]


def _flat(found: experts.Gradients) -> torch.Tensor:
    weights = [] if found.weights is None else [found.weights]
    parts = [found.x.float(), *weights, *(f for pair in found.adapters for f in pair)]
    return torch.cat([part.reshape(-1) for part in parts])


def expert_rows(sheet: Sheet, s: Shapes) -> None:
    """The products one by one, beside torch's own grouped product, then the layer and its sorting."""
    layer = Layer.make(s)
    rows, inverse = layer.sorted()
    own, gathered = Rows(rows.total, rows.counts), layer.x[rows.source]
    flops, low = 2.0 * rows.total * s.hidden * s.inner, 2.0 * rows.total * s.rank * (s.hidden + s.inner)

    def gate_up() -> tuple[torch.Tensor, torch.Tensor]:
        ends = [Factor(products.narrow(layer.x, rows, p.a, p.scale), p.b) for p in layer.trio[:2]]
        return products.gate_up(layer.x, rows, *map(Term, (layer.gate.stack, layer.up.stack), ends))

    def halves() -> tuple[torch.Tensor, torch.Tensor]:
        parts = [plain_lora(gathered, rows, p, p.a, p.b) for p in layer.trio[:2]]
        return gate_up()[0], torch.cat(parts, 1)

    both = torch.cat([layer.gate.stack.codes, layer.up.stack.codes], 1)
    peer = _grouped_mm(gathered, both, rows)
    sheet.add("gate+up, LoRA, SwiGLU", gate_up, halves, flops=2 * (flops + low), peer=peer)
    h, d = random(rows.total, s.inner), layer.down

    def down() -> torch.Tensor:
        return products.grouped(h, own, [Term(d.stack, Factor(products.narrow(h, own, d.a, d.scale), d.b))])

    peer = _grouped_mm(h, d.stack.codes, rows)
    right = lambda: (down(), plain_lora(h, rows, d, d.a, d.b))  # noqa: E731
    sheet.add("down, LoRA", down, right, flops=flops + low, peer=peer)
    _gradient_row(sheet, layer, own, h, flops + low)
    shape_rows(sheet, s)
    _sorting_rows(sheet, layer, gathered, inverse)


def _gradient_row(sheet: Sheet, layer: Layer, own: Rows, grad: torch.Tensor, flops: float) -> None:
    gate = layer.gate

    def back() -> torch.Tensor:
        low = products.narrow(grad, own, gate.b, gate.scale, transposed=True)
        return products.grouped(grad, own, [Term(gate.stack, Factor(low, gate.a))], forward=False)

    turned = gate.stack.codes.transpose(1, 2)
    right = lambda: (  # noqa: E731
        back(),
        plain(grad, own, turned)
        + gate.scale * plain(plain(grad, own, gate.b.transpose(1, 2)), own, gate.a.transpose(1, 2)),
    )
    peer = _grouped_mm(grad, turned, own)
    sheet.add("input gradient, LoRA", back, right, flops=flops, peer=peer)


def _sorting_rows(sheet: Sheet, layer: Layer, gathered: torch.Tensor, inverse: torch.Tensor) -> None:
    s = layer.shapes
    sort = lambda: permute.sort_by_expert(layer.chosen, s.experts)  # noqa: E731
    sheet.add("sort by expert", sort, lambda: (sort()[1], inverse), 0.0, moved=40.0 * inverse.numel())
    combine = lambda: permute.combine(gathered, inverse, s.chosen)  # noqa: E731
    right = gathered.float()[inverse].reshape(-1, s.chosen, s.hidden).sum(1)
    moved = 2.0 * s.hidden * (inverse.numel() + layer.x.shape[0])
    sheet.add("combine", combine, lambda: (combine(), right), moved=moved)
    leaf, weights = gathered.float().requires_grad_(), layer.weights.clone().requires_grad_()
    wide = leaf[inverse].reshape(-1, s.chosen, s.hidden) * weights[..., None]
    wide.sum(1).backward(layer.x.float())
    back = lambda: permute.spread(layer.x, gathered, inverse, layer.weights)  # noqa: E731
    moved = 2.0 * s.hidden * (2 * inverse.numel() + layer.x.shape[0])
    sheet.add("combine, weighted, backward", back, lambda: (back()[0], leaf.grad), moved=moved)
    sheet.add("  its weights", [], lambda: (back()[1], weights.grad))


def _grouped_mm(x: torch.Tensor, stack: torch.Tensor, rows: Rows) -> tuple[str, Callable[[], Any]] | None:
    """torch's own grouped product (no LoRA, no SwiGLU), where this build has it."""
    if not CARD or "_grouped_mm" not in dir(torch):
        return None
    ends = rows.counts.cumsum(0).to(torch.int32)
    return "torch._grouped_mm", lambda: torch._grouped_mm(x, stack.transpose(1, 2), offs=ends)


def quantised_rows(sheet: Sheet, s: Shapes) -> None:
    """FP8, int8 and int4 products of the same rows, forward and input gradient, beside our own in bf16.

    What is right is the product of the numbers that the codes stand for, in fp32.
    """
    layer = Layer.make(s)
    rows, _ = layer.sorted()
    own = Rows(rows.total, rows.counts)
    x, grad = layer.x[rows.source].contiguous(), random(rows.total, s.inner)
    flops = 2.0 * rows.total * s.hidden * s.inner
    _fp8_rows(sheet, layer.gate.stack, own, (x, grad), flops)
    for bits, group in ((8, 1), (4, 64), (4, 128)):
        low = quantised(layer.gate.stack.codes, bits, group)
        for word, given in (("forward", x), ("input gradient", grad)):
            run = lambda g=given, low=low, f=word == "forward": products.grouped(g, own, [Term(low)], f)  # noqa: E731
            check = lambda run=run, g=given, low=low: (run(), _right(g, own, numbers(low)))  # noqa: E731
            name = f"int{bits} {word}" + (f", groups of {group}" if bits == 4 else "")
            sheet.add(name, run, check, 0.01, flops, peer=_in_bf16(layer.gate.stack, own, given))


def _right(x: torch.Tensor, rows: Rows, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, or x W where the width says so."""
    return plain(x, rows, weight if x.shape[1] == weight.shape[2] else weight.transpose(1, 2))


def _in_bf16(stack: Stack, own: Rows, x: torch.Tensor) -> tuple[str, Callable[[], Any]]:
    forward = x.shape[1] == stack.shape[2]
    return "our bf16", lambda: products.grouped(x, own, [Term(stack)], forward)


def _fp8_rows(
    sheet: Sheet, plain_stack: Stack, own: Rows, ends: tuple[torch.Tensor, torch.Tensor], flops: float
) -> None:
    stack = fp8.quantize_blocks(plain_stack.codes)
    weight, kind = fp8_numbers(stack.codes, stack.scale), str(ends[0].dtype).rpartition(".")[2]
    for word, given in zip(("forward", "input gradient"), ends, strict=True):
        low, forward = fp8.quantize_rows(given), word == "forward"
        run = lambda x=low, f=forward: fp8.grouped_fp8(x, own, stack, kind, None, f)  # noqa: E731
        right = lambda x=low: _right(fp8_numbers(x.codes, x.scale), own, weight)  # noqa: E731
        check = lambda run=run, right=right: (run(), right())  # noqa: E731
        peer = _in_bf16(plain_stack, own, given)
        sheet.add(f"FP8 {word}", run, check, 0.01, flops, peer=peer, fp8=True)
    x = ends[0]
    run = lambda: fp8.quantize_rows(x)  # noqa: E731
    check = lambda: (fp8_numbers(run().codes, run().scale), x)  # noqa: E731
    sheet.add("FP8 rows quantised", run, check, E4M3, moved=3.0 * x.numel())


def head_rows(sheet: Sheet, s: Shapes) -> None:
    """The cross-entropy with its gradient, and its memory beyond the results."""
    hidden, head = random(s.tokens, s.hidden), random(s.vocabulary, s.hidden, scale=s.hidden**-0.5)
    labels = torch.randint(0, s.vocabulary, (s.tokens,), device=DEVICE)
    run = lambda: cross_entropy.linear_cross_entropy(hidden, head, labels)  # noqa: E731
    few = slice(0, min(256, s.tokens))
    logits = hidden[few].float() @ head.float().T
    right = torch.nn.functional.cross_entropy(logits, labels[few], reduction="none")
    slope = torch.softmax(logits, 1)
    slope[torch.arange(slope.shape[0]), labels[few]] -= 1
    flops = 4.0 * s.tokens * s.vocabulary * s.hidden
    peer = _liger(hidden, head, labels)
    sheet.add("linear cross-entropy", run, lambda: (run()[0][few], right), 1e-4, flops, peer=peer)
    sheet.add("  its gradient", [], lambda: (run()[1][few], slope @ head.float()), 0.01)
    if CARD:
        _memory_row(run)


def _memory_row(run: Callable[[], Any]) -> None:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nll, grad = run()
    extra = (torch.cuda.max_memory_allocated() - before - nll.nbytes - grad.nbytes) / 2**20
    Sheet.put(Row("  its memory", memory=extra))


def _liger(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> Any:
    """Liger's fused linear cross-entropy, forward and backward, where it is installed."""
    if not CARD:
        return None
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    leaf = hidden.clone().requires_grad_()
    return "Liger", lambda: liger_fused_linear_cross_entropy(leaf, head, labels).backward()


def small_rows(sheet: Sheet, s: Shapes) -> None:
    """Routing, norm, rotary embedding, SwiGLU: bound by memory."""
    _route_rows(sheet, s)
    x, weight, outer = random(s.tokens, s.hidden), random(s.hidden), random(s.tokens, s.hidden)
    leaf = x.float().requires_grad_()
    right = leaf * torch.rsqrt((leaf * leaf).mean(-1, keepdim=True) + 1e-5) * weight.float()
    right.backward(outer.float())
    run = lambda: norm.rms_norm(x, weight, 1e-5)  # noqa: E731
    sheet.add("RMSNorm", run, lambda: (run()[0], right.detach()), moved=4.0 * x.numel())
    inverse = run()[1]
    back = lambda: norm.rms_norm_backward(outer, x, weight, inverse)  # noqa: E731
    sheet.add("RMSNorm backward", back, lambda: (back()[0], leaf.grad), moved=6.0 * x.numel())
    q, k = random(s.tokens, s.heads, 128), random(s.tokens, s.groups, 128)
    angles = torch.rand(s.tokens, 64, device=DEVICE)
    turn = lambda: rope.rope(q, k, angles.cos(), angles.sin())  # noqa: E731
    cos, sin = angles.cos(), angles.sin()
    even, odd = q.float()[..., ::2], q.float()[..., 1::2]
    c, n = cos[:, None], sin[:, None]
    turned = torch.stack([even * c - odd * n, odd * c + even * n], -1).reshape(q.shape)
    moved = 4.0 * (q.numel() + k.numel())
    run = lambda: rope.rope(q, k, cos, sin)  # noqa: E731
    sheet.add("rotary embedding of q, k", run, lambda: (turn()[0], turned), moved=moved)
    _swiglu_rows(sheet, s)


def _route_rows(sheet: Sheet, s: Shapes) -> None:
    logits = torch.randn(s.tokens, s.experts, device=DEVICE)
    bias, outer = torch.randn(s.experts, device=DEVICE) * 0.01, torch.randn(s.tokens, s.chosen, device=DEVICE)
    leaf = logits.clone().requires_grad_()
    probabilities = torch.softmax(leaf, 1)
    chosen = (probabilities + bias).topk(s.chosen).indices
    picked = probabilities.gather(1, chosen)
    (picked / picked.sum(1, keepdim=True) * outer).sum().backward()
    run = lambda: permute.route(logits, bias, s.chosen)  # noqa: E731
    sheet.add("route", run, lambda: (run()[1], chosen), 1e-4, moved=4.0 * logits.numel())
    weights, ids = run()
    back = lambda: permute.route_backward(outer, weights, ids, s.experts)  # noqa: E731
    sheet.add("route backward", back, lambda: (back(), leaf.grad), 1e-4, moved=4.0 * logits.numel())


def _swiglu_rows(sheet: Sheet, s: Shapes) -> None:
    halves, outer = random(s.tokens * s.chosen, 2 * s.inner), random(s.tokens * s.chosen, s.inner)
    leaf = halves.float().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    right = torch.nn.functional.silu(gate) * up
    right.backward(outer.float())
    run = lambda: activation.swiglu(halves)  # noqa: E731
    sheet.add("SwiGLU", run, lambda: (run(), right.detach()), moved=3.0 * halves.numel())
    back = lambda: activation.swiglu_backward(outer, halves)  # noqa: E731
    sheet.add("SwiGLU backward", back, lambda: (back()[0], leaf.grad), moved=5.0 * halves.numel())


def attention_rows(sheet: Sheet, s: Shapes) -> None:
    """Paged attention of one token a sequence, for the heads of 21B, 0.3B and 300B."""
    kinds = [(s.heads, s.groups), (16, 2), (64, 8)]
    for (heads, groups), batch in itertools.product(kinds, (1, 4, 16)):
        slots, moved = batch * s.context, 4.0 * batch * s.context * groups * 128
        calls = [_attention(heads, groups, batch, s.context, slots) for _ in range(turns(moved))]
        run, right = calls[0]
        check = lambda run=run, right=right: (run(), right())  # noqa: E731
        name = f"decode attention, {heads}/{groups} heads, batch {batch}"
        sheet.add(name, [call for call, _ in calls], check, moved=moved)


def _attention(heads: int, groups: int, batch: int, context: int, slots: int) -> tuple[Any, Any]:
    keys, values, q = (random(n, h, 128) for n, h in ((slots, groups), (slots, groups), (batch, heads)))
    places = torch.randperm(slots, device=DEVICE).reshape(batch, -1)
    lengths = torch.full([batch], context, dtype=torch.int32, device=DEVICE)

    def right() -> torch.Tensor:
        k, v = (t[places].float().repeat_interleave(heads // groups, 2) for t in (keys, values))
        weights = torch.einsum("bhd,bshd->bhs", q.float(), k).mul(128**-0.5).softmax(-1)
        return torch.einsum("bhs,bshd->bhd", weights, v)

    return lambda: decode.decode_attention(q, keys, values, places, lengths), right


def decode_expert_rows(sheet: Sheet, s: Shapes) -> None:
    """Few tokens: every chosen expert's weights are read once, in each stored form."""
    layer = Layer.make(s, 1)
    forms = ((16, 1), (8, 1), (4, 64), (4, 128))
    stacks = {form: [quantised(p.stack.codes, *form) for p in layer.trio] for form in forms}
    for tokens in (1, 4, 16, 32):
        for bits, group in forms:
            _decode_pair(sheet, layer, tokens, stacks[bits, group], f"{tokens} tokens, {bits} bits, {group}")


def _decode_pair(sheet: Sheet, layer: Layer, tokens: int, stacks: list[Stack], words: str) -> None:
    s, bits = layer.shapes, stacks[0].bits
    matrix = s.inner * s.hidden * bits / 8
    calls = [layer.with_tokens(tokens) for _ in range(turns(s.chosen * matrix))]
    pairs, downs, used = [], [], []
    for call in calls:
        rows, _ = call.sorted()
        h = random(rows.total, s.inner)
        used.append(int((rows.counts > 0).sum().item()))
        pairs.append(lambda x=call.x, r=rows: products.gate_up(x, r, Term(stacks[0]), Term(stacks[1])))
        own = Rows(rows.total, rows.counts)
        downs.append(lambda h=h, r=own: (products.grouped(h, r, [Term(stacks[2])]), h, r))
    rows, _ = calls[0].sorted()
    wide = calls[0].x[rows.source]
    both = lambda: (pairs[0]()[0], torch.cat([plain(wide, rows, numbers(w)) for w in stacks[:2]], 1))  # noqa: E731
    moved = sum(used) / len(used) * matrix
    sheet.add(f"decode gate+up, {words}", pairs, both, moved=2 * moved)

    def down() -> tuple[torch.Tensor, torch.Tensor]:
        y, h, own = downs[0]()
        return y, plain(h, own, numbers(stacks[2]))

    sheet.add(f"decode down, {words}", downs, down, moved=moved)
