"""Grouped products, routing and the whole expert layer in Triton's interpreter, against the plain form."""

from __future__ import annotations

from dataclasses import replace

import pytest

import ernietune  # noqa: F401  (sets the environment before paddle)

pytest.importorskip("triton")

import numpy as np
import paddle
from ernietune_kernels import permute as plain_permute
from ernietune_kernels import reference, unpermute
from ernietune_kernels.gpu import experts, permute, products
from ernietune_kernels.gpu.products import Factor, Rows, Term
from ernietune_kernels.gpu.stacks import Stack
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import Tensor

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2}
MEDIUM = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2}


def random(*shape: int, seed: int = 0, gradient: bool = False) -> Tensor:
    tensor = paddle.to_tensor(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))
    tensor.stop_gradient = not gradient
    return tensor


def close(found: Tensor, truth: Tensor, tolerance: float = 5e-6) -> None:
    """Equal up to `tolerance` of the largest value."""
    expected = truth.numpy()
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * scale)


def int32(values: list[int]) -> Tensor:
    return paddle.to_tensor(np.array(values, np.int32))


def pack_int4(values: np.ndarray) -> np.ndarray:
    codes = (values + 8).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def stored(bits: int, shape: tuple[int, int, int], seed: int = 0) -> tuple[Stack, Tensor]:
    """A stack in a storage form and the values it stands for."""
    experts_, outputs, inputs = shape
    rng = np.random.default_rng([seed, *shape])
    if bits == 16:
        values = rng.standard_normal(shape).astype(np.float32)
        return Stack(paddle.to_tensor(values)), paddle.to_tensor(values)
    if bits == 8:
        codes = rng.integers(-127, 128, shape).astype(np.int8)
        scale = rng.uniform(0.001, 0.01, (experts_, outputs)).astype(np.float32)
        return (
            Stack(paddle.to_tensor(codes), paddle.to_tensor(scale), 8),
            paddle.to_tensor(codes * scale[..., None]),
        )
    group = 8
    codes = rng.integers(-8, 8, shape)
    scale = rng.uniform(0.01, 0.1, (experts_, outputs, inputs // group)).astype(np.float32)
    values = (codes * np.repeat(scale, group, -1)).astype(np.float32)
    return Stack(paddle.to_tensor(pack_int4(codes)), paddle.to_tensor(scale), 4, group), paddle.to_tensor(
        values
    )


COUNTS = [[0, 5, 0, 1, 20], [18, 0, 0, 0, 0], [1, 0, 0, 0, 0], [3, 4, 5, 6, 7]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_grouped_products(counts: list[int], bits: int, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty experts, single rows, all rows to one, part-filled tiles; forward and input gradient."""
    monkeypatch.setattr(products, "LARGE", SMALL if lora else MEDIUM)
    monkeypatch.setattr(products, "FEW_ROWS", 0)
    monkeypatch.setattr(products, "NARROW", {"BLOCK_M": 16, "BLOCK_K": 16})
    stack, values = stored(bits, (5, 40, 24))
    rows = Rows(sum(counts), int32(counts))
    x, grad = random(sum(counts), 24), random(sum(counts), 40, seed=1)
    a, b = random(5, 3, 24, seed=2), random(5, 40, 3, seed=3)
    truth = reference.grouped_linear(x, values, counts)
    back = reference.grouped_linear(grad, values.transpose([0, 2, 1]), counts)
    factors: list[Factor | None] = [None, None]
    if lora:
        truth = reference.grouped_lora_linear(x, values, a, b, 0.5, counts)
        narrow_x = products.narrow(x, rows, a, 0.5)
        narrow_grad = products.narrow(grad, rows, b, 0.5, transposed=True)
        close(narrow_x, 0.5 * reference.grouped_linear(x, a, counts))
        close(narrow_grad, 0.5 * reference.grouped_linear(grad, b.transpose([0, 2, 1]), counts))
        low_rank = reference.grouped_linear(narrow_grad, a.transpose([0, 2, 1]), counts)
        back = back + low_rank
        factors = [Factor(narrow_x, b), Factor(narrow_grad, a)]
    close(products.grouped(x, rows, [Term(stack, factors[0])]), truth)
    close(products.grouped(grad, rows, [Term(stack, factors[1])], forward=False), back)


def test_a_dense_layer_is_one_expert_and_few_rows_stream() -> None:
    stack, values = stored(4, (1, 72, 64))
    x = random(3, 64)
    close(
        products.grouped(x, Rows(3, int32([3])), [Term(stack)]), paddle.matmul(x, values[0], transpose_y=True)
    )


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_32_rows_stream_the_stacks(bits: int) -> None:
    """Decoding's largest batch: an expert has more rows than a tile, another none."""
    counts, x = [20, 0, 12], random(32, 64)
    rows = Rows(32, int32(counts))
    assert rows.total <= products.FEW_ROWS * rows.experts
    (gate, first), (up, second) = (stored(bits, (3, 40, 64), seed=s) for s in (1, 2))
    close(products.grouped(x, rows, [Term(gate)]), reference.grouped_linear(x, first, counts))
    halves, h = products.gate_up(x, rows, Term(gate), Term(up))
    truths = [reference.grouped_linear(x, values, counts) for values in (first, second)]
    close(halves, paddle.concat(truths, 1))
    close(h, reference.swiglu(*truths), 1e-5)


def test_factor_gradients_sum_over_the_rows_of_an_expert() -> None:
    counts = [0, 3, 30, 0]
    rows, narrow, x = Rows(33, int32(counts)), random(33, 3), random(33, 50, seed=1)
    found = products.outer(narrow, x, rows, 40, first=10)
    turned = products.outer(narrow, x, rows, 40, transposed=True, first=10)
    starts = np.cumsum([0, *counts])
    for e, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        truth = narrow.numpy()[start:end].T @ x.numpy()[start:end, 10:]
        np.testing.assert_allclose(found[e].numpy(), truth, atol=2e-5)
        np.testing.assert_allclose(turned[e].numpy(), truth.T, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.sampled_from([(4, 2), (5, 3), (64, 6)]), st.integers(0, 1000))
def test_routing_equals_the_reference(tokens: int, sizes: tuple[int, int], seed: int) -> None:
    count, k = sizes
    logits = random(tokens, count, seed=seed)
    bias = random(count, seed=seed) * 0.1
    weights, chosen = permute.route(logits, bias, k)
    truth_weights, truth_chosen = reference.route(logits, bias, k)
    np.testing.assert_array_equal(chosen.numpy(), truth_chosen.numpy())
    close(weights, truth_weights, 1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 30), st.sampled_from([(4, 2), (64, 6)]), st.integers(0, 1000), st.booleans())
def test_sorting_is_stable_and_comes_back(tokens: int, sizes: tuple[int, int], seed: int, one: bool) -> None:
    count, k = sizes
    rng = np.random.default_rng(seed)
    choices = np.stack([rng.permutation(count)[:k] for _ in range(tokens)])
    chosen = paddle.to_tensor(np.broadcast_to(choices[:1], choices.shape).copy() if one else choices)
    permute_block, permute.SORT_BLOCK = permute.SORT_BLOCK, 16
    try:
        order, inverse, counts = permute.sort_by_expert(chosen, count)
    finally:
        permute.SORT_BLOCK = permute_block
    flat = chosen.numpy().reshape(-1)
    np.testing.assert_array_equal(order.numpy(), np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(order.numpy()[inverse.numpy()], np.arange(flat.size))
    np.testing.assert_array_equal(counts.numpy(), np.bincount(flat, minlength=count))
    x, weights = random(tokens, 12, seed=seed), random(tokens, k, seed=seed)
    rows, plan = plain_permute(x, chosen, count)
    close(permute.combine(rows, inverse, k, weights), unpermute(rows, weights, plan))


def _plain(x: Tensor, weights: Tensor, chosen: Tensor, layers: list[tuple[Tensor, ...]]) -> Tensor:
    rows, plan = plain_permute(x, chosen, layers[0][0].shape[0])
    gate, up, down = (
        (lambda value, layer=layer: reference.grouped_lora_linear(value, *layer, 0.5, plan.counts))
        if len(layer) == 3
        else (lambda value, layer=layer: reference.grouped_linear(value, *layer, plan.counts))
        for layer in layers
    )
    return unpermute(down(reference.swiglu(gate(rows), up(rows))), weights, plan)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("tokens", "small"), [(1, False), (9, False), (14, True)])
@pytest.mark.parametrize("adapted", ["all", "none", "down"])
def test_the_expert_layer_and_every_gradient(
    tokens: int, small: bool, skewed: bool, adapted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(products, "LARGE", MEDIUM)
        monkeypatch.setattr(products, "FEW_ROWS", 1)
    count, k, width, inner, rank = 6, 3, 24, 40, 4
    shapes = [(inner, width), (inner, width), (width, inner)]
    names = ["gate", "up", "down"]
    layers = []
    for name, (outputs, inputs) in zip(names, shapes, strict=True):
        seed = names.index(name)
        layer = [random(count, outputs, inputs, seed=seed)]
        if adapted in ("all", name):
            layer += [
                random(count, rank, inputs, seed=seed, gradient=True),
                random(count, outputs, rank, seed=seed, gradient=True),
            ]
        layers.append(tuple(layer))
    x, weights = random(tokens, width, gradient=True), random(tokens, k, seed=5, gradient=True)
    rng = np.random.default_rng(0)
    choices = [np.arange(k) if skewed else rng.permutation(count)[:k] for _ in range(tokens)]
    chosen, outer = paddle.to_tensor(np.stack(choices)), random(tokens, width, seed=9)
    truth = _plain(x, weights, chosen, layers)
    (truth * outer).sum().backward()
    projections = [
        experts.Projection(Stack(layer[0]), *(f.detach() for f in layer[1:]), scale=0.5) for layer in layers
    ]
    placement = experts.by_choice(chosen, count)
    y, saved = experts.forward(x.detach(), weights.detach(), placement, *projections)
    again = experts.backward(outer, replace(saved, h=None), *projections)
    found = experts.backward(outer, saved, *projections)
    assert (again.x == found.x).all()
    for one, other in zip(again.adapters, found.adapters, strict=True):
        assert all((a == b).all() for a, b in zip(one or (), other or (), strict=True))
    close(y, truth)
    close(found.x, x.grad, 1e-5)
    close(found.weights, weights.grad, 1e-5)
    for layer, pair in zip(layers, found.adapters, strict=True):
        assert (pair is None) == (len(layer) == 1)
        for factor, gradient in zip(layer[1:], pair or (), strict=True):
            close(gradient, factor.grad, 1e-5)


def test_a_projection_without_a_is_one_without_adapter() -> None:
    stack, _ = stored(16, (2, 8, 8))
    adapted = experts.Projection(stack, random(2, 2, 8), random(2, 8, 2))
    with pytest.raises(AssertionError):
        experts.forward(
            random(1, 8),
            random(1, 1),
            experts.by_choice(paddle.zeros([1, 1], "int64"), 2),
            adapted,
            replace(adapted, a=None),
            adapted,
        )
