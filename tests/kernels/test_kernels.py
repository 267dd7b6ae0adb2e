"""Every fast operation against its plain form in `reference`, values and gradients."""

import ernietune_kernels as kernels
import numpy as np
import paddle
import pytest
from ernietune_kernels import block_attention, reference
from ernietune_kernels.cpu import attention, blas, lowrank, pointwise


@pytest.fixture(params=["plain", "compiled"], autouse=True)
def path(request, monkeypatch):
    """Everything with the C of the CPU, where it can be built, and without."""
    if request.param == "plain":
        for module in (attention, lowrank, pointwise):
            monkeypatch.setattr(module, "library_for", lambda *_: None)
        monkeypatch.setattr(blas, "grouped_product", lambda *_: None)


def random(*shape, trainable=True, seed=0):
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    tensor = paddle.to_tensor(values)
    tensor.stop_gradient = not trainable
    return tensor


def close(actual, expected, tolerance=2e-6):
    scale = max(1.0, float(np.abs(expected.numpy()).max()))
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=0, atol=tolerance * scale)


def check(fast, slow, inputs, tolerance=2e-6):
    """Values and the gradient of every trainable input agree under one random upstream gradient."""
    results, gradients = [], []
    for function in (fast, slow):
        copies = [x.detach().clone() for x in inputs]
        for copy, original in zip(copies, inputs, strict=True):
            copy.stop_gradient = original.stop_gradient
        output = function(*copies)
        results.append(output)
        if not output.stop_gradient:
            (output * random(*output.shape, trainable=False, seed=9)).sum().backward()
        gradients.append([c.grad for c in copies])
    close(*results, tolerance)
    for original, ours, expected in zip(inputs, *gradients, strict=True):
        if original.stop_gradient:
            assert ours is None
        else:
            close(ours, expected, tolerance)


@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_rms_norm(frozen):
    inputs = [random(7, 24), random(24)]
    for index in frozen:
        inputs[index].stop_gradient = True
    check(lambda x, w: kernels.rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), inputs)


def test_rope_rotates_and_its_gradient_rotates_back():
    angles = np.random.default_rng(1).uniform(0, 100, (5, 8)).astype(np.float32)
    cos, sin = paddle.to_tensor(np.cos(angles)), paddle.to_tensor(np.sin(angles))
    check(
        lambda x: kernels.apply_rope(x, cos, sin),
        lambda x: reference.apply_rope(x, cos, sin),
        [random(5, 3, 16)],
    )


def test_swiglu():
    check(kernels.swiglu, reference.swiglu, [random(5, 12), random(5, 12, seed=1)])


@pytest.mark.parametrize("counts", [[3, 4, 0, 2], [9, 0, 0, 0], [0, 0, 0, 9], [1, 1, 6, 1]])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_grouped_linear_with_empty_and_crowded_experts(counts, frozen):
    inputs = [random(9, 6), random(4, 5, 6, seed=1)]
    for index in frozen:
        inputs[index].stop_gradient = True
    check(
        lambda x, w: kernels.grouped_linear(x, w, counts),
        lambda x, w: reference.grouped_linear(x, w, counts),
        inputs,
    )


def lora_inputs(frozen, *stack):
    inputs = [
        random(9, 6),
        random(*stack, 5, 6, seed=1),
        random(*stack, 2, 6, seed=2),
        random(*stack, 5, 2, seed=3),
    ]
    for index in (1, *frozen):
        inputs[index].stop_gradient = True
    return inputs


@pytest.mark.parametrize("frozen", [(), (0,), (2, 3)])
def test_lora_linear(frozen):
    check(
        lambda *x: kernels.lora_linear(*x, 0.7),
        lambda *x: reference.lora_linear(*x, 0.7),
        lora_inputs(frozen),
    )


@pytest.mark.parametrize("counts", [[3, 4, 0, 2], [9, 0, 0, 0], [1, 1, 6, 1]])
@pytest.mark.parametrize("frozen", [(), (0,), (2, 3)])
def test_grouped_lora_linear(counts, frozen):
    check(
        lambda *x: kernels.grouped_lora_linear(*x, 0.7, counts),
        lambda *x: reference.grouped_lora_linear(*x, 0.7, counts),
        lora_inputs(frozen, 4),
    )


def test_grouped_lora_linear_without_rows():
    x, *weights = lora_inputs((), 4)
    output = kernels.grouped_lora_linear(x[:0], *weights, 0.7, [0, 0, 0, 0])
    assert output.shape == [0, 5]
    output.sum().backward()
    assert float(weights[1].grad.abs().max()) == 0


def test_grouped_linear_without_rows():
    output = kernels.grouped_linear(random(0, 6), random(4, 5, 6), [0, 0, 0, 0])
    assert output.shape == [0, 5]


def test_expert_views_share_memory():
    stack = random(3, 4, 5, trainable=False)
    view = kernels.grouped_gemm.expert_views(stack)[1]
    stack.set_value(stack + 1)
    np.testing.assert_array_equal(view.numpy(), stack.numpy()[1])


def test_permute_sorts_by_expert_and_unpermute_brings_back():
    x, experts = (
        random(6, 4, trainable=False),
        paddle.to_tensor([[2, 0], [1, 2], [0, 2], [2, 1], [0, 1], [2, 0]]),
    )
    rows, plan = kernels.permute(x, experts, 4)
    assert plan.counts == [4, 3, 5, 0]
    flat = experts.numpy().reshape(-1)
    order = np.argsort(flat, kind="stable")
    np.testing.assert_array_equal(rows.numpy(), x.numpy()[order // 2])
    weights = random(6, 2, trainable=False, seed=3)
    expected = x.numpy() * weights.numpy().sum(1, keepdims=True)
    np.testing.assert_allclose(kernels.unpermute(rows, weights, plan).numpy(), expected, atol=1e-6)


def test_route_selects_by_biased_probability_and_weighs_without_the_bias():
    logits = np.random.default_rng(0).standard_normal((50, 8))
    bias = np.random.default_rng(1).uniform(-0.2, 0.2, 8)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.argsort(-(probabilities + bias), axis=1)[:, :3]
    picked = np.take_along_axis(probabilities, chosen, 1)
    weights, experts = kernels.route(
        paddle.to_tensor(logits.astype(np.float32)), paddle.to_tensor(bias.astype(np.float32)), 3
    )
    np.testing.assert_array_equal(experts.numpy(), chosen)
    np.testing.assert_allclose(weights.numpy(), picked / picked.sum(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_linear_cross_entropy_in_chunks(rows, frozen):
    labels = paddle.to_tensor(np.random.default_rng(2).integers(0, 30, 10))
    inputs = [random(10, 8), random(30, 8, seed=1)]
    for index in frozen:
        inputs[index].stop_gradient = True
    check(
        lambda h, w: kernels.linear_cross_entropy(h, w, labels, rows),
        lambda h, w: reference.linear_cross_entropy(h, w, labels),
        inputs,
    )


def test_linear_cross_entropy_matches_float64_at_large_logits():
    hidden, weight = random(4, 8, trainable=False) * 30, random(50, 8, trainable=False)
    labels = np.array([0, 7, 49, 3])
    logits = hidden.numpy().astype(np.float64) @ weight.numpy().astype(np.float64).T
    peak = logits.max(1, keepdims=True)
    expected = (np.log(np.exp(logits - peak).sum(1)) + peak[:, 0]) - logits[np.arange(4), labels]
    actual = kernels.linear_cross_entropy(hidden, weight, paddle.to_tensor(labels))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5)


def visible(until, queries):
    keys = len(until)
    rows = np.arange(keys - queries, keys)[:, None]
    return (np.arange(keys) <= rows) & (rows < until)


UNTIL = {
    "one document": np.full(11, 11),
    "packed": np.array([4] * 4 + [6] * 2 + [11] * 5),
    # prompt of 4, chosen 3, rejected 4 that must not see the chosen answer nor the last prompt token
    "shared prompt": np.array([11] * 3 + [7] * 4 + [11] * 4),
}


@pytest.mark.parametrize("name", UNTIL)
@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("frozen", [(), (1, 2)])
def test_attention_over_documents(monkeypatch, name, block, frozen):
    monkeypatch.setattr(block_attention, "QUERY_BLOCK", block)
    until = UNTIL[name]
    plan = kernels.causal_plan(11, 11, paddle.to_tensor(until))
    allowed = paddle.to_tensor(visible(until, 11))
    inputs = [random(11, 4, 8), random(11, 2, 8, seed=1), random(11, 2, 8, seed=2)]
    for index in frozen:
        inputs[index].stop_gradient = True
    check(
        lambda q, k, v: kernels.attention(q, k, v, plan),
        lambda q, k, v: reference.attention(q, k, v, allowed),
        inputs,
    )


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_of_new_tokens_over_a_longer_past(queries):
    q, k, v = random(queries, 4, 8), random(9, 2, 8, seed=1), random(9, 2, 8, seed=2)
    allowed = paddle.to_tensor(visible(np.full(9, 9), queries))
    close(kernels.attention(q, k, v, kernels.causal_plan(queries, 9)), reference.attention(q, k, v, allowed))


@pytest.mark.parametrize("elements", [1 << 24, 40, 10])
def test_frame_attention_stays_inside_frames(monkeypatch, elements):
    monkeypatch.setattr(block_attention, "SCORE_ELEMENTS", elements)
    lengths = [4, 4, 6, 4]
    frame = np.repeat(np.arange(4), lengths)
    allowed = paddle.to_tensor(frame[:, None] == frame)
    inputs = [random(18, 2, 8), random(18, 2, 8, seed=1), random(18, 2, 8, seed=2)]
    check(
        lambda q, k, v: kernels.frame_attention(q, k, v, lengths),
        lambda q, k, v: reference.attention(q, k, v, allowed),
        inputs,
    )
