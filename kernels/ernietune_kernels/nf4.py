"""Weights as NF4 codes (QLoRA): sixteen levels that split a normal distribution evenly, in plain Paddle.

value = LEVELS[code] * scale, where the scale is the largest magnitude of a group of columns of a row. Two
codes a byte, low nibble = even column. Scales are fp32 and not quantised themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

# The published levels: quantiles of N(0, 1) in [-1, 1] with an exact zero, eight above and seven below it.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_BORDERS = (LEVELS[1:] + LEVELS[:-1]) / 2
_PAIRS = np.stack([np.tile(LEVELS, 16), np.repeat(LEVELS, 16)], axis=-1)  # byte -> both of its levels


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A weight [.., out, in]: codes uint8 [.., out, in / 2], scales fp32 [.., out, in / group]."""

    codes: Tensor
    scale: Tensor
    group: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.size + 4 * self.scale.size


def codes_of(rows: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of fp32 numbers [.., out, in], each rounded to the nearest level."""
    grouped = rows.reshape([*rows.shape[:-1], -1, group])
    scale = np.abs(grouped).max(-1)
    by = np.where(scale == 0, np.float32(1), scale)[..., None]
    codes = np.searchsorted(_BORDERS, grouped / by).astype(np.uint8).reshape(rows.shape)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale


def dequantize(weight: Nf4Weight) -> Tensor:
    """The numbers that the codes stand for, fp32 [.., out, in]."""
    values = paddle.gather(paddle.to_tensor(_PAIRS), weight.codes.flatten().astype("int32"))
    grouped = values.reshape([*weight.shape[:-1], -1, weight.group])
    return grouped.multiply_(weight.scale.unsqueeze(-1)).reshape(weight.shape)


def expert(weight: Nf4Weight, index: int) -> Nf4Weight:
    """One matrix of a stack [experts, out, in]."""
    return Nf4Weight(weight.codes[index], weight.scale[index], weight.group, weight.shape[1:])
