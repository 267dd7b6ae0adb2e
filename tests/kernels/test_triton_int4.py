"""int4 stacks for few rows: scales on the sums, and the instructions that unpack the codes."""

from __future__ import annotations

import pytest

import ernietune  # noqa: F401  (sets the environment before paddle)

pytest.importorskip("triton")

import numpy as np
import paddle
from ernietune_kernels import reference
from ernietune_kernels.gpu import products, stacks
from ernietune_kernels.gpu.products import Rows, Term
from ernietune_kernels.gpu.stacks import Stack
from paddle import Tensor


def close(found: Tensor, truth: Tensor, tolerance: float = 5e-6) -> None:
    """Equal up to `tolerance` of the largest value."""
    scale = float(np.abs(truth.numpy()).max())
    np.testing.assert_allclose(found.numpy(), truth.numpy(), rtol=0, atol=tolerance * scale)


def pack_int4(values: np.ndarray) -> np.ndarray:
    codes = (values + 8).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("both", [False, True], ids=["one", "gate and up"])
def test_few_rows_of_int4_scale_the_sums(group: int, both: bool) -> None:
    """Even and odd columns are two products there, and a group's scale is applied to their sum."""
    counts, (outputs, inputs) = [2, 0, 3], (40, 256)
    rng = np.random.default_rng(group)
    rows = Rows(5, paddle.to_tensor(np.array(counts, np.int32)))
    x = paddle.to_tensor(rng.standard_normal([5, inputs]).astype(np.float32))
    terms, truths = [], []
    for _ in range(2):
        codes = rng.integers(-8, 8, (3, outputs, inputs))
        scale = rng.uniform(0.01, 0.1, (3, outputs, inputs // group)).astype(np.float32)
        values = paddle.to_tensor((codes * np.repeat(scale, group, -1)).astype(np.float32))
        packed = paddle.to_tensor(pack_int4(codes))
        terms.append(Term(Stack(packed, paddle.to_tensor(scale), 4, group)))
        truths.append(reference.grouped_linear(x, values, counts))
    if both:
        halves, h = products.gate_up(x, rows, *terms)
        close(halves, paddle.concat(truths, 1))
        close(h, reference.swiglu(*truths), 1e-5)
    else:
        close(products.grouped(x, rows, terms[:1]), truths[0])


def test_nibbles_become_bf16_numbers() -> None:
    """The instructions, carried out one by one on every byte: two codes of 0 to 15 each, 8 taken away."""
    packed = np.arange(256, dtype=np.uint32).reshape(-1, 4) @ np.array(
        [1, 1 << 8, 1 << 16, 1 << 24], np.uint32
    )
    values: dict[str, np.ndarray] = {"$4": packed}

    def operand(word: str) -> np.ndarray:
        return values[word] if word in values else np.uint32(int(word, 0))

    for line in stacks.NIBBLES.value.strip("\n{}").splitlines():
        name, *words = line.replace(",", "").rstrip(";").split()
        if name.startswith("."):
            continue
        to, first, *rest = words[0], operand(words[1]), *map(operand, words[2:])
        values[to] = _instruction(name, first, *rest)
    for half, outs in ((0, "$0 $1"), (4, "$2 $3")):
        found = np.stack([_bf16(values[out]) for out in outs.split()], 1).reshape(-1)
        np.testing.assert_array_equal(found, (np.arange(256) >> half & 15) - 8.0)


def _instruction(name: str, a: np.ndarray, *others: np.ndarray) -> np.ndarray:
    if name == "prmt.b32":
        source = np.concatenate([_bytes(a), np.broadcast_to(_bytes(others[0]), _bytes(a).shape)], -1)
        picked = [
            source[..., int(others[1]) >> 4 * i & 7].astype(np.uint32) << np.uint32(8 * i) for i in range(4)
        ]
        return np.bitwise_or.reduce(picked)
    if name == "fma.rn.bf16x2":
        numbers = _bf16(a) * _bf16(others[0]) + _bf16(others[1])
        halves = (numbers.astype(np.float32).view(np.uint32) >> 16).reshape(-1, 2)
        return halves[:, 0] | halves[:, 1] << 16
    simple = {"mov.b32": lambda x: x, "and.b32": np.bitwise_and, "shr.u32": np.right_shift}
    return simple[name](a, *others)


def _bytes(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words, np.uint32)[..., None].view(np.uint8)


def _bf16(words: np.ndarray) -> np.ndarray:
    """Two numbers a word, the lower half first."""
    halves = np.ascontiguousarray(words, np.uint32).reshape(-1, 1).view(np.uint16).astype(np.uint32)
    return (halves << 16).view(np.float32)
