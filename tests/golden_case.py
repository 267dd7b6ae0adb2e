"""The models and inputs of tests/golden: every number follows from its name, so that only results are stored.

Raw generator bits stay the same in every numpy release; distributions are not promised to.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from ernietune.data.collate import collate
from ernietune.data.dataset import Sample
from ernietune.lora import LoraSpec
from ernietune.media.image import normalize
from ernietune.text.template import IGNORE

FOLDER = Path(__file__).parent / "golden"
KINDS = ("dense", "moe", "vl")
SPEC = {
    "dense": LoraSpec(rank=2, alpha=3, targets=("attention", "mlp")),
    "moe": LoraSpec(rank=2, alpha=3, targets=("attention", "experts", "shared_experts"), rslora=True),
    "vl": LoraSpec(rank=2, alpha=3, targets=("attention", "experts", "vision", "resampler")),
}
GRADIENTS = {
    "dense": ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"),
    "moe": ("model.layers.1.mlp.text_experts.up_proj", "model.layers.2.mlp.shared_experts.gate_proj"),
    "vl": (
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.text_experts.down_proj",
        "model.layers.2.mlp.vision_experts.gate_proj",
        "model.resampler_model.spatial_linear.0",
        "vision_model.blocks.0.attn.qkv",
    ),
}
IMAGE, IMAGE_START, IMAGE_END = 5, 6, 7
GRIDS = [(1, 4, 6), (1, 2, 8)]


def bits(name, count):
    """`count` numbers of 16 bits."""
    return (np.random.PCG64(zlib.crc32(name.encode())).random_raw(count) >> 48).astype(np.int64)


def values(name, shape):
    """fp32 numbers for a parameter: matrices and biases around zero, norms around one."""
    uniform = (bits(name, math.prod(shape)).reshape(shape) / 32768 - 1).astype(np.float32)
    if name.endswith("lora_A"):
        return uniform * np.float32(0.2)
    if name.endswith("lora_B"):
        return uniform * np.float32(0.3)
    if "norm" in name or "_linear.3." in name or ".ln." in name:
        return uniform * np.float32(0.2) + np.float32(1)
    return uniform * np.float32(0.1)


def sample(kind):
    """A document of 20 words and, for a VL model, two pictures in between; the first words are untrained."""
    words = 12 + bits(f"{kind} words", 20) % 288
    grids = np.array(GRIDS if kind == "vl" else [], np.int64).reshape(-1, 3)
    pieces = [words[:4]]
    for number, (_, rows, columns) in enumerate(grids):
        pieces += [[IMAGE_START], [IMAGE] * (rows * columns // 4), [IMAGE_END]]
        pieces.append(words[4 + 4 * number : 8 + 4 * number])
    ids = np.concatenate([*pieces, words[12:] if kind == "vl" else words[4:]]).astype(np.int64)
    is_vision = np.isin(ids, (IMAGE, IMAGE_START, IMAGE_END))
    labels = np.where(is_vision | (np.arange(len(ids)) < 3), IGNORE, ids)
    patches = bits("pixels", int(grids.prod(1).sum()) * 588).reshape(-1, 588) % 256
    return Sample(ids, labels, is_vision, positions(ids, grids), patches.astype(np.uint8), grids, kind)


def positions(ids, grids):
    """By ERNIE's rule, written out once more: a picture's grid starts where the text stood."""
    rows, current, left = [], 0, list(grids)
    index = 0
    while index < len(ids):
        if ids[index] != IMAGE:
            rows.append((current, current, current))
            current, index = current + 1, index + 1
            continue
        _, height, width = (int(n) for n in left.pop(0))
        block = [(current, current + r, current + c) for r in range(height // 2) for c in range(width // 2)]
        rows += block
        current, index = max(max(row) for row in block) + 1, index + len(block)
    return np.array(rows, np.int64)


def batch(kind):
    """The document as one micro-batch."""
    return collate([[sample(kind)]])


def pixels(kind):
    """Normalised fp32 patches."""
    return normalize(sample(kind).patches)
