"""The C of a training step beside attention: low-rank products, norm, activation, rotation, experts."""

from __future__ import annotations

from collections.abc import Callable

import ernietune_kernels as kernels
import numpy as np
import paddle
import pytest
from ernietune_kernels import grouped_gemm, reference
from ernietune_kernels.cpu import blas, library, lowrank, pointwise

TOLERANCE = 5e-6  # of the largest number


@pytest.fixture(autouse=True)
def built() -> library.Library:
    found = library.kernels()
    if found is None:
        pytest.skip("there is no C compiler")
    assert pointwise._checked() is found
    assert lowrank._checked() is found
    return found


def tensor(*shape: int, seed: int = 0, trains: bool = True) -> paddle.Tensor:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    return paddle.to_tensor(values, stop_gradient=not trains)


Operation = Callable[..., paddle.Tensor]


def same(fast: Operation, plain: Operation, inputs: list[paddle.Tensor]) -> None:
    """Values, and gradients of what trains, of the plain form computed in float64."""
    doubles = [paddle.to_tensor(x.numpy().astype(np.float64), stop_gradient=x.stop_gradient) for x in inputs]
    found, wanted = fast(*inputs), plain(*doubles)
    weights = tensor(*found.shape, seed=9, trains=False)
    (found * weights).sum().backward()
    (wanted * weights.astype("float64")).sum().backward()
    pairs = [(found, wanted)]
    for x, double in zip(inputs, doubles, strict=True):
        assert (x.grad is None) == x.stop_gradient
        pairs += [] if x.stop_gradient else [(x.grad, double.grad)]
    for one, other in pairs:
        scale = max(0.1, float(other.abs().max()))
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("rank", [1, 3, 8, 17])
@pytest.mark.parametrize("counts", [[300], [0, 129, 1, 0, 5], [128, 64, 0, 3, 0]])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (37, 70), (7, 130)])
def test_low_rank_products(rank: int, counts: list[int], inputs: int, outputs: int) -> None:
    rows, experts = sum(counts), len(counts)
    given = [
        tensor(rows, inputs),
        tensor(experts, outputs, inputs, seed=1, trains=False),
        tensor(experts, rank, inputs, seed=2),
        tensor(experts, outputs, rank, seed=3),
    ]
    if experts == 1:
        given[1:] = [paddle.to_tensor(x[0].numpy(), stop_gradient=x.stop_gradient) for x in given[1:]]
        same(lambda *x: kernels.lora_linear(*x, 0.7), lambda *x: reference.lora_linear(*x, 0.7), given)
        return
    same(
        lambda *x: kernels.grouped_lora_linear(*x, 0.7, counts),
        lambda *x: reference.grouped_lora_linear(*x, 0.7, counts),
        given,
    )


@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_frozen_inputs_of_low_rank_products(frozen: int) -> None:
    given = [tensor(9, 20), tensor(30, 20, trains=False), tensor(4, 20), tensor(30, 4)]
    given[frozen].stop_gradient = True
    same(lambda *x: kernels.lora_linear(*x, 2.0), lambda *x: reference.lora_linear(*x, 2.0), given)


def test_the_compiled_forms_are_the_ones_in_use() -> None:
    x = tensor(6, 16)
    assert kernels.rms_norm(x, tensor(16, trains=False), 1e-5).grad_fn.name().endswith("_CompiledRMSNorm")
    assert kernels.swiglu(x, x).grad_fn.name().endswith("_CompiledSwiglu")
    counts, w, factors = [2, 4], tensor(2, 5, 16, trains=False), (tensor(2, 3, 16), tensor(2, 5, 3))
    output = kernels.grouped_lora_linear(x, w, *factors, 1.0, counts)
    assert output.grad_fn.name().endswith("_CompiledLoRA")


@pytest.mark.parametrize("shape", [(1, 16), (9, 50), (2, 3, 100)])
def test_norm(shape: tuple[int, ...]) -> None:
    given = [tensor(*shape), tensor(shape[-1], seed=1, trains=False)]
    same(lambda *x: kernels.rms_norm(*x, 1e-5), lambda *x: reference.rms_norm(*x, 1e-5), given)


def test_a_norm_that_trains_takes_the_plain_path() -> None:
    given = [tensor(9, 50), tensor(50, seed=1)]
    same(lambda *x: kernels.rms_norm(*x, 1e-5), lambda *x: reference.rms_norm(*x, 1e-5), given)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 64)])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_swiglu(shape: tuple[int, ...], size: float) -> None:
    gate = paddle.to_tensor((tensor(*shape) * size).numpy(), stop_gradient=False)
    same(kernels.swiglu, reference.swiglu, [gate, tensor(*shape, seed=1)])


@pytest.mark.parametrize("width", [2, 16, 80, 128])
def test_rotation(width: int) -> None:
    angles = np.random.default_rng(1).uniform(0, 100, (9, width // 2)).astype(np.float32)
    cos, sin = paddle.to_tensor(np.cos(angles)), paddle.to_tensor(np.sin(angles))
    same(
        lambda x: kernels.apply_rope(x, cos, sin),
        lambda x: _rotated(x, cos.astype("float64"), sin.astype("float64")),
        [tensor(9, 3, width)],
    )


def _rotated(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """`reference.apply_rope` in float64, which it would leave for fp32."""
    even, odd = x[:, :, ::2], x[:, :, 1::2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("forward", [True, False])
def test_products_of_experts_are_those_of_paddle(forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, stack = [3, 0, 40, 1], tensor(4, 10, 24, trains=False)
    x = tensor(44, 24 if forward else 10, trains=False)
    views = grouped_gemm.expert_views(stack)
    found = grouped_gemm.expert_products(x, stack, counts, views, forward)
    if blas.grouped_product(x, stack, counts, forward) is None:
        pytest.skip("Paddle has another BLAS here")
    monkeypatch.setattr(blas, "grouped_product", lambda *_: None)
    plain = grouped_gemm.expert_products(x, stack, counts, views, forward)
    np.testing.assert_allclose(found.numpy(), plain.numpy(), rtol=0, atol=1e-5)


def test_bits_do_not_depend_on_threads(built: library.Library) -> None:
    parallel = library._parallel()
    if parallel is None:
        pytest.skip("Paddle has no OpenMP here")
    counts, results = [2400, 0, 600], []  # more than one thread does alone
    x, a, b = (tensor(*shape, trains=False) for shape in ((3000, 40), (3, 8, 40), (3, 90, 8)))
    gradient = tensor(3000, 90, seed=4, trains=False)
    try:
        for threads in (1, 2, 5):
            built.c.ernie_threads(parallel, threads)
            y, grad_x = paddle.zeros([3000, 90]), paddle.zeros([3000, 40])
            narrow = lowrank.add(built, x, a, b, 0.5, counts, y)
            back = lowrank.gradients(built, (x, a, b, narrow), 0.5, counts, gradient, grad_x)
            activation = pointwise.swiglu(built, gradient, y)
            results.append([t.numpy() for t in (y, narrow, *back, grad_x, activation)])
    finally:
        built.c.ernie_threads(parallel, built.threads)
    for other in results[1:]:
        for one, same_one in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, same_one)
