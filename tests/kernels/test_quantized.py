"""Stored weights: the codes against the written contract, the C kernels against the plain path."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest
from ernietune_kernels import quantized, stored
from ernietune_kernels.cpu import build, library
from ernietune_kernels.quantized import dequantize, group_of, quantize
from ernietune_kernels.stored import StoredWeight


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def weight_of(form: str, array: np.ndarray) -> object:
    if form == "bf16":
        return paddle.to_tensor(array).astype("bfloat16")
    return quantize(array, 8) if form == "int8" else quantize(array, 4, group_of(array.shape[-1]) or 0)


def close(actual: paddle.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert list(actual.shape) == list(expected.shape)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def tolerance_of(form: str, rows: int) -> float:
    """Few rows are two digits a number beside codes (see the bound below), many of int4 go as bf16: 2^-9."""
    if form == "bf16":
        return 2e-5
    return 8e-5 if rows <= library.FEW_ROWS else {"int8": 2e-5, "int4": 4e-3}[form]


def test_int8_is_symmetric_with_one_scale_per_output_channel() -> None:
    weight = quantize(np.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], np.float32), 8)
    assert weight.codes.numpy().tolist() == [[64, -127, 32], [0, 0, 0]]
    assert weight.scale.numpy().tolist() == [np.float32(2) / np.float32(127), 0]
    assert (weight.bits, weight.group, weight.shape) == (8, 3, (2, 3))


def test_int4_has_two_codes_a_byte_low_nibble_first() -> None:
    row = np.zeros((1, 32), np.float32)
    row[0, :4] = [-8.0, 3.0, 7.4, -1.6]
    weight = quantize(row, 4, 32)
    assert weight.scale.numpy().tolist() == [[1.0]]
    assert weight.codes.numpy()[0, :3].tolist() == [0 | 11 << 4, 15 | 6 << 4, 8 | 8 << 4]
    assert dequantize(weight).numpy()[0, :5].tolist() == [-8, 3, 7, -2, 0]


def test_every_int4_group_has_its_own_scale() -> None:
    row = np.ones((2, 256), np.float32)
    row[:, 128:] = -0.25
    weight = quantize(row, 4, 128)
    assert weight.scale.shape == [2, 2]
    np.testing.assert_array_equal(dequantize(weight).numpy(), row)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.5), (4, 1.0)])
def test_rounding_is_to_the_nearest_code(bits: int, worst: float) -> None:
    # A step is the scale; at int4 the side opposite to the largest number ends one step early, at code 7.
    array = numbers(6, 256)
    weight = quantize(array, bits)
    steps = np.abs(weight.scale.numpy()).reshape([6, -1]).repeat(256 if bits == 8 else 128, axis=1)
    assert (np.abs(dequantize(weight).numpy() - array) <= worst * steps * 1.001).all()


@pytest.mark.parametrize(("width", "group"), [(256, 128), (192, 64), (96, 32), (80, None), (31, None)])
def test_the_group_is_the_largest_that_divides(width: int, group: int | None) -> None:
    assert group_of(width) == group


def test_paddle_tensors_quantize_like_arrays() -> None:
    tensor = paddle.to_tensor(numbers(3, 64)).astype("bfloat16")
    one, other = quantize(tensor, 4, 64), quantize(tensor.astype("float32").numpy(), 4, 64)
    np.testing.assert_array_equal(one.codes.numpy(), other.codes.numpy())


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 33])
@pytest.mark.parametrize(("out", "width"), [(1, 32), (5, 96), (37, 288), (130, 128)])
def test_the_kernels_agree_with_the_plain_path(form: str, rows: int, out: int, width: int) -> None:
    weight, x = weight_of(form, numbers(out, width)), paddle.to_tensor(numbers(rows, width))
    wide = quantized.widened(weight).numpy().astype(np.float64)
    close(StoredWeight(weight).product(x), x.numpy() @ wide.T, tolerance_of(form, rows))


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "out", "width"), [(20, 600, 1088), (33, 70, 1120), (290, 530, 1088), (545, 64, 64)]
)
def test_products_larger_than_every_block_of_the_kernels(form: str, rows: int, out: int, width: int) -> None:
    weight, x = weight_of(form, numbers(out, width)), paddle.to_tensor(numbers(rows, width))
    wide = quantized.widened(weight).numpy().astype(np.float64)
    close(StoredWeight(weight).product(x), x.numpy() @ wide.T, tolerance_of(form, rows))


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_on_tiles_threads_and_onednn(
    form: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way in turn, on the same threads: tiles are set up anew by whoever comes next."""
    built, parallel = library.kernels(), library._parallel()
    if built is None or parallel is None:
        pytest.skip("no compiler or no OpenMP runtime here")
    weight, x = weight_of(form, numbers(300, 160)), paddle.to_tensor(numbers(50, 160))
    wanted = x.numpy() @ quantized.widened(weight).numpy().astype(np.float64).T
    stack = weight_of(form, numbers(2, 40, 160))
    each = quantized.widened(stack).numpy().astype(np.float64)
    by_expert = np.concatenate([x.numpy()[:29] @ each[0].T, x.numpy()[29:] @ each[1].T])
    tiles = built.takes_many_rows
    built.c.ernie_threads(parallel, threads)
    try:
        for uses_tiles in (tiles, False, tiles):
            monkeypatch.setattr(built, "takes_many_rows", uses_tiles)
            close(StoredWeight(weight).product(x), wanted, tolerance_of(form, 50))
            close(StoredWeight(stack).grouped(x, [29, 21]), by_expert, tolerance_of(form, 50))
    finally:
        built.c.ernie_threads(parallel, built.threads)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("width", [32, 192, 512])
def test_digits_are_off_by_2_to_the_minus_16_of_the_largest_of_eight_numbers(form: str, width: int) -> None:
    # An outlier in every fourth block must not cost its neighbours their digits.
    array = numbers(3, width)
    array[:, 5::512] *= 1e4
    weight = weight_of(form, numbers(40, width))
    wide = quantized.widened(weight).numpy().astype(np.float64)
    padded = np.zeros((3, -(-width // 128) * 128))
    padded[:, :width] = np.abs(array)
    halves = padded.reshape(3, -1, 2, 16, 4) if form == "int8" else padded.reshape(3, -1, 1, 16, 8)
    largest = np.broadcast_to(halves.max((2, 4), keepdims=True), halves.shape).reshape(3, -1)[:, :width]
    bound = largest / 2**16 @ np.abs(wide.T) * 1.02 + 1e-6 * np.abs(array) @ np.abs(wide.T)
    error = np.abs(StoredWeight(weight).product(paddle.to_tensor(array)).numpy() - array @ wide.T)
    assert (error <= bound).all()


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("width", [1, 7, 17, 50, 65])
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_any_width_is_read_to_its_end(form: str, width: int, rows: int) -> None:
    weight, x = weight_of(form, numbers(9, width)), paddle.to_tensor(numbers(rows, width))
    wide = quantized.widened(weight).numpy().astype(np.float64)
    close(StoredWeight(weight).product(x), x.numpy() @ wide.T, tolerance_of(form, rows))


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("counts", [[2, 0, 1, 3], [0, 0, 0, 1], [12, 0, 9, 1], [0, 0, 0, 0]])
def test_experts_with_and_without_rows(form: str, counts: list[int]) -> None:
    weight = weight_of(form, numbers(4, 24, 64))
    x = paddle.to_tensor(numbers(sum(counts) + 1, 64)[1:])
    wide = quantized.widened(weight).numpy().astype(np.float64)
    chosen = np.repeat(np.arange(4), counts)
    expected = np.einsum("ni,noi->no", x.numpy(), wide[chosen])
    result = StoredWeight(weight).grouped(x, counts)
    if len(chosen):
        close(result, expected, max(tolerance_of(form, count) for count in counts if count))
    assert list(result.shape) == [len(chosen), 24]


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, np.float32), (4, np.float32), (8, np.uint16), (4, np.uint16)]
)
def test_quantising_in_c_gives_the_same_codes(bits: int, dtype: type) -> None:
    array = numbers(2, 10, 128)
    tensor = paddle.to_tensor(array)
    source = array if dtype is np.float32 else tensor.astype("bfloat16").numpy()
    expected = quantize(tensor if dtype is np.float32 else tensor.astype("bfloat16"), bits, 64)
    filled = quantized.empty((2, 10, 128), bits, 64)
    for index in range(2):
        stored.quantize_into(filled, index, source[index])
    np.testing.assert_array_equal(filled.codes.numpy(), expected.codes.numpy())
    np.testing.assert_array_equal(filled.scale.numpy(), expected.scale.numpy())


def test_without_a_compiler_the_plain_path_answers_after_one_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            weight, x = weight_of("int8", numbers(5, 64)), paddle.to_tensor(numbers(3, 64))
            for _ in range(2):
                close(StoredWeight(weight).product(x), quantized.linear(x, weight).numpy(), 0)
            close(StoredWeight(weight).product(x), quantized.linear(x, weight).numpy(), 0)
        assert [r.message for r in caplog.records if "no C compiler (no-such-compiler)" in r.message]
        assert len(caplog.records) == 1
    finally:
        library.kernels.cache_clear()


def test_kernels_that_miscalculate_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = library.Library.product
    monkeypatch.setattr(library.Library, "product", lambda *a: right(*a) * 1.01)
    library.kernels.cache_clear()
    try:
        assert library.kernels() is None
        assert "differ from the plain path" in caplog.text
    finally:
        library.kernels.cache_clear()


def test_two_at_once_build_one_whole_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build.library(), range(2))
    assert first == second
    assert [file.name for file in (tmp_path / "ernietune").iterdir()] == [first.name]
    assert library.Library(first, 1).threads == 1


def test_the_switch_leaves_the_kernels_alone() -> None:
    code = "import ernietune\nfrom ernietune_kernels.cpu.library import kernels\nassert kernels() is None"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, library.PLAIN: "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
