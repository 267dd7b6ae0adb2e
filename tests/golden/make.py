"""Compute the expected results of tests/models/test_golden.py with transformers and torch.

    PYTHONPATH=.:kernels:tests python tests/golden/make.py

Needs the `parity` extra. Weights and inputs come from tests/golden_case.py; stored are the configuration, the
positions, the logits, the loss, and gradients of a few adapters.
"""

from __future__ import annotations

import tempfile

import golden_case
import numpy as np
import reference_adapters
import references
import torch

import ernietune  # noqa: F401 - sets the environment before paddle
from ernietune.checkpoint.load import load_model
from ernietune.lora import adapters, inject
from ernietune.text.template import IGNORE


def make(kind):
    reference = references.build(kind)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = load_model(folder)
        (golden_case.FOLDER / f"{kind}.json").write_bytes(open(f"{folder}/config.json", "rb").read())
    fill(kind, reference, model)
    inject(model, golden_case.SPEC[kind])
    for path, layer in adapters(model):
        layer.lora_A.set_value(golden_case.values(f"{path}.lora_A", layer.lora_A.shape))
        layer.lora_B.set_value(golden_case.values(f"{path}.lora_B", layer.lora_B.shape))
    results = compute(kind, reference, reference_adapters.Adapted(kind, reference, model))
    path = golden_case.FOLDER / f"{kind}.npz"
    np.savez_compressed(path, **results)
    print(f"{path.name}: {path.stat().st_size:,} bytes, loss {results['loss']:.6f}")


def fill(kind, reference, model):
    """Give the reference the numbers that belong to our names."""
    theirs = dict(reference.named_parameters())
    filled = set()
    for name, tensor in model.state_dict().items():
        place, where = reference_adapters.place(kind, name, tensor.shape)
        place = place.replace(".correction_bias", ".moe_statics.e_score_correction_bias")
        values = torch.tensor(golden_case.values(name, tensor.shape))
        with torch.no_grad():
            part = reference_adapters.part(theirs[place], where)
            part.copy_(values.reshape(part.shape))
        filled.add(place)
    assert filled == set(theirs), filled ^ set(theirs)


def compute(kind, reference, adapted):
    """Logits of the bare model; loss and gradients of the adapted one."""
    sample = golden_case.sample(kind)
    extra = (
        references.picture_inputs(sample.ids, sample.grids, [golden_case.pixels(kind)])
        if kind == "vl"
        else {}
    )
    results = {"logits": references.logits(reference, sample.ids, **extra), "positions": sample.positions}
    if kind == "vl":
        found, _ = reference.model.get_rope_index(
            torch.tensor(sample.ids)[None], extra["mm_token_type_ids"], extra["image_grid_thw"]
        )
        results["positions"] = found[:3, 0].numpy().T
    logits = adapted(input_ids=torch.tensor(sample.ids)[None], **extra).logits[0]
    targets = torch.tensor(sample.labels[1:])
    loss = torch.nn.functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORE)
    loss.backward()
    results["loss"] = np.float32(loss.item())
    for path in golden_case.GRADIENTS[kind]:
        for letter, factor in zip("AB", adapted.factors[path], strict=True):
            results[f"{path}.lora_{letter}"] = factor.grad.numpy()
    return results


if __name__ == "__main__":
    for each in golden_case.KINDS:
        make(each)
