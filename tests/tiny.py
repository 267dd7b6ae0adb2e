"""Tiny models of the real structure with random weights, for tests that need no checkpoint."""

import copy

import numpy as np
import paddle

from ernietune.models.config import SHAPES, ModelConfig
from ernietune.models.decoder import CausalLM, Inputs
from ernietune.text.positions import positions_3d

TOKENS = {
    "im_patch_id": 5,
    "image_start_token_id": 6,
    "image_end_token_id": 7,
    "video_start_token_id": 8,
    "video_end_token_id": 9,
}


def config(shape="tiny-vl", **changes):
    raw = copy.deepcopy(SHAPES[shape])
    if "vl" in shape:
        raw.update(TOKENS)
    raw.update(changes)
    return ModelConfig.from_dict(raw, "test")


def fill(model, seed=0):
    """Random values: weights small, norms near one, a correction bias that changes the selection."""
    generator = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        values = generator.standard_normal(tensor.shape).astype(np.float32)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("correction_bias"):
            values = 0.05 * values
        else:
            values = values * (0.5 / np.sqrt(tensor.shape[-1]) if tensor.ndim > 1 else 0.1)
        tensor.set_value(values.astype(np.float32))
    return model


def model(shape="tiny-vl", seed=0, **changes):
    return fill(CausalLM(config(shape, **changes)), seed)


def picture(grid, seed=0):
    frames, height, width = grid
    generator = np.random.default_rng(seed)
    return generator.standard_normal((frames * height * width, 588)).astype(np.float32)


def document(layout, grids=(), seed=0, vocab=200):
    """ids and positions of one document; `layout` mixes numbers of text tokens and "image" marks."""
    generator = np.random.default_rng(seed)
    ids, media, left = [], [], list(grids)
    for item in layout:
        if item == "image":
            frames, height, width = left.pop(0)
            count = max(frames // 2, 1) * height * width // 4
            ids.append(TOKENS["image_start_token_id"])
            media.append((len(ids), count))
            ids += [TOKENS["im_patch_id"]] * count + [TOKENS["image_end_token_id"]]
        else:
            ids += generator.integers(10, vocab, item).tolist()
    return np.array(ids), positions_3d(len(ids), media, list(grids))


def pack(documents, grids=(), patches=None):
    """Inputs for documents [(ids, positions)] packed one after the other."""
    ids = np.concatenate([d[0] for d in documents])
    until = np.repeat(np.cumsum([len(d[0]) for d in documents]), [len(d[0]) for d in documents])
    return Inputs(
        ids=paddle.to_tensor(ids),
        positions=paddle.to_tensor(np.concatenate([d[1] for d in documents])),
        visible_until=paddle.to_tensor(until),
        is_vision=paddle.to_tensor(np.isin(ids, list(TOKENS.values()))),
        patches=None if patches is None else paddle.to_tensor(np.concatenate(patches)),
        grids=tuple(grids),
    )
