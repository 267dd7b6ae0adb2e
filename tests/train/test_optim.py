"""One optimizer against AdamW written out in fp64, and the learning rate against hand-made numbers."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from ernietune.config import TrainSection
from ernietune.models.layers import LayerNorm, Linear
from ernietune.train.optim import Optimizer, learning_rate

SETTINGS = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6, "weight_decay": 0.1}


class Layers(nn.Layer):
    """One parameter of every sort: matrix, bias, the two kinds of norm, A and B."""

    def __init__(self):
        super().__init__()
        self.proj = Linear(4, 3, "float32", bias=True)
        self.ln = LayerNorm(5, "float32")
        self.add_sublayer("3", LayerNorm(2, "float32"))
        self.adapter = nn.Layer()
        self.adapter.lora_A = self.adapter.create_parameter([2, 4])
        self.adapter.lora_B = self.adapter.create_parameter([3, 2])
        for number, (_, parameter) in enumerate(self.named_parameters()):
            random = np.random.default_rng(number)
            parameter.set_value(random.standard_normal(parameter.shape).astype(np.float32))
            parameter.stop_gradient = False


def gradients(model, step):
    """Random gradients of one step by path."""
    random = np.random.default_rng(100 + step)
    return {path: random.standard_normal(p.shape) for path, p in model.named_parameters()}


def set_gradients(model, values):
    """Give every parameter its gradient through a sum of products."""
    loss = sum(
        (p * paddle.to_tensor(values[n].astype(np.float32))).sum() for n, p in model.named_parameters()
    )
    loss.backward()


@pytest.mark.parametrize("clip_norm", [None, 1.5])
@pytest.mark.parametrize("plus_ratio", [1.0, 8.0])
def test_adamw(clip_norm, plus_ratio):
    model = Layers()
    optimizer = Optimizer(model, TrainSection(output="", clip_norm=clip_norm, **SETTINGS), plus_ratio)
    expected = {path: p.numpy().astype(np.float64) for path, p in model.named_parameters()}
    first = {path: np.zeros_like(values) for path, values in expected.items()}
    second = {path: np.zeros_like(values) for path, values in expected.items()}
    for step, rate in enumerate((0.01, 0.02, 0.005), start=1):
        grads = gradients(model, step)
        set_gradients(model, grads)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert optimizer.step(rate) == pytest.approx(norm, rel=1e-6)
        for path, values in expected.items():
            grad = grads[path] * (min(1, clip_norm / norm) if clip_norm else 1)
            own_rate = rate * (plus_ratio if path.endswith("lora_B") else 1)
            values *= 1 - own_rate * 0.1 * (values.ndim > 1)
            first[path] = 0.8 * first[path] + 0.2 * grad
            second[path] = 0.9 * second[path] + 0.1 * grad**2
            scaled = np.sqrt(second[path] / (1 - 0.9**step)) + 1e-6
            values -= own_rate * first[path] / (1 - 0.8**step) / scaled
        for path, parameter in model.named_parameters():
            np.testing.assert_allclose(parameter.numpy(), expected[path], atol=1e-5, err_msg=f"{path} {step}")
            assert parameter.grad is None


def test_the_state_goes_to_another_model_of_the_same_paths():
    """Paddle's own keys count the layers built so far, so another process or model would not find them."""
    one, other = Layers(), Layers()
    train = TrainSection(output="", **SETTINGS)
    first = Optimizer(one, train)
    for step in (1, 2):
        set_gradients(one, gradients(one, step))
        first.step(0.01)
    second = Optimizer(other, train)
    second.load_state(first.state())
    for (_, target), (_, source) in zip(other.named_parameters(), one.named_parameters(), strict=True):
        target.set_value(source.numpy())
    for model, optimizer in ((one, first), (other, second)):
        set_gradients(model, gradients(model, 3))
        optimizer.step(0.01)
    for (path, target), (_, source) in zip(other.named_parameters(), one.named_parameters(), strict=True):
        np.testing.assert_array_equal(target.numpy(), source.numpy(), err_msg=path)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # the minimum is where a step behind the last would be
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1.0, 1.0, 0.2 + 0.8 * (2 + 2**0.5) / 4, 0.6, 0.2 + 0.8 * (2 - 2**0.5) / 4]),
    ],
)
def test_learning_rate(schedule, expected):
    train = TrainSection(
        output="", learning_rate=1.0, min_learning_rate=0.2, warmup_steps=2, schedule=schedule
    )
    assert [learning_rate(step, 6, train) for step in range(1, 7)] == pytest.approx(expected)
