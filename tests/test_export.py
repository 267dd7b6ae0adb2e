"""Exports: exact sums at the right places, everything else untouched, nothing half-written."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest

from ernietune import export as exporting
from ernietune.checkpoint import safetensors
from ernietune.checkpoint.adapter import save_adapter
from ernietune.checkpoint.dtypes import from_float32
from ernietune.checkpoint.load import load_model, save_model
from ernietune.checkpoint.safetensors import Reader
from ernietune.errors import CheckpointError
from ernietune.export import export
from ernietune.initialize import initialize
from ernietune.lora import LoraSpec, adapters, inject


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    kinds = (("tiny-dense", "pt"), ("tiny-moe", "paddle"), ("tiny-vl", "pt"), ("tiny-vl", "paddle"))
    return {
        (kind, layout): initialize(kind, root / f"{kind}-{layout}", layout=layout) for kind, layout in kinds
    }


def adapted(base, folder, targets=("attention",)):
    model = load_model(base)
    inject(model, LoraSpec(rank=4, alpha=6, targets=targets))
    random = np.random.default_rng(3)
    for _, layer in adapters(model):
        layer.lora_B.set_value(0.1 * random.standard_normal(layer.lora_B.shape).astype(np.float32))
    save_adapter(model, folder, str(base))
    return model


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("tiny-dense", "pt"), ("tiny-moe", "paddle"), ("tiny-vl", "pt"), ("tiny-vl", "paddle")],
)
def test_merged_parameters_are_the_sums(bases, tmp_path, kind, layout):
    base = bases[kind, layout]
    targets = {
        "tiny-dense": ("attention", "mlp"),
        "tiny-moe": ("experts", "shared_experts"),
        "tiny-vl": ("attention", "experts", "vision", "resampler"),
    }[kind]
    model = adapted(base, tmp_path / "adapter", targets)
    report = export(tmp_path / "adapter", tmp_path / "merged", max_shard_bytes=400_000)
    before = {n: t.numpy() for n, t in load_model(base).state_dict().items()}
    after = {n: t.numpy() for n, t in load_model(tmp_path / "merged").state_dict().items()}
    deltas = {
        f"{path}.weight": 1.5 * layer.lora_B.numpy() @ layer.lora_A.numpy() for path, layer in adapters(model)
    }
    assert deltas
    for name, numbers in after.items():
        exact = before[name] + deltas.get(name, 0)
        assert (np.abs(numbers - exact) <= np.abs(exact) * 2**-8 + 1e-6).all(), name
        assert np.array_equal(numbers, before[name]) == (name not in deltas), name
    assert report.changed + report.copied == len(Reader(base).infos)
    assert 0 < report.max_error < 0.01


def test_untouched_tensors_and_files_are_copied(bases, tmp_path):
    base = bases["tiny-vl", "paddle"]
    (base / ".cache").mkdir(exist_ok=True)
    adapted(base, tmp_path / "adapter", ("attention", "experts"))
    report = export(tmp_path / "adapter", tmp_path / "merged")
    one, other = Reader(base), Reader(tmp_path / "merged")
    assert one.infos == other.infos
    changed = [i.name for i in one.infos if not np.array_equal(one.raw(i.name), other.raw(i.name))]
    # per layer qkv and o, per MoE layer 16 experts with a fused and a down tensor
    assert len(changed) == report.changed == 3 * 2 + 2 * 16 * 2
    files = {p.name for p in base.iterdir() if p.is_file()}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == files
    for name in files - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_part_of_a_fused_tensor(bases, tmp_path):
    base = bases["tiny-moe", "paddle"]
    adapted(base, tmp_path / "adapter", (r"model\.layers\.0\.self_attn\.k_proj",))
    export(tmp_path / "adapter", tmp_path / "merged")
    name = "ernie.layers.0.self_attn.qkv_proj.weight"
    before, after = Reader(base).array(name), Reader(tmp_path / "merged").array(name)
    same = (before == after).all(axis=0)
    assert same[:128].all()  # q
    assert not same[128:192].any()  # k
    assert same[192:].all()  # v


def test_the_merged_model_computes_what_the_adapted_model_did(bases, tmp_path):
    import paddle

    from ernietune.models.decoder import Inputs

    base = bases["tiny-dense", "pt"]
    wide = tmp_path / "wide"  # fp32 on disk: no rounding between the two
    save_model(load_model(base), wide, config_raw=json.loads((base / "config.json").read_text()), dtype="F32")
    model = adapted(wide, tmp_path / "adapter", ("attention", "mlp"))
    export(tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    ids = paddle.to_tensor(np.arange(5, 17))
    inputs = Inputs(ids, paddle.arange(12).unsqueeze(-1).tile([1, 3]))
    expected, found = (m.logits(m(inputs)).numpy() for m in (model, merged))
    plain = load_model(wide)
    assert np.abs(plain.logits(plain(inputs)).numpy() - expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_run_folder_gives_its_best_checkpoint(bases, tmp_path):
    base = bases["tiny-dense", "pt"]
    run = tmp_path / "run"
    adapted(base, run / "checkpoints" / "step-000010")
    (run / "checkpoints" / "step-000020").mkdir()
    (run / "run.json").write_text(json.dumps({"last": "step-000020", "best": "step-000010"}))
    assert export(run, tmp_path / "merged").changed == 12


def test_a_full_fine_tune_is_copied_without_trainer_state(bases, tmp_path):
    base = bases["tiny-moe", "paddle"]
    model = load_model(base)
    model.model.norm.weight.set_value(model.model.norm.weight.numpy() * 2)
    save_model(model, tmp_path / "step", like=base)
    safetensors.write_file(tmp_path / "step" / "trainer.safetensors", {"m": ("F32", np.ones(2, np.float32))})
    (tmp_path / "step" / "trainer.json").write_text("{}")
    report = export(tmp_path / "step", tmp_path / "out")
    assert (report.changed, report.copied) == (0, len(Reader(base).infos))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}
    assert (Reader(tmp_path / "out").float32("ernie.norm.weight") == 2).all()
    with pytest.raises(CheckpointError, match="whole model"):
        export(tmp_path / "step", tmp_path / "other", base=base)


def test_the_base_may_have_moved(bases, tmp_path):
    base = bases["tiny-dense", "pt"]
    adapted(base, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "base_model_name_or_path": "/no/such/folder"}))
    with pytest.raises(CheckpointError, match="the base model is not there: /no/such/folder"):
        export(tmp_path / "adapter", tmp_path / "merged")
    assert export(tmp_path / "adapter", tmp_path / "merged", base=base).changed == 12
    config.write_text(json.dumps({**raw, "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="names no base model"):
        export(tmp_path / "adapter", tmp_path / "merged2")


def test_an_adapter_of_another_model_is_refused(bases, tmp_path):
    adapted(bases["tiny-moe", "paddle"], tmp_path / "adapter", ("experts",))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.\w+ is no layer of the base"):
        export(tmp_path / "adapter", tmp_path / "merged", base=bases["tiny-dense", "pt"])
    assert not (tmp_path / "merged").exists()


def test_refused_sources_and_outputs(bases, tmp_path):
    adapted(bases["tiny-dense", "pt"], tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="not empty"):
        export(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="neither adapter_config.json nor model weights"):
        export(tmp_path / "nowhere", tmp_path / "merged")


def test_a_full_disk_leaves_no_output(bases, tmp_path, monkeypatch):
    adapted(bases["tiny-dense", "pt"], tmp_path / "adapter")

    def full(self, name, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors._OutFile, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(tmp_path / "adapter", tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("victim", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_reading_back_catches_wrong_bytes(bases, tmp_path, monkeypatch, victim):
    adapted(bases["tiny-dense", "pt"], tmp_path / "adapter")
    original = safetensors._OutFile.write

    def corrupting(self, name, data):
        data = data.copy()
        data.reshape(-1).view(np.uint8)[3] ^= 4 if name == victim else 0
        original(self, name, data)

    monkeypatch.setattr(safetensors._OutFile, "write", corrupting)
    with pytest.raises(CheckpointError, match=f"{victim} read back"):
        export(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_diverged_adapter_is_refused(bases, tmp_path):
    model = adapted(bases["tiny-dense", "pt"], tmp_path / "first")
    _, layer = next(adapters(model))
    layer.lora_A.set_value(np.full(layer.lora_A.shape, np.nan, np.float32))
    save_adapter(model, tmp_path / "adapter", str(bases["tiny-dense", "pt"]))
    with pytest.raises(CheckpointError, match="not finite after the merge"):
        export(tmp_path / "adapter", tmp_path / "merged")


def test_dtypes_that_cannot_be_merged(bases, tmp_path):
    reader = Reader(bases["tiny-dense", "pt"])
    infos = [
        safetensors.TensorInfo(i.name, "F8_E4M3" if i.name.endswith("q_proj.weight") else i.dtype, i.shape)
        for i in reader.infos
    ]
    with safetensors.Writer(tmp_path / "fp8", infos) as writer:
        for info in infos:
            array = reader.array(info.name)
            writer.add(info.name, array.astype(np.uint8) if info.dtype == "F8_E4M3" else array)
    (tmp_path / "fp8" / "config.json").write_bytes((reader.path / "config.json").read_bytes())
    adapted(bases["tiny-dense", "pt"], tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is stored as F8_E4M3"):
        export(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "fp8")


def test_row_blocks_cover_all_rows(monkeypatch):
    monkeypatch.setattr(exporting, "_BLOCK_ROWS", 3)
    array = from_float32(np.arange(16, dtype=np.float32).reshape(8, 2), "BF16")
    blocks = list(exporting._row_blocks(array, array, "BF16"))
    np.testing.assert_array_equal(np.concatenate([b for b, _, _ in blocks]).reshape(-1), np.arange(16))
