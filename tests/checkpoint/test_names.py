"""The names table against name and shape listings of models written by other implementations."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest

from ernietune.checkpoint.names import (
    MTP,
    PADDLE,
    PT,
    TIED,
    detect_layout,
    layout_named,
    matched,
    mtp_depth,
    parameter_shapes,
    sources,
    table,
)
from ernietune.errors import CheckpointError
from ernietune.models.config import SHAPES, ModelConfig, parameter_counts

GOLDEN = Path(__file__).parent / "golden"
LISTED = {
    "dense": {"vocab_size": 320, "head_dim": 32},
    "moe": {"vocab_size": 320, "head_dim": 16},
    "vl": {"vocab_size": 320, "hidden_size": 128},
}


def listed_config(kind, **changes):
    return ModelConfig.from_dict({**copy.deepcopy(SHAPES[f"tiny-{kind}"]), **LISTED[kind], **changes})


def golden(name):
    lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines)
    return {name: tuple(int(n) for n in shape.strip("(),").split(",")) for name, shape in pairs}


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_table_equals_the_listing(name):
    kind = name.split("_")[1]
    found = golden(name)
    expected = table(listed_config(kind), detect_layout(found))
    assert [entry.name for entry in matched(expected, found, name)] == list(found)
    left_out = set(expected) - set(found)
    assert {expected[n].reason for n in left_out} <= {MTP, TIED}
    if "mtp" in name:
        assert not any(mtp_depth(n) is not None for n in left_out)


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("layout", [PT, PADDLE])
def test_regions_cover_every_disk_tensor_and_every_parameter_once(name, layout):
    config = ModelConfig.from_dict(SHAPES[name])
    shapes = parameter_shapes(config)
    written = dict.fromkeys(shapes, 0)
    for entry in table(config, layout).values():
        covered = 0
        for target in entry.targets:
            disk = np.broadcast_to(np.uint8(0), entry.shape)  # no memory, whatever the shape
            region = target.region(disk)
            slot = shapes[target.param] if target.index is None else shapes[target.param][1:]
            assert region.size == math.prod(slot)
            assert region.shape in (slot, (1, *slot))
            covered += region.size
            written[target.param] += region.size
        assert covered == (math.prod(entry.shape) if entry.targets else 0)
    assert written == {param: math.prod(shape) for param, shape in shapes.items()}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_parameters_add_up_to_the_published_counts(name):
    config = ModelConfig.from_dict(SHAPES[name])
    counts = parameter_counts(config)
    assert sum(map(math.prod, parameter_shapes(config).values())) == sum(counts.values()) - counts["mtp"]
    mtp = [entry for n, entry in table(config, PT).items() if mtp_depth(n) is not None]
    if config.num_nextn_predict_layers:
        assert sum(math.prod(entry.shape) for entry in mtp) == counts["mtp"]


def test_parameter_names_of_the_contract():
    shapes = parameter_shapes(ModelConfig.from_dict(SHAPES["tiny-vl"]))
    hand_written = {
        "model.embed_tokens.weight": (2048, 96),
        "model.layers.0.mlp.up_proj.weight": (96, 96),
        "model.layers.1.mlp.text_experts.router.weight": (8, 96),
        "model.layers.1.mlp.text_experts.router.correction_bias": (8,),
        "model.layers.1.mlp.text_experts.gate_proj.weight": (8, 24, 96),
        "model.layers.1.mlp.vision_experts.down_proj.weight": (8, 96, 16),
        "model.layers.1.mlp.shared_experts.down_proj.weight": (96, 48),
        "model.layers.1.self_attn.k_proj.weight": (64, 96),
        "model.resampler_model.temporal_linear.0.weight": (256, 512),
        "model.resampler_model.spatial_linear.3.bias": (256,),
        "model.resampler_model.after_norm.weight": (96,),
        "vision_model.patch_embed.proj.weight": (64, 588),
        "vision_model.blocks.1.attn.qkv.bias": (192,),
    }
    assert hand_written.items() <= shapes.items()
    assert "lm_head.weight" not in shapes
    assert "lm_head.weight" in parameter_shapes(ModelConfig.from_dict(SHAPES["300b-a47b"]))


def test_router_orientation_by_kind_not_by_shape():
    """With as many experts as hidden units a shape could not tell."""
    square = {"moe_num_experts": 64, "hidden_size": 64}
    text = listed_config("moe", **square)
    vl = listed_config("vl", **square, moe_k=3)
    for config, layout, transposed in (
        (text, PT, False),
        (text, PADDLE, True),
        (vl, PT, True),
        (vl, PADDLE, True),
    ):
        root = "ernie" if layout is PADDLE else "model"
        entry = table(config, layout)[f"{root}.layers.1.mlp.gate.weight"]
        assert [target.transposed for target in entry.targets] == [transposed]


def test_fused_columns_are_q_k_v_and_gate_up():
    config = listed_config("moe")
    found = table(config, PADDLE)
    columns = [
        (t.param.split(".")[-2], t.axis, t.start, t.stop)
        for t in found["ernie.layers.0.self_attn.qkv_proj.weight"].targets
    ]
    assert columns == [("q_proj", 1, 0, 64), ("k_proj", 1, 64, 96), ("v_proj", 1, 96, 128)]
    expert = found["ernie.layers.2.mlp.experts.5.up_gate_proj.weight"].targets
    assert [(t.param.split(".")[-2], t.index, t.start, t.stop) for t in expert] == [
        ("gate_proj", 5, 0, 24),
        ("up_proj", 5, 24, 48),
    ]


def test_vision_experts_follow_the_text_experts():
    parts = sources(table(listed_config("vl"), PT).values())[
        "model.layers.1.mlp.vision_experts.up_proj.weight"
    ]
    names = [(entry.name, target.index) for entry, target in parts]
    assert names[0] == ("model.layers.1.mlp.experts.8.up_proj.weight", 0)
    assert names[-1] == ("model.layers.1.mlp.experts.15.up_proj.weight", 7)


def test_head_orientation():
    tied, untied = listed_config("dense"), listed_config("dense", tie_word_embeddings=False)
    assert table(tied, PADDLE)["lm_head.weight"].shape == (320, 64)
    assert table(tied, PADDLE)["lm_head.weight"].optional
    assert table(untied, PADDLE)["lm_head.weight"].shape == (64, 320)
    assert table(untied, PT)["lm_head.weight"].shape == (320, 64)
    assert not table(untied, PT)["lm_head.weight"].optional


def test_fp32_tensors():
    names = {n for n, entry in table(listed_config("vl"), PT).items() if entry.keep_fp32}
    assert names == {
        f"model.layers.{layer}.mlp.{name}"
        for layer in (1, 2)
        for name in ("gate.weight", "gate.weight_1", "moe_statics.e_score_correction_bias")
    }


def test_all_mismatches_are_reported_at_once():
    found = golden("pt_moe")
    found.pop("model.norm.weight")
    found["model.layers.9.bogus"] = (1,)
    found["model.embed_tokens.weight"] = (319, 64)
    with pytest.raises(CheckpointError) as caught:
        matched(table(listed_config("moe"), PT), found, "here")
    text = str(caught.value)
    assert "1 missing: model.norm.weight" in text
    assert "1 unknown: model.layers.9.bogus" in text
    assert "model.embed_tokens.weight expected [320, 64] found [319, 64]" in text


def test_layout_detection():
    assert detect_layout(["vision_model.ln.bias", "model.norm.weight"]) == PT
    assert detect_layout(["lm_head.weight", "ernie.norm.weight"]) == PADDLE
    assert detect_layout(["model.vision_model.ln.bias"]).vision_prefix == "model.vision_model."
    for names in (["model.norm.weight", "ernie.norm.weight"], ["transformer.h.0"], []):
        with pytest.raises(CheckpointError, match="no ERNIE-4.5 checkpoint"):
            detect_layout(names, "here")
    assert (layout_named("pt"), layout_named("paddle")) == (PT, PADDLE)
    with pytest.raises(CheckpointError, match="'onnx'"):
        layout_named("onnx")
