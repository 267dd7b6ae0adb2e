"""The vision tower's norm: values and gradients against fp64 numpy, whatever of it is frozen."""

import numpy as np
import paddle
import pytest

from ernietune.models.layers import LayerNorm


@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_gradient_of_the_input_does_not_depend_on_what_trains(trained):
    """Adapters leave the norm frozen; Paddle's CPU kernel then gives the input a wrong gradient."""
    random = np.random.default_rng(0)
    x, weight, bias, grad = (random.standard_normal(s) for s in ((5, 64), 64, 64, (5, 64)))
    norm = LayerNorm(64, "float32")
    for name, values in (("weight", weight), ("bias", bias)):
        parameter = dict(norm.named_parameters())[name]
        parameter.set_value(values.astype(np.float32))
        parameter.stop_gradient = name not in trained
    given = paddle.to_tensor(x.astype(np.float32), stop_gradient=False)
    out = norm(given)
    out.backward(paddle.to_tensor(grad.astype(np.float32)))

    inverse = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    normed, scaled = (x - x.mean(-1, keepdims=True)) * inverse, grad * weight
    average = (scaled - scaled.mean(-1, keepdims=True)) - normed * (scaled * normed).mean(-1, keepdims=True)
    np.testing.assert_allclose(out.numpy(), normed * weight + bias, atol=2e-6)
    np.testing.assert_allclose(given.grad.numpy(), inverse * average, atol=2e-6)
    expected = {"weight": (grad * normed).sum(0), "bias": grad.sum(0)}
    for name, parameter in norm.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        if name in trained:
            np.testing.assert_allclose(parameter.grad.numpy(), expected[name], atol=5e-6)


def test_a_frozen_norm_of_a_frozen_input_stays_out_of_the_graph():
    norm = LayerNorm(8, "float32")
    assert norm(paddle.ones([2, 8])).stop_gradient
