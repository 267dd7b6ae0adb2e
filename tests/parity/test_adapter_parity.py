"""Adapters and their merged exports, opened by transformers and by PEFT: the logits of our adapted model."""

import numpy as np
import paddle
import pytest
import reference_adapters
import references
import tiny

from ernietune.checkpoint.adapter import save_adapter
from ernietune.checkpoint.load import load_model
from ernietune.export import export
from ernietune.lora import LoraSpec, disabled, inject

torch = references.torch
pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
TARGETS = {
    "dense": ("attention", "mlp"),
    "moe": ("attention", "mlp", "shared_experts", "experts"),
    "vl": ("attention", "mlp", "shared_experts", "experts", "vision", "resampler"),
}
GRIDS = [(1, 4, 6), (1, 8, 4)]


def adapted(kind, folder, **spec):
    """(transformers model, our model with random adapters), of one folder written by transformers."""
    reference = references.build(kind)
    reference.save_pretrained(folder / "base")
    model = load_model(folder / "base")
    inject(model, LoraSpec(rank=4, targets=TARGETS[kind], **spec))
    reference_adapters.randomize(model, seed=2)
    model.eval()
    save_adapter(model, folder / "adapter", str(folder / "base"))
    return reference, model


def inputs(kind):
    """One document, with two pictures for a VL model: (ids, ours, keyword arguments of transformers)."""
    layout, grids = ([4, "image", 3, "image", 6], GRIDS) if kind == "vl" else ([25], [])
    ids, positions = tiny.document(layout, grids, seed=3, vocab=300)
    patches = [tiny.picture(grid, seed) for seed, grid in enumerate(grids)]
    extra = references.picture_inputs(ids, grids, patches) if kind == "vl" else {}
    return ids, tiny.pack([(ids, positions)], grids, patches or None), extra


def compare(name, actual, expected):
    error = float(np.abs(actual - expected).max())
    print(f"{name}: max abs difference {error:.2e} (values up to {np.abs(expected).max():.2f})")
    assert error <= TOLERANCE
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kind", list(references.BUILDERS))
def test_a_merged_export_in_transformers(kind, tmp_path):
    reference, model = adapted(kind, tmp_path, alpha=6)
    report = export(tmp_path / "adapter", tmp_path / "merged")
    merged, loading = type(reference).from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert {key: value for key, value in loading.items() if value} == {}
    ids, own, extra = inputs(kind)
    with paddle.no_grad():
        expected = model.logits(model(own)).numpy()
        with disabled(model):
            plain = model.logits(model(own)).numpy()
    assert np.abs(plain - expected).max() > 0.1
    compare(f"{kind} base", plain, references.logits(reference, ids, **extra))
    compare(
        f"{kind} merged ({report.changed} tensors)", references.logits(merged.eval(), ids, **extra), expected
    )


@pytest.mark.parametrize("spec", [{"alpha": 6}, {"alpha": 3, "rslora": True}], ids=str)
def test_an_adapter_in_peft(spec, tmp_path):
    peft = pytest.importorskip("peft")
    reference, model = adapted("dense", tmp_path, **spec)
    ids, own, _ = inputs("dense")
    with paddle.no_grad():
        expected = model.logits(model(own)).numpy()
    wrapped = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    weights = {name: p for name, p in wrapped.named_parameters() if "lora_" in name}
    assert len(weights) == 2 * 3 * 7
    assert all(p.abs().max() > 0 for p in weights.values())
    compare(f"peft {spec}", references.logits(wrapped, ids), expected)
