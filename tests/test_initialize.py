"""Random checkpoints: the right tensors and files, reproducible, and usable."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece

from ernietune.checkpoint.safetensors import Reader
from ernietune.errors import CheckpointError
from ernietune.initialize import initialize, shape_config
from ernietune.models.config import SHAPES, ModelConfig, parameter_counts


def test_tensors_and_dtypes_of_a_vl_checkpoint(tmp_path):
    folder = initialize("tiny-vl", tmp_path / "vl", max_shard_bytes=500_000)
    reader = Reader(folder)
    dtypes = {info.name: info.dtype for info in reader.infos}
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {
        f"model.layers.{layer}.mlp.{name}"
        for layer in (1, 2)
        for name in ("gate.weight", "gate.weight_1", "moe_statics.e_score_correction_bias")
    }
    assert set(dtypes.values()) == {"F32", "BF16"}
    np.testing.assert_array_equal(reader.raw("lm_head.weight"), reader.raw("model.embed_tokens.weight"))
    assert (folder / "model.safetensors.index.json").exists()
    config = ModelConfig.from_folder(folder)
    stored = sum(np.prod(info.shape, dtype=int) for info in reader.infos)
    assert stored == sum(parameter_counts(config).values()) + config.vocab_size * config.hidden_size
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["min_pixels"], processor["max_pixels"]) == (3136, 4816896)


def test_numbers_look_like_an_untrained_model(tmp_path):
    reader = Reader(initialize("tiny-moe", tmp_path / "moe"))
    weight = reader.float32("model.embed_tokens.weight")
    assert weight.std() == pytest.approx((0.3333 / 64) ** 0.5, rel=0.01)
    assert abs(weight.mean()) < 0.001
    for norm in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.mtp_emb_norm.0.weight"):
        assert (reader.float32(norm) == 1).all()
    bias = reader.float32("model.layers.1.mlp.moe_statics.e_score_correction_bias")
    assert bias.shape == (1, 8)
    assert 0 < np.abs(bias).max() < 0.1
    experts = [reader.raw(f"model.layers.1.mlp.experts.{k}.up_proj.weight") for k in range(8)]
    assert len({e.tobytes() for e in experts}) == 8
    assert "lm_head.weight" not in reader


def test_mtp_follows_the_config(tmp_path):
    with_mtp = Reader(initialize("tiny-moe", tmp_path / "moe"))
    without = Reader(initialize("tiny-vl", tmp_path / "vl"))
    assert with_mtp.info("model.mtp_linear_proj.0.weight").shape == (64, 128)
    assert with_mtp.info("model.mtp_block.0.mlp.gate_proj.weight").shape == (96, 64)
    assert not any(".mtp_" in info.name for info in without.infos)


def test_seeds(tmp_path):
    one, same, other = (initialize("tiny-dense", tmp_path / str(i), seed=s) for i, s in enumerate((1, 1, 2)))
    data = [(folder / "model.safetensors").read_bytes() for folder in (one, same, other)]
    assert data[0] == data[1] != data[2]


def test_the_tokenizer_works_and_the_config_knows_its_ids(tmp_path):
    folder = initialize("tiny-vl", tmp_path / "vl")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    config = ModelConfig.from_folder(folder)
    assert processor.get_piece_size() <= config.vocab_size
    assert [processor.id_to_piece(i) for i in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert [processor.id_to_piece(i) for i in config.vision_token_ids] == [
        "<|IMAGE_PLACEHOLDER|>",
        "<|IMAGE_START|>",
        "<|IMAGE_END|>",
        "<|VIDEO_START|>",
        "<|VIDEO_END|>",
    ]
    for text in ("User: What is 3 + 14?\nAssistant: ", "  two  spaces, \u4f60\u597d and \U0001f642"):
        assert processor.decode(processor.encode(text)) == text
    assert len(processor.encode("The picture shows a small house")) < 15


def test_cutting_layers():
    vl = ModelConfig.from_dict(shape_config("vl-28b-a3b", 4))
    assert [vl.is_moe_layer(i) for i in range(4)] == [False, True, True, True]
    assert ModelConfig.from_dict(shape_config("21b-a3b", 2)).moe_layer_end_index == 1
    assert ModelConfig.from_dict(shape_config("0.3b", 1)).num_hidden_layers == 1
    assert SHAPES["21b-a3b"]["num_hidden_layers"] == 28  # the table itself is not changed
    with pytest.raises(CheckpointError, match="keep at least 4 layers"):
        shape_config("300b-a47b", 3)
    with pytest.raises(CheckpointError, match="at least 1 layer"):
        shape_config("0.3b", 0)


def test_wrong_requests(tmp_path):
    with pytest.raises(CheckpointError, match="unknown shape '7b'; choose one of 0.3b"):
        initialize("7b", tmp_path / "x")
    with pytest.raises(CheckpointError, match="layout 'onnx'"):
        initialize("tiny-dense", tmp_path / "x", layout="onnx")
    with pytest.raises(CheckpointError, match="dtype 'int8'"):
        initialize("tiny-dense", tmp_path / "x", dtype="int8")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        initialize("tiny-dense", tmp_path / "x")
