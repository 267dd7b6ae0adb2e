"""Our models against stored results of transformers and torch, in fp32; tests/golden/make.py made them."""

from __future__ import annotations

import json

import golden_case
import numpy as np
import paddle
import pytest

from ernietune.lora import adapters, inject
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM
from ernietune.text.positions import positions_3d
from ernietune.train.loop import accumulate
from ernietune.train.sft import sft, to_inputs

TOLERANCE = 1e-5


@pytest.fixture(params=golden_case.KINDS)
def case(request):
    """(kind, filled model, stored results)."""
    raw = json.loads((golden_case.FOLDER / f"{request.param}.json").read_text())
    model = CausalLM(ModelConfig.from_dict(raw, request.param))
    for name, tensor in model.state_dict().items():
        tensor.set_value(golden_case.values(name, tensor.shape))
    with np.load(golden_case.FOLDER / f"{request.param}.npz") as stored:
        return request.param, model, dict(stored)


def test_positions(case):
    kind, _, expected = case
    sample = golden_case.sample(kind)
    starts = np.flatnonzero(sample.ids == golden_case.IMAGE_START) + 1
    media = [(int(s), int(h * w // 4)) for s, (_, h, w) in zip(starts, sample.grids, strict=True)]
    found = positions_3d(len(sample.ids), media, sample.grids.tolist())
    np.testing.assert_array_equal(found, expected["positions"])


def test_logits(case):
    kind, model, expected = case
    with paddle.no_grad():
        logits = model.logits(model(to_inputs(golden_case.batch(kind)))).numpy()
    error = float(np.abs(logits - expected["logits"]).max())
    print(f"{kind}: logits differ by up to {error:.2e} (values up to {np.abs(logits).max():.2f})")
    assert error <= TOLERANCE
    np.testing.assert_array_equal(logits.argmax(-1), expected["logits"].argmax(-1))


def test_loss_and_gradients(case):
    kind, model, expected = case
    inject(model, golden_case.SPEC[kind])
    for path, layer in adapters(model):
        layer.lora_A.set_value(golden_case.values(f"{path}.lora_A", layer.lora_A.shape))
        layer.lora_B.set_value(golden_case.values(f"{path}.lora_B", layer.lora_B.shape))
    loss, _ = accumulate(model, sft, [golden_case.batch(kind)])
    assert loss == pytest.approx(float(expected["loss"]), rel=1e-6)
    layers = dict(adapters(model))
    for path in golden_case.GRADIENTS[kind]:
        for name, factor in (("lora_A", layers[path].lora_A), ("lora_B", layers[path].lora_B)):
            gradient = expected[f"{path}.{name}"]
            error = float(np.abs(factor.grad.numpy() - gradient).max() / np.abs(gradient).max())
            print(f"{kind}: {path}.{name} differs by {error:.2e} of its largest gradient")
            assert error <= TOLERANCE
