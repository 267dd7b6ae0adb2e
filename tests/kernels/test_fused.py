"""The Triton kernels inside Paddle's autograd, in the interpreter, against what models use on a CPU."""

from __future__ import annotations

import pytest

import ernietune  # noqa: F401  (sets the environment before paddle)

pytest.importorskip("triton")

import ernietune_kernels as kernels
import numpy as np
import paddle
from ernietune_kernels import fused, fused_experts
from ernietune_kernels.fused_experts import ExpertFactors
from paddle import Tensor


def leaf(*shape: int, seed: int = 0, frozen: bool = False) -> Tensor:
    value = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    tensor = paddle.to_tensor(value)
    tensor.stop_gradient = frozen
    return tensor


def same_gradients(mine: Tensor, plain: Tensor, leaves: list[Tensor]) -> None:
    """Both outputs and the gradients they send back are equal to 1e-5 of the largest."""
    outer = leaf(*mine.shape, seed=99, frozen=True)
    for found, truth in [
        (mine, plain),
        *zip(_back(mine, outer, leaves), _back(plain, outer, leaves), strict=True),
    ]:
        scale = max(float(truth.abs().max().item()), 1e-3)
        np.testing.assert_allclose(found.numpy(), truth.numpy(), atol=1e-5 * scale, rtol=0)


def _back(output: Tensor, outer: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    for tensor in leaves:
        tensor.clear_gradient()
    (output * outer).sum().backward()
    gradients = [tensor.grad.clone() for tensor in leaves if not tensor.stop_gradient]
    assert all(tensor.grad is None for tensor in leaves if tensor.stop_gradient)
    return gradients


@pytest.mark.parametrize("frozen", [False, True])
def test_rms_norm(frozen: bool) -> None:
    x, weight = leaf(2, 5, 24), leaf(24, seed=1, frozen=frozen)
    same_gradients(fused.rms_norm(x, weight, 1e-5), kernels.rms_norm(x, weight, 1e-5), [x, weight])


def test_rope_of_q_and_k() -> None:
    q, k = leaf(3, 4, 16), leaf(3, 2, 16, seed=1)
    angles = leaf(3, 8, seed=2, frozen=True)
    cos, sin = angles.cos(), angles.sin()
    mine = paddle.concat([t.flatten() for t in fused.rope(q, k, cos, sin)])
    plain = paddle.concat([kernels.apply_rope(t, cos, sin).flatten() for t in (q, k)])
    same_gradients(mine, plain, [q, k])


def test_routing_weights_send_the_gradient_of_a_softmax_over_the_chosen() -> None:
    logits, bias = leaf(7, 6), leaf(6, seed=1, frozen=True) * 0.1
    mine, chosen = fused.route(logits, bias, 3)
    plain, expected = kernels.route(logits, bias, 3)
    np.testing.assert_array_equal(chosen.numpy(), expected.numpy())
    same_gradients(mine, plain, [logits])


@pytest.mark.parametrize("frozen_head", [False, True])
def test_cross_entropy(frozen_head: bool) -> None:
    hidden, head = leaf(6, 16), leaf(40, 16, seed=1, frozen=frozen_head)
    labels = paddle.to_tensor(np.arange(6) * 5)
    mine = fused.linear_cross_entropy(hidden, head, labels)
    same_gradients(mine, kernels.linear_cross_entropy(hidden, head, labels), [hidden, head])
    with paddle.no_grad():
        alone = fused.linear_cross_entropy(hidden, head, labels)
    np.testing.assert_allclose(alone.numpy(), mine.numpy())


@pytest.mark.parametrize("adapted", ["all", "none", "down", "frozen"])
def test_routed_experts(adapted: str) -> None:
    tokens, count, k, width, inner, rank = 6, 5, 2, 16, 24, 3
    x, weights = leaf(tokens, width), leaf(tokens, k, seed=1)
    rng = np.random.default_rng(0)
    experts = paddle.to_tensor(np.stack([rng.permutation(count)[:k] for _ in range(tokens)]))
    layers, leaves = [], [x, weights]
    for name, (outputs, inputs) in {
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
    }.items():
        stack = leaf(count, outputs, inputs, seed=len(name), frozen=True)
        if adapted in ("all", "frozen", name):
            frozen = adapted == "frozen"
            factors = [leaf(count, rank, inputs, seed=3, frozen=frozen), leaf(count, outputs, rank, seed=4)]
            leaves += factors
            layers.append(ExpertFactors(stack, *factors, scale=0.5))
        else:
            layers.append(ExpertFactors(stack))
    gate, up, down = (
        lambda value, part=part: (
            kernels.grouped_linear(value, part.weight, plan.counts)
            if part.a is None
            else kernels.grouped_lora_linear(value, part.weight, part.a, part.b, part.scale, plan.counts)
        )
        for part in layers
    )
    for keep_activation in (True, False):
        rows, plan = kernels.permute(x, experts, count)
        plain = kernels.unpermute(down(kernels.swiglu(gate(rows), up(rows))), weights, plan)
        mine = fused_experts.routed_experts(x, weights, experts, *layers, keep_activation=keep_activation)
        same_gradients(mine, plain, leaves)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("counts", [[0, 4, 0, 1, 20], [0, 0, 3, 0, 0], [2, 1, 1, 2, 1], [0] * 5], ids=str)
def test_rows_of_one_expert_each_come_back_as_they_stood(counts: list[int], adapted: bool) -> None:
    """What arrives from other processes: in the order of the senders, or sorted already; unweighted."""
    total, width, inner, rank = sum(counts), 16, 24, 3
    rows = leaf(total, width)
    layers, leaves = [], [rows]
    for seed, (outputs, inputs) in enumerate([(inner, width), (inner, width), (width, inner)]):
        factors = [leaf(5, rank, inputs, seed=seed), leaf(5, outputs, rank, seed=seed)] if adapted else []
        leaves += factors
        layers.append(ExpertFactors(leaf(5, outputs, inputs, seed=seed, frozen=True), *factors, scale=0.5))

    def plain(placed: Tensor) -> Tensor:
        def through(x: Tensor, part: ExpertFactors) -> Tensor:
            if part.a is None:
                return kernels.grouped_linear(x, part.weight, counts)
            return kernels.grouped_lora_linear(x, part.weight, part.a, part.b, part.scale, counts)

        gate, up, down = layers
        return through(kernels.swiglu(through(placed, gate), through(placed, up)), down)

    order = np.random.default_rng(1).permutation(total)
    for keep_activation in (True, False):
        mine = kernels.placed_experts(rows, counts, None, *layers, keep_activation)
        assert mine.shape == [total, width]
        if total:
            same_gradients(mine, plain(rows), leaves)
            placed = paddle.gather(plain(paddle.gather(rows, paddle.to_tensor(order))), _inverse(order))
            mixed = kernels.placed_experts(rows, counts, paddle.to_tensor(order), *layers, keep_activation)
            same_gradients(mixed, placed, leaves)


def _inverse(order: np.ndarray) -> Tensor:
    return paddle.to_tensor(np.argsort(order))


@pytest.mark.parametrize("tokens", [1, 40])
def test_rows_go_to_their_experts_and_back(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permute and unpermute as a GPU has them, with the same plan and gradients."""
    x, weights = leaf(tokens, 24), leaf(tokens, 3, seed=1)
    rng = np.random.default_rng(0)
    experts = paddle.to_tensor(np.stack([rng.permutation(6)[:3] for _ in range(tokens)]))

    def through() -> tuple[Tensor, kernels.Permutation]:
        rows, plan = kernels.permute(x, experts, 6)
        return kernels.unpermute(rows * rows, weights, plan), plan

    plain, expected = through()
    with monkeypatch.context() as patched:
        patched.setattr(fused, "available", lambda tensor: True)
        mine, plan = through()
    assert plan.counts == expected.counts
    assert (plan.order == expected.order).all()
    assert (plan.inverse == expected.inverse).all()
    same_gradients(mine, plain, [x, weights])


@pytest.mark.parametrize("counts", [[0, 4, 0, 20], [0, 0, 0, 0]], ids=str)
def test_products_beside_a_base_of_another_kind(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under dropout, and with FP8 and NF4 bases: a frozen stack's product, the adapter's, and both."""
    x, a, b = leaf(sum(counts), 24), leaf(4, 3, 24, seed=1), leaf(4, 40, 3, seed=2)
    stack = leaf(4, 40, 24, seed=3, frozen=True)

    def products() -> tuple[Tensor, ...]:
        return (
            kernels.grouped_linear(x, stack, counts),
            kernels.grouped_low_rank(x, a, b, 0.5, counts),
            kernels.grouped_lora_linear(x, stack, a, b, 0.5, counts),
        )

    plain = products()
    with monkeypatch.context() as patched:
        patched.setattr(fused, "available_for_products", lambda tensor: True)
        mine = products()
    assert [t.shape for t in mine] == [t.shape for t in plain] == [[sum(counts), 40]] * 3
    if sum(counts):
        same_gradients(mine[0], plain[0], [x])
        same_gradients(mine[1], plain[1], [x, a, b])
        same_gradients(mine[2], plain[2], [x, a, b])


def test_a_tokens_gradients_are_added_in_fp32() -> None:
    """Eight gradients of a token, 256 and seven ones: in bfloat16 a one is lost against 256."""
    x = paddle.zeros([1, 4], "bfloat16")
    x.stop_gradient = False
    experts = paddle.arange(8).reshape([1, 8])
    order, inverse, counts = fused_experts.sort_by_expert(experts, 8)
    assert counts.tolist() == [1] * 8
    rows = fused_experts.rows_by_expert(x, order, inverse, 8)
    outer = paddle.ones([8, 4], "float32")
    outer[0] = 256.0
    rows.backward(outer.astype("bfloat16"))
    # 263 lies between 262 and 264, the next numbers of bfloat16.
    assert (x.grad.astype("float32") >= 262).all()


def test_a_cpu_tensor_takes_the_plain_path() -> None:
    assert not fused.available(leaf(2, 2))


@pytest.mark.parametrize("adapted", [False, True])
def test_an_expert_pool_computes_the_same_either_way(adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from ernietune.lora import LoRAExperts
    from ernietune.models import moe
    from ernietune.models.config import ExpertPoolConfig
    from ernietune.targets import LoraSpec

    pool = moe.ExpertPool(16, ExpertPoolConfig(5, 24), 2, "float32")
    for seed, parameter in enumerate(pool.parameters()):
        parameter.set_value(leaf(*parameter.shape, seed=seed))
    leaves = [leaf(7, 16, seed=50)]
    if adapted:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = LoRAExperts(dict(pool.named_children())[name], LoraSpec(rank=2))
            layer.lora_B.set_value(leaf(*layer.lora_B.shape, seed=60))
            pool.add_sublayer(name, layer)
            leaves += [layer.lora_A, layer.lora_B]
    plain = pool(leaves[0])
    assert pool._fused(leaves[0]) == []
    monkeypatch.setattr(moe, "available_for_products", lambda x: True)
    same_gradients(pool(leaves[0]), plain, leaves)
    if adapted:
        pool.gate_proj.enabled = False
        assert pool._fused(leaves[0]) == []
