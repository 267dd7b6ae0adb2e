"""Checkpoints through the model and back: same bytes, right places, and errors that list everything."""

from __future__ import annotations

import json
import logging
import tracemalloc

import numpy as np
import pytest

from ernietune.checkpoint.load import fill, load_model, save_model, stored_entries
from ernietune.checkpoint.names import parameter_shapes
from ernietune.checkpoint.safetensors import Reader, TensorInfo, Writer
from ernietune.errors import CheckpointError
from ernietune.initialize import initialize
from ernietune.models.config import SHAPES, ModelConfig

KINDS = ("tiny-dense", "tiny-moe", "tiny-vl")
LAYOUTS = ("pt", "paddle")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {(k, lay): initialize(k, root / f"{k}-{lay}", layout=lay) for k in KINDS for lay in LAYOUTS}


def rewrite(folder, target, change):
    """Copy a checkpoint while `change` edits its dict of name -> (dtype, array)."""
    reader = Reader(folder)
    tensors = {info.name: (info.dtype, reader.array(info.name)) for info in reader.infos}
    change(tensors)
    with Writer(target, [TensorInfo(n, d, a.shape) for n, (d, a) in tensors.items()]) as writer:
        for name, (_, array) in tensors.items():
            writer.add(name, array)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def same_bytes(one, other):
    a, b = Reader(one), Reader(other)
    assert a.infos == b.infos
    for info in a.infos:
        np.testing.assert_array_equal(a.raw(info.name), b.raw(info.name), err_msg=info.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_byte_identical(folders, tmp_path, kind, layout, dtype):
    source = folders[kind, layout]
    save_model(load_model(source, dtype), tmp_path / "back", like=source, max_shard_bytes=300_000)
    same_bytes(source, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_give_the_same_parameters(folders, kind):
    pt, paddle = (load_model(folders[kind, layout]).state_dict() for layout in LAYOUTS)
    assert pt.keys() == paddle.keys()
    for name, tensor in pt.items():
        np.testing.assert_array_equal(tensor.numpy(), paddle[name].numpy(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_has_exactly_the_parameters_of_the_table(folders, kind):
    state = load_model(folders[kind, "pt"]).state_dict()
    shapes = parameter_shapes(ModelConfig.from_folder(folders[kind, "pt"]))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes


def test_values_land_where_the_layouts_say(folders):
    """By hand, without the table: fused columns, transposes, expert numbers, router and bias rows."""
    disk = Reader(folders["tiny-vl", "paddle"])
    state = {n: t.numpy() for n, t in load_model(folders["tiny-vl", "paddle"]).state_dict().items()}
    qkv = disk.float32("ernie.layers.1.self_attn.qkv_proj.weight")
    np.testing.assert_array_equal(state["model.layers.1.self_attn.q_proj.weight"], qkv[:, :128].T)
    np.testing.assert_array_equal(state["model.layers.1.self_attn.k_proj.weight"], qkv[:, 128:192].T)
    np.testing.assert_array_equal(state["model.layers.1.self_attn.v_proj.weight"], qkv[:, 192:].T)
    expert = disk.float32("ernie.layers.2.mlp.experts.11.up_gate_proj.weight")
    pool = "model.layers.2.mlp.vision_experts"
    np.testing.assert_array_equal(state[f"{pool}.gate_proj.weight"][3], expert[:, :16].T)
    np.testing.assert_array_equal(state[f"{pool}.up_proj.weight"][3], expert[:, 16:].T)
    router = disk.float32("ernie.layers.2.mlp.gate.weight_1")
    np.testing.assert_array_equal(state[f"{pool}.router.weight"], router.T)
    bias = disk.float32("ernie.layers.2.mlp.moe_statics.e_score_correction_bias")
    np.testing.assert_array_equal(state[f"{pool}.router.correction_bias"], bias[1])
    patches = disk.float32("vision_model.patch_embed.proj.weight")
    np.testing.assert_array_equal(state["vision_model.patch_embed.proj.weight"], patches.T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router_and_bias_stay_fp32(folders, dtype):
    state = load_model(folders["tiny-moe", "pt"], dtype).state_dict()
    found = {name: str(tensor.dtype).split(".")[-1] for name, tensor in state.items()}
    routers = {name for name in found if ".router." in name}
    assert len(routers) == 4
    assert {found[name] for name in routers} == {"float32"}
    assert {found[name] for name in found.keys() - routers} == {dtype}
    disk = Reader(folders["tiny-moe", "pt"]).float32("model.layers.1.mlp.gate.weight")
    np.testing.assert_array_equal(state["model.layers.1.mlp.text_experts.router.weight"].numpy(), disk)


def test_transformers_prefix_of_the_vision_tower(folders, tmp_path):
    def rename(tensors):
        for name in [n for n in tensors if n.startswith("vision_model.")]:
            tensors[f"model.{name}"] = tensors.pop(name)

    renamed = rewrite(folders["tiny-vl", "pt"], tmp_path / "renamed", rename)
    state = load_model(renamed).state_dict()
    for name, tensor in load_model(folders["tiny-vl", "pt"]).state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name].numpy())
    save_model(load_model(renamed), tmp_path / "back", like=renamed)
    same_bytes(renamed, tmp_path / "back")


def test_a_full_save_converts_between_layouts(folders, tmp_path):
    raw = json.loads((folders["tiny-moe", "pt"] / "config.json").read_text())
    save_model(load_model(folders["tiny-moe", "pt"]), tmp_path / "out", config_raw=raw, layout="paddle")
    found, expected = Reader(tmp_path / "out"), Reader(folders["tiny-moe", "paddle"])
    for info in found.infos:
        assert info == expected.info(info.name)
        np.testing.assert_array_equal(found.raw(info.name), expected.raw(info.name))
    left_out = {info.name for info in expected.infos} - {info.name for info in found.infos}
    assert left_out
    assert all(".mtp_" in name for name in left_out)


def test_a_changed_embedding_changes_the_stored_tied_head(folders, tmp_path):
    source = folders["tiny-vl", "pt"]
    model = load_model(source)
    model.model.embed_tokens.weight.set_value(model.model.embed_tokens.weight.numpy() + 1)
    save_model(model, tmp_path / "out", like=source)
    out = Reader(tmp_path / "out")
    np.testing.assert_array_equal(out.raw("lm_head.weight"), out.raw("model.embed_tokens.weight"))
    assert not np.array_equal(out.raw("lm_head.weight"), Reader(source).raw("lm_head.weight"))


def test_untied_heads(tmp_path):
    raw = {**SHAPES["tiny-dense"], "tie_word_embeddings": False}
    source = initialize("tiny-dense", tmp_path / "source")
    head = np.arange(2048 * 64, dtype=np.uint32).reshape(2048, 64).astype(np.uint16) >> 2
    untied = rewrite(source, tmp_path / "untied", lambda t: t.update({"lm_head.weight": ("BF16", head)}))
    (untied / "config.json").write_text(json.dumps(raw))
    model = load_model(untied)
    save_model(model, tmp_path / "paddle", config_raw=raw, layout="paddle")
    np.testing.assert_array_equal(Reader(tmp_path / "paddle").array("lm_head.weight"), head.T)
    save_model(load_model(tmp_path / "paddle"), tmp_path / "back", like=untied)
    same_bytes(untied, tmp_path / "back")


def test_a_deviating_copy_of_a_tied_head_is_reported(folders, tmp_path, caplog):
    def change(tensors):
        tensors["lm_head.weight"] = ("BF16", tensors["lm_head.weight"][1] ^ 1)

    folder = rewrite(folders["tiny-vl", "pt"], tmp_path / "changed", change)
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert "lm_head.weight differs from the embedding" in caplog.text


def test_everything_wrong_is_reported_at_once(folders, tmp_path):
    def damage(tensors):
        tensors.pop("model.norm.weight")
        tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = ("BF16", np.zeros((24, 64), np.uint16))
        tensors["model.layers.0.mlp.down_proj.weight"] = ("BF16", np.zeros((96, 64), np.uint16))

    folder = rewrite(folders["tiny-moe", "pt"], tmp_path / "damaged", damage)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert "missing: model.norm.weight" in text
    assert "unknown: model.layers.1.mlp.experts.8.up_proj.weight" in text
    assert "model.layers.0.mlp.down_proj.weight expected [64, 96] found [96, 64]" in text


def test_saving_over_something_is_refused(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    model = load_model(folders["tiny-dense", "pt"])
    with pytest.raises(CheckpointError, match="not empty"):
        save_model(model, tmp_path / "out", like=folders["tiny-dense", "pt"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_other_storage_dtypes(folders, tmp_path):
    raw = json.loads((folders["tiny-dense", "pt"] / "config.json").read_text())
    model = load_model(folders["tiny-dense", "pt"])
    save_model(model, tmp_path / "f32", config_raw=raw, dtype="F32")
    save_model(load_model(tmp_path / "f32"), tmp_path / "back", like=folders["tiny-dense", "pt"])
    same_bytes(folders["tiny-dense", "pt"], tmp_path / "back")


def test_loading_takes_no_memory_beside_the_model(tmp_path):
    """On a CPU in fp32 the numbers are widened in the parameter itself, stacks and fused tensors included."""
    folder = initialize("tiny-moe", tmp_path / "moe", layout="paddle")
    reader, model = Reader(folder), load_model(folder)
    entries = stored_entries(reader, model.config)
    state = model.state_dict()
    tracemalloc.start()
    fill(state, entries, reader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < model.model.embed_tokens.weight.size  # a quarter of the largest parameter
