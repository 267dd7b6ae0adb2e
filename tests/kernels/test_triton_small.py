"""The small fused kernels and the cross-entropy in Triton's interpreter, against the plain form and fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

import ernietune  # noqa: F401  (sets the environment before paddle)

pytest.importorskip("triton")

import numpy as np
import paddle
from ernietune_kernels import pointwise, reference
from ernietune_kernels.gpu import activation, cross_entropy, norm, rope
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import Tensor


def random(*shape: int, seed: int = 0, gradient: bool = False) -> Tensor:
    tensor = paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
    tensor.stop_gradient = not gradient
    return tensor


def close(found: Tensor, truth: Tensor | np.ndarray, tolerance: float = 2e-6) -> None:
    """Equal up to `tolerance` of the largest value."""
    expected = truth.numpy() if isinstance(truth, Tensor) else truth
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 96), (3, 128), (140, 24)])
def test_rms_norm_gradients(rows: int, width: int) -> None:
    x, weight = random(rows, width, gradient=True), random(width, seed=1, gradient=True)
    outer = random(rows, width, seed=2)
    truth = reference.rms_norm(x, weight, 1e-5)
    (truth * outer).sum().backward()
    y, inverse = norm.rms_norm(x.detach(), weight.detach(), 1e-5)
    grad_x, grad_weight = norm.rms_norm_backward(outer, x.detach(), weight.detach(), inverse, True)
    alone, nothing = norm.rms_norm_backward(outer, x.detach(), weight.detach(), inverse)
    close(y, truth)
    close(grad_x, x.grad)
    close(grad_weight, weight.grad, 1e-5)
    close(alone, x.grad)
    assert nothing is None


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (5, 1, 8), (20, 4, 128)])
def test_rope_of_both_and_back(heads: int, groups: int, width: int) -> None:
    tokens = 3
    q, k = random(tokens, heads, width), random(tokens, groups, width, seed=1)
    angles = np.random.default_rng(2).uniform(0, 6, (tokens, width // 2))
    cos, sin = (paddle.to_tensor(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    turned = rope.rope(q, k, cos, sin)
    for found, plain in zip(turned, (q, k), strict=True):
        close(found, reference.apply_rope(plain, cos, sin))
        close(found, pointwise.apply_rope(plain, cos, sin))
    for found, plain in zip(rope.rope(*turned, cos, sin, backward=True), (q, k), strict=True):
        close(found, plain)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 4), (4, 24), (3, 1100)])
def test_swiglu_gradients(rows: int, width: int, weighted: bool) -> None:
    halves = random(rows, 2 * width, gradient=True)
    weight = random(rows, seed=1, gradient=True)
    outer = random(rows, width, seed=2)
    truth = reference.swiglu(*halves.chunk(2, -1))
    truth = truth * weight.unsqueeze(1) if weighted else truth
    (truth * outer).sum().backward()
    given_weight = weight.detach() if weighted else None
    close(activation.swiglu(halves.detach(), given_weight), truth)
    grad, grad_weight = activation.swiglu_backward(outer, halves.detach(), given_weight)
    close(grad, halves.grad)
    if weighted:
        close(grad_weight, weight.grad, 1e-5)
    else:
        assert grad_weight is None


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.sampled_from([8, 40]), st.sampled_from([7, 300, 515]), st.integers(0, 99))
def test_cross_entropy_and_its_gradients(rows: int, width: int, vocabulary: int, seed: int) -> None:
    hidden = random(rows, width, seed=seed, gradient=True)
    head = random(vocabulary, width, seed=seed + 1, gradient=True)
    labels = paddle.to_tensor(np.random.default_rng(seed).integers(0, vocabulary, rows))
    outer = random(rows, seed=seed + 2)
    truth = reference.linear_cross_entropy(hidden, head, labels)
    (truth * outer).sum().backward()
    nll, grad_hidden = cross_entropy.linear_cross_entropy(hidden.detach(), head.detach(), labels)
    close(nll, truth, 5e-6)
    close(grad_hidden * outer.unsqueeze(1), hidden.grad, 1e-5)
    close(cross_entropy.head_gradient(hidden.detach(), head.detach(), labels, outer), head.grad, 1e-5)


def test_cross_entropy_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROW_STEP", 4)
    monkeypatch.setattr(cross_entropy, "EXTRA_BYTES", 4 * 6 * 50)
    assert cross_entropy.rows_at_a_time(50) == 4
    hidden, head = random(10, 16), random(50, 16, seed=1)
    labels = paddle.to_tensor(np.arange(10) * 4)
    nll, grad = cross_entropy.linear_cross_entropy(hidden, head, labels)
    close(nll, reference.linear_cross_entropy(hidden, head, labels), 5e-6)
    assert grad.shape == [10, 16]
    nothing, none = cross_entropy.linear_cross_entropy(hidden[:0], head, labels[:0], gradient=False)
    assert nothing.shape == [0]
    assert none is None


def test_logits_are_not_rounded_to_bf16() -> None:
    """A logit near 200 has a bf16 step of 1: the loss must still be right to the third decimal."""
    hidden = (random(4, 64) * 3).astype("bfloat16")
    head = (random(128, 64, seed=1) * 3).astype("bfloat16")
    labels = paddle.to_tensor(np.arange(4))
    nll, _ = cross_entropy.linear_cross_entropy(hidden, head, labels, gradient=False)
    logits = hidden.astype("float32").numpy().astype(np.float64) @ head.astype("float32").numpy().T
    peak = logits.max(1)
    truth = np.log(np.exp(logits - peak[:, None]).sum(1)) + peak - logits[np.arange(4), np.arange(4)]
    assert np.abs(logits).max() > 100
    np.testing.assert_allclose(nll.numpy(), truth, atol=1e-3)


class Held:
    """Memory without values: counts its bytes for as long as somebody holds it."""

    now = 0
    most = 0

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self.shape, self.dtype = list(shape), dtype
        self.nbytes = math.prod(self.shape) * (4 if dtype == "float32" else 2)
        Held.now += self.nbytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.nbytes

    def __getitem__(self, part: slice) -> Held:
        """A view, without memory of its own."""
        view = Held([0], self.dtype)
        view.shape = [len(range(*part.indices(self.shape[0]))), *self.shape[1:]]
        return view


@pytest.mark.parametrize("width", [2560, 8192])
def test_memory_beyond_the_results_for_8k_rows_of_ernies_vocabulary(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the code itself would ask for and let go of, counted; 256 MiB is what is allowed."""
    rows, vocabulary = 8192, 103_424
    hidden, head = Held([rows, width], "bfloat16"), Held([vocabulary, width], "bfloat16")
    labels = Held([rows], "bfloat16")
    for name, made in {
        "launch": lambda *arguments, **constants: None,
        "empty": lambda shape, dtype, like: Held(shape, dtype),
        "matmul": lambda x, y: Held([x.shape[0], y.shape[1]], "bfloat16"),
        "concat": lambda parts: Held([rows, *parts[0].shape[1:]], parts[0].dtype),
    }.items():
        monkeypatch.setattr(cross_entropy, name, made)
    before = Held.most = Held.now
    nll, gradient = cross_entropy.linear_cross_entropy(hidden, head, labels)
    assert nll.shape == [rows]
    assert gradient.shape == [rows, width]
    beyond = Held.most - before - nll.nbytes - gradient.nbytes
    # Two parts' logits meet when one is done and the next begins.
    assert 100 << 20 < beyond <= 256 << 20


def test_nothing_is_added_by_atomics() -> None:
    """They add in whatever order programs end: another gradient each time."""
    folder = Path(cross_entropy.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    assert len(sources) > 10
    assert not any("atomic" in source for source in sources)
