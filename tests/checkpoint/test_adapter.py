"""Adapters in PEFT layout: names and shapes another tool expects, exact round trips, strictness."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ernietune.checkpoint.adapter import load_adapter, read_adapter, save_adapter
from ernietune.checkpoint.load import load_model
from ernietune.checkpoint.safetensors import Reader, write_file
from ernietune.errors import CheckpointError
from ernietune.initialize import initialize
from ernietune.lora import LoraSpec, adapters, inject

SPEC = LoraSpec(rank=4, alpha=12, targets=("attention", "experts", "vision"), dropout=0.05, rslora=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return initialize("tiny-vl", tmp_path_factory.mktemp("base") / "tiny-vl")


def injected(base, spec=SPEC, seed=1):
    model = load_model(base)
    inject(model, spec)
    random = np.random.default_rng(seed)
    for _, layer in adapters(model):
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.set_value(random.standard_normal(parameter.shape).astype(np.float32))
    return model


@pytest.fixture
def saved(base, tmp_path):
    model = injected(base)
    save_adapter(model, tmp_path / "adapter", str(base))
    return model, tmp_path / "adapter"


def factors(model):
    return {path: (layer.lora_A.numpy(), layer.lora_B.numpy()) for path, layer in adapters(model)}


def test_peft_names_and_shapes(saved):
    model, folder = saved
    reader = Reader(folder / "adapter_model.safetensors")
    shapes = {info.name: info.shape for info in reader.infos}
    root = "base_model.model.model.layers"
    assert shapes[f"{root}.0.self_attn.q_proj.lora_A.weight"] == (4, 96)
    assert shapes[f"{root}.0.self_attn.q_proj.lora_B.weight"] == (128, 4)
    assert shapes[f"{root}.1.mlp.experts.7.gate_proj.lora_B.weight"] == (24, 4)
    assert shapes[f"{root}.1.mlp.experts.8.gate_proj.lora_B.weight"] == (16, 4)
    assert shapes[f"{root}.2.mlp.experts.15.down_proj.lora_A.weight"] == (4, 16)
    assert shapes["base_model.model.vision_model.blocks.1.attn.qkv.lora_B.weight"] == (192, 4)
    # 3 x 4 attention, 2 layers x 16 experts x 3, 2 vision blocks x 4; an A and a B each
    assert len(shapes) == 2 * (12 + 96 + 8)
    vision = factors(model)["model.layers.2.mlp.vision_experts.down_proj"]
    stored = reader.float32(f"{root}.2.mlp.experts.9.down_proj.lora_B.weight")
    np.testing.assert_array_equal(stored, vision[1][1])


def test_adapter_config(saved, base):
    config = json.loads((saved[1] / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 12,
        "use_rslora": True,
        "lora_dropout": 0.05,
        "bias": "none",
        "base_model_name_or_path": str(base),
    }
    assert expected.items() <= config.items()
    # "gate_proj" alone would also mean the dense layer and the shared experts, so full names are listed
    assert "model.layers.1.mlp.experts.8.gate_proj" in config["target_modules"]
    assert len(config["target_modules"]) == 12 + 96 + 8


def test_short_target_names_where_they_are_exact(base, tmp_path):
    save_adapter(injected(base, LoraSpec(rank=2, targets=("attention",))), tmp_path / "a", "base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_round_trip(saved, base):
    model, folder = saved
    other = injected(base, seed=2)
    found = load_adapter(other, folder)
    assert found.spec == SPEC
    for path, (a, b) in factors(model).items():
        np.testing.assert_array_equal(factors(other)[path][0], a, err_msg=path)
        np.testing.assert_array_equal(factors(other)[path][1], b, err_msg=path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            LoraSpec(rank=4, alpha=12, targets=("attention",), rslora=True),
            "has weights for layers without adapter",
        ),
        (
            LoraSpec(rank=4, alpha=12, targets=("attention", "experts", "vision", "resampler"), rslora=True),
            "has no weights for model.resampler_model",
        ),
        (LoraSpec(rank=8, alpha=12, targets=SPEC.targets, rslora=True), "rank 4 .* has 8"),
        (LoraSpec(rank=4, alpha=8, targets=SPEC.targets, rslora=True), "scale 6.* and 4"),
    ],
)
def test_another_injection_is_refused(saved, base, spec, message):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(injected(base, spec), saved[1])


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    reader = Reader(path)
    tensors = {info.name: (info.dtype, reader.array(info.name).copy()) for info in reader.infos}
    change(tensors)
    write_file(path, tensors)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"q_proj has no lora_B"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": ("F32", np.ones((8, 96), np.float32))}),
            r"lora_A expected \[4, 96\] found \[8, 96\]",
        ),
        (
            lambda t: t.update(
                {f"{Q.replace('.0.', '.7.')}.lora_A.weight": ("F32", np.ones((4, 96), np.float32))}
            ),
            r"layers\.7\.self_attn\.q_proj is no layer of the base model",
        ),
        (lambda t: t.update({f"{Q}.magnitude": ("F32", np.ones(4, np.float32))}), "is no LoRA weight"),
        (lambda t: t.clear(), "holds no adapter weights"),
    ],
)
def test_damaged_weights(saved, change, message):
    model, folder = saved
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(model.config, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": -1}, "lora_alpha must be a positive number"),
    ],
)
def test_unsupported_configs(saved, changes, message):
    model, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{message}"):
        read_adapter(model.config, folder)


def test_missing_folder(saved, tmp_path):
    with pytest.raises(CheckpointError, match="is this an adapter folder"):
        read_adapter(saved[0].config, tmp_path / "nowhere")


def test_an_adapter_written_elsewhere_can_be_read(base, tmp_path):
    """PEFT itself writes no `ernietune` part and may use BF16."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    half = np.full((2, 96), 0x3F00, np.uint16)
    write_file(
        folder / "adapter_model.safetensors",
        {f"{Q}.lora_A.weight": ("BF16", half), f"{Q}.lora_B.weight": ("F32", np.ones((128, 2), np.float32))},
    )
    found = read_adapter(load_model(base).config, folder)
    assert found.spec == LoraSpec(rank=2, alpha=4, targets=("q_proj",))
    a, b = found.factors["model.layers.0.self_attn.q_proj", None]
    assert (a == 0.5).all()
    assert (b == 1).all()
