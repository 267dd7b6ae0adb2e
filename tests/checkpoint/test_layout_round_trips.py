"""From one layout to the other and back, and fp32 storage: every tensor with its own bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ernietune.checkpoint.load import load_model, save_model
from ernietune.checkpoint.safetensors import Reader, TensorInfo, Writer
from ernietune.initialize import initialize

KINDS = ("tiny-dense", "tiny-moe", "tiny-vl")
LAYOUTS = ("pt", "paddle")


def same(one, other, without=()):
    """Same names, dtypes, shapes and bytes, but for the names in `without`, which only `one` has."""
    a, b = Reader(one), Reader(other)
    assert {info.name for info in a.infos} - set(without) == {info.name for info in b.infos}
    for info in b.infos:
        assert info == a.info(info.name)
        np.testing.assert_array_equal(a.raw(info.name), b.raw(info.name), err_msg=info.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_storage(tmp_path, kind, layout):
    source = initialize(kind, tmp_path / "source", layout=layout, dtype="float32")
    assert {info.dtype for info in Reader(source).infos} == {"F32"}
    save_model(load_model(source), tmp_path / "back", like=source)
    same(source, tmp_path / "back")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_paddle_to_pt_and_back(tmp_path, kind, dtype):
    """The tensors of the model keep their bytes; a fresh save has no MTP block or tied head."""
    source = initialize(kind, tmp_path / "paddle", layout="paddle", dtype=dtype)
    raw = json.loads((source / "config.json").read_text())
    stored = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    save_model(load_model(source), tmp_path / "pt", config_raw=raw, layout="pt", dtype=stored)
    assert not any(info.name.startswith("ernie.") for info in Reader(tmp_path / "pt").infos)
    save_model(load_model(tmp_path / "pt"), tmp_path / "back", config_raw=raw, layout="paddle", dtype=stored)
    extra = {i.name for i in Reader(source).infos if ".mtp_" in i.name or i.name == "lm_head.weight"}
    assert bool(extra) == (kind != "tiny-dense")
    same(source, tmp_path / "back", without=extra)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_layouts_of_one_seed_are_one_checkpoint(tmp_path, kind):
    """A "-PT" folder written from the "-Paddle" model is the one that was made as "-PT"."""
    paddle, pt = (initialize(kind, tmp_path / layout, layout=layout) for layout in ("paddle", "pt"))
    raw = json.loads((paddle / "config.json").read_text())
    save_model(load_model(paddle), tmp_path / "converted", config_raw=raw, layout="pt")
    extra = {i.name for i in Reader(pt).infos if ".mtp_" in i.name or i.name == "lm_head.weight"}
    same(pt, tmp_path / "converted", without=extra)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_head_stored_beside_a_dense_model(tmp_path, layout):
    """Published 0.3B folders may hold it; it goes back where it was, with the embedding's bytes."""
    source = initialize("tiny-dense", tmp_path / "source", layout=layout)
    reader = Reader(source)
    tensors = {info.name: (info.dtype, reader.array(info.name)) for info in reader.infos}
    tensors["lm_head.weight"] = next(v for name, v in tensors.items() if "embed_tokens" in name)
    infos = [TensorInfo(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with Writer(tmp_path / "tied", infos) as writer:
        for name, (_, array) in tensors.items():
            writer.add(name, array)
    (tmp_path / "tied" / "config.json").write_bytes((source / "config.json").read_bytes())
    save_model(load_model(tmp_path / "tied"), tmp_path / "back", like=tmp_path / "tied")
    same(tmp_path / "tied", tmp_path / "back")
