"""FP8: the plain emulation against numbers worked out by hand, and the kernels against the emulation."""

from __future__ import annotations

import pytest

import ernietune  # noqa: F401  (sets the environment before paddle)

pytest.importorskip("triton")

import numpy as np
import paddle
from ernietune_kernels import fp8 as plain
from ernietune_kernels import fused, reference
from ernietune_kernels.gpu import fp8, products
from ernietune_kernels.gpu.products import Factor, Rows
from paddle import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return paddle.to_tensor(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


def bits(codes: Tensor) -> np.ndarray:
    return codes.numpy().view(np.uint8)


def test_codes_and_scales_worked_out_by_hand() -> None:
    x = np.zeros([2, 130], np.float32)
    x[0, 0], x[0, 1], x[0, 128], x[1, 129] = 896.0, 1.0, -0.5, 448.0
    rows = plain.quantize_rows(paddle.to_tensor(x))
    # 896 / 448 = 2; a block of zeros has scale 1; 0.5 / 448 is the block's own scale.
    np.testing.assert_allclose(rows.scale.numpy(), [[2.0, 0.5 / 448], [1.0, 1.0]], rtol=1e-7)
    values = rows.codes.astype("float32").numpy()
    assert values[0, 0] == 448.0
    assert values[0, 1] == 0.5
    assert values[0, 128] == -448.0
    assert values[1, 129] == 448.0
    np.testing.assert_allclose(plain.dequantize_rows(rows).numpy(), x, rtol=1e-6)


def test_rounding_is_to_the_nearest_of_three_bits_and_never_nan() -> None:
    x = paddle.to_tensor(np.array([1.06, 1.07, 470.0, 1e9, -470.0, 2**-10, 0.0], np.float32))
    # e4m3 has steps of 1/8 at 1, its smallest number is 2^-9, and half of that rounds to even, which is 0.
    np.testing.assert_array_equal(
        plain.to_e4m3(x).astype("float32").numpy(), [1, 1.125, 448, 448, -448, 0, 0]
    )


def test_blocks_of_a_weight_have_their_own_scale() -> None:
    w = np.ones([1, 200, 130], np.float32)
    w[0, 128:, :128] = 8
    stack = plain.quantize_blocks(paddle.to_tensor(w))
    np.testing.assert_allclose(stack.scale.numpy() * 448, [[[1, 1], [8, 1]]], rtol=1e-6)
    np.testing.assert_allclose(plain.dequantize_blocks(stack).numpy(), w, rtol=1e-6)


def test_error_of_a_product_against_fp64() -> None:
    """e4m3 keeps three bits: each factor is off by up to 1/16, by 2.6 % on average over a product's terms."""
    x, w = random(64, 512), random(1, 96, 512, seed=1)
    found = paddle.matmul(
        plain.dequantize_rows(plain.quantize_rows(x)),
        plain.dequantize_blocks(plain.quantize_blocks(w))[0],
        transpose_y=True,
    )
    truth = x.numpy().astype(np.float64) @ w[0].numpy().T.astype(np.float64)
    error = np.sqrt(((found.numpy() - truth) ** 2).mean() / (truth**2).mean())
    assert 0.01 < error < 0.05


@pytest.mark.parametrize("width", [128, 200])
def test_kernels_make_the_same_codes(width: int) -> None:
    x, w = random(5, width) * 3, random(2, 256, width, seed=1)
    for found, truth in (
        (fp8.quantize_rows(x), plain.quantize_rows(x)),
        (fp8.quantize_blocks(w), plain.quantize_blocks(w)),
    ):
        np.testing.assert_allclose(found.scale.numpy(), truth.scale.numpy(), rtol=1e-6)
        # A quotient within one fp32 step of a rounding border may fall to either side.
        assert (bits(found.codes) != bits(truth.codes)).mean() < 1e-4


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("counts", [[0, 3, 1], [17, 0, 2]], ids=str)
def test_products_equal_the_emulation(counts: list[int], lora: bool) -> None:
    x, grad, w = random(sum(counts), 200), random(sum(counts), 256, seed=1), random(3, 256, 200, seed=2)
    rows = Rows(sum(counts), paddle.to_tensor(np.array(counts, np.int32)))
    stack, x8, grad8 = plain.quantize_blocks(w), plain.quantize_rows(x), plain.quantize_rows(grad)
    values = plain.dequantize_blocks(stack)
    truth = reference.grouped_linear(plain.dequantize_rows(x8), values, counts)
    back = reference.grouped_linear(plain.dequantize_rows(grad8), values.transpose([0, 2, 1]), counts)
    factors: list[Factor | None] = [None, None]
    if lora:
        a, b = random(3, 4, 200, seed=3), random(3, 256, 4, seed=4)
        narrow = products.narrow(x, rows, a, 0.5)
        narrow_back = products.narrow(grad, rows, b, 0.5, transposed=True)
        factors = [Factor(narrow, b), Factor(narrow_back, a)]
        truth = truth + reference.grouped_linear(narrow, b, counts)
        back = back + reference.grouped_linear(narrow_back, a.transpose([0, 2, 1]), counts)
    packed = fp8.Fp8(stack.codes, stack.scale)
    for operand, expected, factor, forward in (
        (x8, truth, factors[0], True),
        (grad8, back, factors[1], False),
    ):
        quantised = fp8.Fp8(operand.codes, operand.scale)
        found = fp8.grouped_fp8(quantised, rows, packed, "float32", factor, forward)
        scale = np.abs(expected.numpy()).max()
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=5e-6 * scale)


@pytest.mark.parametrize("shape", [(2, 256, 200), (1, 128, 384)], ids=str)
def test_a_turned_stack_has_the_same_codes_and_scales(shape: tuple[int, int, int]) -> None:
    stack = plain.quantize_blocks(random(*shape))
    turned = fp8.turned(fp8.Fp8(stack.codes, stack.scale))
    np.testing.assert_array_equal(bits(turned.codes), bits(stack.codes).transpose(0, 2, 1))
    np.testing.assert_array_equal(turned.scale.numpy(), stack.scale.numpy().transpose(0, 2, 1))


@pytest.mark.parametrize("forward", [True, False])
def test_matrices_that_lie_apart_are_one_grouped_product(forward: bool) -> None:
    """What a frozen layer has: every expert's matrix in memory of its own."""
    counts = [2, 0, 5]
    w = random(3, 256, 200)
    matrices = tuple(plain.quantize_blocks(w[e : e + 1]) for e in range(3))
    weight = plain.Fp8Weight(matrices, (3, 256, 200))
    x = random(7, 200 if forward else 256, seed=1)
    found = fused.frozen_product(x, weight, counts, forward)
    values = paddle.concat([plain.dequantize_blocks(m) for m in matrices])
    values = values if forward else values.transpose([0, 2, 1])
    truth = reference.grouped_linear(plain.dequantize_rows(plain.quantize_rows(x)), values, counts)
    np.testing.assert_allclose(found.numpy(), truth.numpy(), atol=5e-6 * np.abs(truth.numpy()).max())
