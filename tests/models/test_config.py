"""ModelConfig against the published geometry and the parameter counts the hub shows."""

from __future__ import annotations

import copy
import json

import pytest

from ernietune.errors import CheckpointError
from ernietune.models.config import SHAPES, ModelConfig, parameter_counts


def shape(name, **changes):
    return ModelConfig.from_dict({**copy.deepcopy(SHAPES[name]), **changes})


def total(counts, *without):
    return sum(count for group, count in counts.items() if group not in without)


@pytest.mark.parametrize(
    ("name", "core", "mtp"),
    [
        ("0.3b", 360_748_032, 0),
        ("21b-a3b", 21_825_437_888, 123_217_920),
        ("21b-a3b-thinking", 21_825_437_888, 123_217_920),
        ("300b-a47b", 299_484_163_264, 989_888_512),
    ],
)
def test_text_parameter_counts_are_the_published_ones(name, core, mtp):
    counts = parameter_counts(shape(name))
    assert total(counts, "mtp") == core
    assert counts["mtp"] == mtp


def test_vl_28b_counts_explain_the_hub_figure():
    config = shape("vl-28b-a3b")
    counts = parameter_counts(config)
    assert counts["vision_tower"] == 630_433_280
    assert counts["resampler"] == 144_225_280
    assert total(counts, "vision_tower", "resampler") == 28_624_635_776
    # the hub stores a tied head too: 29.66B
    assert total(counts) + config.vocab_size * config.hidden_size == 29_664_059_776


def test_vl_424b_count():
    assert total(parameter_counts(shape("vl-424b-a47b"))) == pytest.approx(423.5e9, rel=1e-3)


def test_layer_types_follow_start_end_interval_and_lists():
    vl = shape("vl-28b-a3b")  # end [29, 28] lies beyond the last layer 27
    assert [vl.is_moe_layer(i) for i in (0, 1, 27)] == [False, True, True]
    assert [shape("300b-a47b").is_moe_layer(i) for i in (2, 3, 53)] == [False, True, True]
    skipping = shape("21b-a3b", moe_layer_interval=2)
    assert [skipping.is_moe_layer(i) for i in (0, 1, 2, 3)] == [False, True, False, True]
    assert not any(shape("0.3b").is_moe_layer(i) for i in range(18))
    assert shape("21b-a3b-thinking").is_moe_layer(27)
    assert shape("21b-a3b", moe_layer_end_index=-1).is_moe_layer(27)


def test_explicit_head_dim_is_not_derived():
    config = shape("0.3b")
    assert (config.head_dim, config.query_width, config.key_value_width) == (128, 2048, 256)
    assert shape("21b-a3b").head_dim == 128


def test_pools_and_shared_width():
    vl = shape("vl-28b-a3b")
    assert [(p.count, p.intermediate_size) for p in vl.pools] == [(64, 1536), (64, 512)]
    assert vl.shared_intermediate_size == 3072
    assert shape("vl-424b-a47b").shared_intermediate_size == 0
    assert shape("0.3b").pools == ()


def test_vision_tokens_and_the_paddle_form_without_them():
    vl = shape("vl-28b-a3b")
    assert vl.vision_token_ids == (100295, 101304, 101305, 101306, 101307)
    raw = copy.deepcopy(SHAPES["vl-28b-a3b"])
    for key in (
        "im_patch_id",
        "rope_scaling",
        "max_position_embeddings",
        *[k for k in raw if "_token_id" in k],
    ):
        raw.pop(key, None)
    paddle = ModelConfig.from_dict(raw)
    assert (paddle.image_token_id, paddle.vision_marker_ids) == (None, ())
    assert (paddle.freq_allocation, paddle.max_position_embeddings) == (20, 131072)
    assert paddle.with_tokens(7, (8, 9, 10, 11)).vision_token_ids == (7, 8, 9, 10, 11)


def test_nested_transformers_form_equals_the_flat_one():
    flat = copy.deepcopy(SHAPES["vl-28b-a3b"])
    text = {k: flat[k] for k in flat if not k.startswith(("moe_layer", "vision", "im", "rope", "video"))}
    text |= {
        "model_type": "ernie4_5_vl_moe_text",
        "moe_num_experts": 64,
        "mlp_layer_types": ["dense"] + ["sparse"] * 27,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
    }
    nested = {
        "model_type": "ernie4_5_vl_moe",
        "text_config": text,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 5120,
            "patch_size": 14,
            "in_channels": 3,
            "spatial_merge_size": 2,
            "temporal_merge_size": 2,
        },
        "image_token_id": 100295,
        "image_start_token_id": 101304,
        "image_end_token_id": 101305,
        "video_start_token_id": 101306,
        "video_end_token_id": 101307,
        "video_token_id": 103367,
        "tie_word_embeddings": True,
    }
    found = ModelConfig.from_dict(nested)
    expected = ModelConfig.from_dict(flat)
    assert found.vision_token_ids == (100295, 103367, 101304, 101305, 101306, 101307)
    assert {**found.__dict__, "video_token_id": None} == expected.__dict__


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_is_valid(name):
    config = shape(name)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.is_vl == name.startswith(("vl", "tiny-vl", "demo-vl"))


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("0.3b", {"hidden_size": None}, "hidden_size is missing"),
        ("0.3b", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("0.3b", {"vocab_size": "many"}, "vocab_size"),
        ("0.3b", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("0.3b", {"head_dim": None, "hidden_size": 1001}, "head_dim"),
        ("0.3b", {"model_type": "llama"}, "model_type"),
        ("0.3b", {"use_bias": True}, "use_bias"),
        ("0.3b", {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ("0.3b", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("21b-a3b", {"moe_k": 65}, "moe_k"),
        ("21b-a3b", {"moe_num_experts": None}, "moe_num_experts is missing"),
        ("21b-a3b", {"moe_layer_start_index": 28}, "moe_layer_start_index"),
        ("21b-a3b", {"moe_intermediate_size": [1536, 512]}, "moe_intermediate_size"),
        ("vl-28b-a3b", {"moe_num_experts": [64, 32]}, "moe_num_experts"),
        ("vl-28b-a3b", {"moe_intermediate_size": 1536}, "moe_intermediate_size"),
        ("vl-28b-a3b", {"vision_config": None}, "vision_config is missing"),
        ("vl-28b-a3b", {"pixel_hidden_size": 64}, "pixel_hidden_size"),
        ("vl-28b-a3b", {"rope_scaling": {"mrope_section": [22, 20, 22]}}, "rope_scaling.mrope_section"),
        ("vl-28b-a3b", {"image_end_token_id": None}, "image_end_token_id"),
    ],
)
def test_impossible_configs_name_file_and_key(name, changes, key):
    with pytest.raises(CheckpointError, match=rf"^some/config\.json: .*{key}"):
        ModelConfig.from_dict({**copy.deepcopy(SHAPES[name]), **changes}, "some/config.json")


def test_from_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny-moe"]))
    assert ModelConfig.from_folder(tmp_path) == shape("tiny-moe")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path / "nowhere")
