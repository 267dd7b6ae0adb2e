"""Frozen weights in codes: the numbers they stand for, worked out in float64, and the products both ways."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import paddle
import pytest
from ernietune_kernels import fp8, frozen, linear_cross_entropy, nf4, quantized
from ernietune_kernels.fp8 import Fp8Stack, Fp8Weight
from ernietune_kernels.frozen import FrozenWeight
from ernietune_kernels.quantized import QuantizedWeight

import ernietune  # noqa: F401  (sets the environment before paddle)

FORMS = ("bfloat16", "int8", "int4", "nf4", "fp8")
EXACT = [form for form in FORMS if form != "fp8"]
COUNTS = [3, 0, 9, 1]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def stored(values: np.ndarray, form: str) -> FrozenWeight:
    if form == "bfloat16":
        return FrozenWeight(paddle.to_tensor(values).astype("bfloat16"))
    if form == "nf4":
        codes, scale = nf4.codes_of(values, 64)
        return FrozenWeight(nf4.Nf4Weight(paddle.to_tensor(codes), paddle.to_tensor(scale), 64, values.shape))
    if form == "fp8":
        matrices = values.reshape([-1, *values.shape[-2:]])
        stacks = tuple(fp8.quantize_blocks(paddle.to_tensor(m[None])) for m in matrices)
        return FrozenWeight(Fp8Weight(stacks, values.shape))
    return FrozenWeight(quantized.quantize(values, int(form[3:]), 64))


def e4m3(bits: np.ndarray) -> np.ndarray:
    """What the bits of e4m3 numbers say: sign, four bits of exponent (bias 7), three of mantissa."""
    bits = bits.astype(np.int64) & 255
    exponent, mantissa = bits >> 3 & 15, bits & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(bits >> 7, -1, 1) * np.where(exponent, normal, mantissa / 8 * 2.0**-6)


def nibbles(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes & 15, codes >> 4], -1).reshape([*codes.shape[:-1], -1])


def truth(weight: FrozenWeight) -> np.ndarray:
    """float64 numbers from codes and scales, by the contract of each form."""
    held = weight.weight
    if isinstance(held, Fp8Weight):
        return np.concatenate([_fp8_truth(stack) for stack in held.matrices]).reshape(held.shape)
    if isinstance(held, nf4.Nf4Weight):
        spread = np.repeat(held.scale.numpy().astype(np.float64), 64, -1)
        return nf4.LEVELS.astype(np.float64)[nibbles(held.codes.numpy())] * spread
    if isinstance(held, QuantizedWeight):
        scale = held.scale.numpy().astype(np.float64)
        if held.bits == 8:
            return held.codes.numpy().astype(np.float64) * scale[..., None]
        return (nibbles(held.codes.numpy()) - 8.0) * np.repeat(scale, held.group, -1)
    return (held.numpy().astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _fp8_truth(stack: Fp8Stack) -> np.ndarray:
    codes, scale = e4m3(stack.codes.numpy()), stack.scale.numpy().astype(np.float64)
    spread = np.repeat(np.repeat(scale, 128, 1), 128, 2)
    return codes * spread[:, : codes.shape[1], : codes.shape[2]]


def rounded(rows: np.ndarray, form: str) -> np.ndarray:
    """What FP8 makes of rows or gradients; other forms leave them alone."""
    if form != "fp8":
        return rows.astype(np.float64)
    found = fp8.quantize_rows(paddle.to_tensor(rows))
    scale = np.repeat(found.scale.numpy().astype(np.float64), 128, -1)
    return e4m3(found.codes.numpy()) * scale[:, : rows.shape[1]]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def both_ways(weight: FrozenWeight, x: np.ndarray, counts: list[int] | None) -> tuple[np.ndarray, ...]:
    rows = paddle.to_tensor(x)
    rows.stop_gradient = False
    y = weight.product(rows) if counts is None else weight.grouped(rows, counts)
    grad = numbers(*y.shape, seed=7)
    (y * paddle.to_tensor(grad)).sum().backward()
    return y.numpy(), grad, rows.grad.numpy()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_products_and_gradients_of_a_matrix(
    form: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(frozen, "kernels", lambda: None)
    weight, x = stored(numbers(200, 192), form), numbers(5, 192, seed=1)
    y, grad, back = both_ways(weight, x, None)
    close(y, rounded(x, form) @ truth(weight).T)
    close(back, rounded(grad, form) @ truth(weight))


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_and_gradients_of_experts(form: str, counts: list[int]) -> None:
    weight, x = stored(numbers(4, 40, 192), form), numbers(sum(counts), 192, seed=1)
    y, grad, back = both_ways(weight, x, counts)
    assert y.shape == (sum(counts), 40)
    ends = np.cumsum([0, *counts])
    for e, matrix in enumerate(truth(weight)):
        rows = slice(ends[e], ends[e + 1])
        if counts[e]:
            close(y[rows], rounded(x, form)[rows] @ matrix.T)
            close(back[rows], rounded(grad, form)[rows] @ matrix)


def test_nf4_levels_are_the_quantiles_that_qlora_names() -> None:
    """Eight steps above and seven below zero, evenly spaced in probability, scaled to end at 1."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(nf4.LEVELS, levels / levels.max(), atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_how_far_codes_are_from_the_weights(form: str) -> None:
    """Block by block: half a step of the widest gap between codes, of the block's largest magnitude."""
    values = numbers(256, 256) * np.repeat([[1.0, 30.0]], 128, -1).astype(np.float32)
    error = np.abs(truth(stored(values, form)) - values)
    if form == "bfloat16":
        assert (error <= np.abs(values) * 2.0**-8).all()
    elif form == "fp8":  # three bits of mantissa; below 2^-6 of the scale, steps of 2^-9
        blocks = np.abs(values).reshape(2, 128, 2, 128).max((1, 3), keepdims=True)
        least = np.broadcast_to(blocks / 448 * 2.0**-10, (2, 128, 2, 128)).reshape(256, 256)
        assert (error <= np.maximum(np.abs(values) * 2.0**-4, least) * 1.0001).all()
    else:
        group = 256 if form == "int8" else 64
        largest = np.abs(values).reshape(256, -1, group).max(-1)
        # int4's codes end at +7 of 8, NF4's widest gap is the last one below 0.
        share = {"int8": 1 / 254, "int4": 1 / 8, "nf4": (1 - 0.69619) / 2}[form]
        assert (error <= np.repeat(largest, group, -1) * share * 1.0001).all()
    assert error.max() > 0


@pytest.mark.parametrize("frozen_rows", [True, False])
def test_nothing_is_kept_for_rows_that_take_no_gradient(frozen_rows: bool) -> None:
    x = paddle.to_tensor(numbers(2, 64))
    x.stop_gradient = frozen_rows
    assert stored(numbers(8, 64), "int8").product(x).stop_gradient == frozen_rows


@pytest.mark.parametrize("form", FORMS)
def test_bytes(form: str) -> None:
    expected = {
        "bfloat16": 2 * 4 * 40 * 192,
        "int8": 4 * 40 * (192 + 4),
        "int4": 4 * 40 * (96 + 4 * 3),
        "nf4": 4 * 40 * (96 + 4 * 3),
        "fp8": 4 * (40 * 192 + 4 * 2),
    }
    assert stored(numbers(4, 40, 192), form).nbytes == expected[form]


def test_a_head_in_bfloat16_is_widened_for_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from ernietune_kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 7 * 16)
    head = paddle.to_tensor(numbers(50, 16)).astype("bfloat16")
    labels, found = paddle.to_tensor(np.arange(6) * 8), []
    for weight in (head, head.astype("float32")):
        hidden = paddle.to_tensor(numbers(6, 16, seed=1))
        hidden.stop_gradient = False
        losses = linear_cross_entropy(hidden, weight, labels, 4)
        losses.sum().backward()
        with paddle.no_grad():
            alone = linear_cross_entropy(hidden, weight, labels, 4)
        found.append(np.concatenate([losses.numpy(), alone.numpy(), hidden.grad.numpy().ravel()]))
    np.testing.assert_allclose(found[0], found[1], atol=2e-6)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("counts", [None, COUNTS], ids=str)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_the_triton_kernels_compute_the_same(form: str, counts: list[int] | None, forward: bool) -> None:
    pytest.importorskip("triton")
    weight = stored(numbers(*([4] * (counts is not None)), 128, 192), form)
    x = paddle.to_tensor(numbers(13, 192 if forward else 128, seed=1))
    found = frozen.fused.frozen_product(x, weight.weight, counts, forward)
    assert found is not None
    expected = weight.times(x, counts, forward).numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
def test_forms_without_a_kernel_say_so(form: str) -> None:
    pytest.importorskip("triton")
    weight = stored(numbers(8, 64), form)
    assert frozen.fused.frozen_product(paddle.to_tensor(numbers(2, 64)), weight.weight, None, True) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_fused_experts_read_codes(bits: int) -> None:
    """Gate, up and down in codes with adapters, through the fused operation, in the interpreter."""
    pytest.importorskip("triton")
    from ernietune_kernels import fused_experts, permute, swiglu, unpermute

    leaves = [paddle.to_tensor(numbers(*shape, seed=s)) for s, shape in enumerate([(6, 64), (6, 2)])]
    experts = paddle.to_tensor(np.stack([np.random.default_rng(t).permutation(4)[:2] for t in range(6)]))
    layers = []
    for seed, (outputs, inputs) in enumerate([(32, 64), (32, 64), (64, 32)]):
        weight = quantized.quantize(numbers(4, outputs, inputs, seed=seed), bits, 32)
        a, b = (paddle.to_tensor(numbers(4, *s, seed=9)) for s in ((3, inputs), (outputs, 3)))
        leaves += [a, b]
        layers.append(fused_experts.ExpertFactors(weight, a, b, 0.5))
    for leaf in leaves:
        leaf.stop_gradient = False
    x, weights = leaves[:2]

    def apart(rows: paddle.Tensor, part: fused_experts.ExpertFactors, counts: list[int]) -> paddle.Tensor:
        from ernietune_kernels import grouped_linear

        narrow = grouped_linear(rows, part.a, counts) * part.scale
        return FrozenWeight(part.weight).grouped(rows, counts) + grouped_linear(narrow, part.b, counts)

    found = []
    for fusing in (True, False):
        if fusing:
            y = fused_experts.routed_experts(x, weights, experts, *layers)
        else:
            rows, plan = permute(x, experts, 4)
            inner = swiglu(*(apart(rows, part, plan.counts) for part in layers[:2]))
            y = unpermute(apart(inner, layers[2], plan.counts), weights, plan)
        (y * y).sum().backward()
        found.append([y.numpy(), *(leaf.grad.numpy().copy() for leaf in leaves)])
        for leaf in leaves:
            leaf.clear_gradient()
    for mine, plain in zip(*found, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=0, atol=2e-5 * np.abs(plain).max())
