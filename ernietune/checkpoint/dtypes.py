"""Stored numbers as numpy arrays: bfloat16 travels as uint16 bits, float8 as uint8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernietune.errors import CheckpointError

Array = NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Elements converted at a time: 4 MB of fp32 stays in the cache, so temporaries cost neither memory nor time.
_CHUNK = 1 << 20


def to_float32(stored: Array, dtype: str) -> NDArray[np.float32]:
    """Return the numbers of a stored array as a new fp32 array; CheckpointError for integer dtypes."""
    result = np.empty(stored.shape, np.float32)
    widen_into(result, stored, dtype)
    return result


def widen_into(result: NDArray[np.float32], stored: Array, dtype: str) -> None:
    """Write the numbers of `stored` into the contiguous fp32 array `result` of the same shape."""
    if dtype not in FLOATS:
        raise CheckpointError(f"{dtype} is no floating-point dtype, so it cannot hold a weight")
    if dtype == "BF16":
        bits = result.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    elif dtype == "F8_E5M2":
        np.copyto(result, (stored.astype(np.uint16) << 8).view(np.float16))
    elif dtype == "F8_E4M3":
        np.take(_e4m3_values(), stored, out=result)
    else:
        np.copyto(result, stored, casting="same_kind")


def from_float32(numbers: NDArray[np.float32], dtype: str) -> Array:
    """Return fp32 numbers in a stored form: F32, F16 or BF16, rounded to nearest, ties to even."""
    if dtype == "F32":
        return numbers
    if dtype == "F16":
        return numbers.astype(np.float16)
    if dtype != "BF16":
        raise CheckpointError(f"cannot write weights as {dtype}; use F32, F16 or BF16")
    result = np.empty(numbers.shape, np.uint16)
    flat_in, flat_out = np.ascontiguousarray(numbers).reshape(-1), result.reshape(-1)
    for start in range(0, flat_in.size, _CHUNK):
        flat_out[start : start + _CHUNK] = _bfloat16_bits(flat_in[start : start + _CHUNK])
    return result


def _bfloat16_bits(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = numbers.view(np.uint32)
    # Adding just under half of the dropped part, plus the last kept bit, rounds ties to even.
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if is_nan.any():  # rounding could carry a NaN into infinity; set its quiet bit instead
        rounded[is_nan] = (bits[is_nan] >> 16) | 0x40
    result: NDArray[np.uint16] = rounded.astype(np.uint16)
    return result


def _e4m3_values() -> NDArray[np.float32]:
    """All 256 float8 e4m3fn numbers: bias 7, no infinity, NaN only at 0x7f and 0xff."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)
    value[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -value, value).astype(np.float32)
