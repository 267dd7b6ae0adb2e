"""Attention in C against float64, and against the plain path of the same operation."""

from __future__ import annotations

import logging

import ernietune_kernels as kernels
import numpy as np
import paddle
import pytest
from ernietune_kernels import block_attention
from ernietune_kernels.cpu import attention as compiled
from ernietune_kernels.cpu import library

TOLERANCE = 1e-5  # of the largest number


@pytest.fixture(autouse=True)
def built() -> library.Library:
    found = compiled._checked()
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def tensor(array: np.ndarray, trains: bool = True) -> paddle.Tensor:
    return paddle.to_tensor(array, stop_gradient=not trains)


def truth(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, gradient: np.ndarray, seen: np.ndarray
) -> list[np.ndarray]:
    """Output and gradients in float64, one query at a time; `seen` is bool [queries, keys]."""
    q, k, v, gradient = (x.astype(np.float64) for x in (q, k, v, gradient))
    repeat, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    output, grad_q, grad_k, grad_v = (np.zeros_like(x) for x in (q, q, k, v))
    for i in range(len(q)):
        keys = np.flatnonzero(seen[i])
        for h in range(q.shape[1]):
            g = h // repeat
            scores = k[keys, g] @ q[i, h] * scale
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            output[i, h] = weights @ v[keys, g]
            slopes = v[keys, g] @ gradient[i, h]
            slopes = weights * (slopes - weights @ slopes) * scale
            grad_q[i, h] = slopes @ k[keys, g]
            grad_k[keys, g] += np.outer(slopes, q[i, h])
            grad_v[keys, g] += np.outer(weights, gradient[i, h])
    return [output, grad_q, grad_k, grad_v]


def close(found: paddle.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=TOLERANCE * max(0.1, np.abs(wanted).max()))


def packed(*lengths: int) -> np.ndarray:
    return np.repeat(np.cumsum(lengths), lengths)


def pair(prompt: int, chosen: int, rejected: int) -> np.ndarray:
    """[prompt][chosen][the prompt's last token again and the rejected answer], as in data/pairs.py."""
    end = prompt + chosen + rejected
    return np.array([end] * (prompt - 1) + [prompt + chosen] * (chosen + 1) + [end] * rejected)


def visible(until: np.ndarray, queries: int) -> np.ndarray:
    rows = np.arange(len(until) - queries, len(until))[:, None]
    return (np.arange(len(until)) <= rows) & (rows < until)


CASES = {
    "one token": (packed(1), 1, 1, 16),
    "one head of each": (packed(65), 2, 2, 16),
    "documents": (packed(1, 63, 64, 5, 130), 4, 2, 32),
    "many short ones": (packed(*range(1, 24)), 3, 1, 24),
    "eight to one": (packed(100, 97), 8, 1, 64),
    "a pair": (pair(90, 40, 75), 4, 2, 48),
    "a row of pairs": (np.concatenate([pair(20, 70, 3), 93 + pair(5, 4, 110)]), 2, 1, 16),
    "80 wide": (packed(33, 96), 2, 2, 80),
    "128 wide": (packed(193), 2, 1, 128),
    "not a multiple of anything": (packed(77, 12), 2, 1, 37),
    "the widest": (packed(70), 1, 1, 256),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str) -> None:
    until, heads, groups, width = CASES[name]
    tokens = len(until)
    arrays = [numbers(s, tokens, h, width) for s, h in enumerate((heads, groups, groups))]
    gradient = numbers(9, tokens, heads, width)
    inputs = [tensor(x) for x in arrays]
    output = kernels.attention(*inputs, kernels.causal_plan(tokens, tokens, paddle.to_tensor(until)))
    assert output.grad_fn.name() == "GradNodePyLayer__CompiledAttention"
    output.backward(paddle.to_tensor(gradient))
    for found, wanted in zip(
        [output, *(x.grad for x in inputs)], truth(*arrays, gradient, visible(until, tokens)), strict=True
    ):
        close(found, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_random_layouts_are_those_of_the_plain_path(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    until = packed(*random.integers(1, 150, random.integers(1, 6)).tolist())
    groups, repeat, width = (int(random.choice(x)) for x in ((1, 2), (1, 2, 5, 8), (16, 40, 64, 96)))
    tokens = len(until)
    shapes = [(tokens, h, width) for h in (groups * repeat, groups, groups)]
    results = []
    for _ in range(2):
        inputs = [tensor(numbers(s, *shape)) for s, shape in enumerate(shapes)]
        output = kernels.attention(*inputs, kernels.causal_plan(tokens, tokens, paddle.to_tensor(until)))
        output.backward(paddle.to_tensor(numbers(9, *shapes[0])))
        results.append([output, *(x.grad for x in inputs)])
        monkeypatch.setattr(compiled, "library_for", lambda *_: None)
    for found, plain in zip(*results, strict=True):
        close(found, plain.numpy())


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2)])
def test_what_is_frozen_gets_no_gradient(frozen: tuple[int, ...]) -> None:
    inputs = [tensor(numbers(i, 20, h, 16), i not in frozen) for i, h in enumerate((4, 2, 2))]
    kernels.attention(*inputs, kernels.causal_plan(20, 20)).sum().backward()
    assert [x.grad is None for x in inputs] == [i in frozen for i in range(3)]


@pytest.mark.parametrize("queries", [1, 3, 64, 150])
def test_new_tokens_over_a_longer_past(queries: int) -> None:
    q, k, v = numbers(0, queries, 6, 32), numbers(1, 230, 2, 32), numbers(2, 230, 2, 32)
    wanted = truth(q, k, v, q, visible(packed(230), queries))[0]
    plan = kernels.causal_plan(queries, 230)
    close(kernels.attention(tensor(q, False), tensor(k, False), tensor(v, False), plan), wanted)
    by_head = [tensor(np.ascontiguousarray(x.transpose(1, 0, 2)), False) for x in (k, v)]
    close(kernels.cached_attention(tensor(q, False), *by_head, plan), wanted)


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 2), (5, 7), (16, 300), (33, 33), (63, 200)])
def test_heads_that_share_keys_read_them_together(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, threads: int
) -> None:
    q, k, v = numbers(0, queries, 12, 24), numbers(1, keys, 2, 24), numbers(2, keys, 2, 24)
    by_head = [tensor(np.ascontiguousarray(x.transpose(1, 0, 2)), False) for x in (k, v)]
    library = compiled.library_for(tensor(q, False), *by_head)
    assert library is not None
    monkeypatch.setattr(library, "threads", threads)  # decides how the queries are cut
    plan = kernels.causal_plan(queries, keys)
    found = kernels.cached_attention(tensor(q, False), *by_head, plan)
    close(found, truth(q, k, v, q, visible(packed(keys), queries))[0])
    one_by_one, _ = compiled.forward(
        library, tensor(q, False), *by_head, plan.sight, keep=False, by_head=True
    )
    np.testing.assert_array_equal(found.numpy(), one_by_one.numpy())


def test_frames_see_both_ways() -> None:
    lengths = [4, 4, 70, 1, 130]
    frame = np.repeat(np.arange(5), lengths)
    arrays, gradient = [numbers(s, 209, 2, 80) for s in range(3)], numbers(9, 209, 2, 80)
    inputs = [tensor(x) for x in arrays]
    output = kernels.frame_attention(*inputs, lengths)
    output.backward(paddle.to_tensor(gradient))
    for found, wanted in zip(
        [output, *(x.grad for x in inputs)],
        truth(*arrays, gradient, frame[:, None] == frame),
        strict=True,
    ):
        close(found, wanted)


def test_large_scores_and_scores_far_apart() -> None:
    q, k, v = numbers(0, 90, 2, 16) * 40, numbers(1, 90, 1, 16) * 40, numbers(2, 90, 1, 16)
    k[10] *= 100  # its weight is one or zero
    found = kernels.attention(*(tensor(x, False) for x in (q, k, v)), kernels.causal_plan(90, 90))
    wanted = truth(q, k, v, q, visible(packed(90), 90))[0]
    # Scores reach 1e5: their own fp32 rounding moves weights by 1e-2 where two are close.
    assert np.isfinite(found.numpy()).all()
    assert np.median(np.abs(found.numpy() - wanted)) < 1e-4


def test_threads_do_not_change_a_bit(built: library.Library) -> None:
    until = packed(150, 90, 20)
    inputs = [tensor(numbers(i, 260, h, 32), False) for i, h in enumerate((8, 2, 2))]
    gradient = tensor(numbers(9, 260, 8, 32), False)
    sight = compiled.Sight.of(np.arange(260), until, 260)
    parallel, results = library._parallel(), []
    if parallel is None:
        pytest.skip("Paddle has no OpenMP here")
    try:
        for threads in (1, 2, 3):
            built.c.ernie_threads(parallel, threads)
            output, sums = compiled.forward(built, *inputs, sight, keep=True)
            results.append((output, *compiled.backward(built, (*inputs, output, sums), gradient, sight)))
        # More threads than groups of heads and documents: the heads of a group are shared out.
        built.c.ernie_threads(parallel, 16)
        shared = compiled.backward(built, (*inputs, *results[0][:1], sums), gradient, sight)
    finally:
        built.c.ernie_threads(parallel, built.threads)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one.numpy(), same.numpy())
    for one, same in zip(results[0][1:], shared, strict=True):
        close(same, one.numpy())


def test_units_share_no_keys() -> None:
    sight = compiled.Sight.of(np.arange(260), packed(150, 90, 20), 260)
    assert sight.units.tolist() == [0, 3, 5, 6]
    assert sight.blocks.tolist() == [
        [0, 64, 0, 64], [64, 128, 0, 128], [128, 150, 0, 150],
        [150, 214, 150, 214], [214, 240, 150, 240], [240, 260, 240, 260],
    ]  # fmt: skip
    rejected = compiled.Sight.of(np.arange(200), pair(10, 90, 100), 200).blocks
    assert rejected[-1].tolist() == [192, 200, 0, 200]  # over the chosen answer: its blocks are skipped in C


def test_other_types_and_wider_heads_take_the_plain_path() -> None:
    for width, dtype in ((16, "float64"), (288, "float32")):
        q, k, v = (tensor(numbers(i, 9, 2, width)).astype(dtype) for i in range(3))
        assert compiled.library_for(q, k, v) is None
        wanted = truth(q.numpy(), k.numpy(), v.numpy(), q.numpy(), visible(packed(9), 9))[0]
        close(kernels.attention(q, k, v, kernels.causal_plan(9, 9)), wanted)


def test_a_wrong_kernel_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = compiled.backward
    monkeypatch.setattr(compiled, "backward", lambda *a: [x * 1.01 for x in right(*a)])
    compiled._checked.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            q, k, v = (tensor(numbers(i, 9, 2, 16)) for i in range(3))
            output = kernels.attention(q, k, v, kernels.causal_plan(9, 9))
        assert output.grad_fn.name() == "GradNodePyLayer__BlockAttention"
        assert "for attention is not used, which is slower: grad q has an error of 1" in caplog.text
    finally:
        compiled._checked.cache_clear()


def test_the_plain_path_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library_for", lambda *_: None)
    monkeypatch.setattr(block_attention, "QUERY_BLOCK", 7)
    until = packed(5, 30)
    arrays = [numbers(i, 35, h, 16) for i, h in enumerate((4, 2, 2))]
    inputs = [tensor(x) for x in arrays]
    output = kernels.attention(*inputs, kernels.causal_plan(35, 35, paddle.to_tensor(until)))
    output.sum().backward()
    wanted = truth(*arrays, np.ones_like(arrays[0]), visible(until, 35))
    for found, right in zip([output, *(x.grad for x in inputs)], wanted, strict=True):
        close(found, right)
