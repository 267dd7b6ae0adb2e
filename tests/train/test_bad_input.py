"""What users get wrong, and what machines do: one sentence that names the place, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import small_run

from ernietune.checkpoint import safetensors, state
from ernietune.checkpoint.safetensors import Reader, TensorInfo, Writer
from ernietune.errors import CheckpointError, ConfigError, DataError, ErnietuneError
from ernietune.models.decoder import CausalLM
from ernietune.train.run import main

STEPS = {"train_steps": 3, "train_rows": 4}  # a step is an epoch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_run.base(tmp_path_factory.mktemp("base") / "tiny-vl")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_run.write_data(tmp_path_factory.mktemp("data"), 4)


def refused(config, kind, *words):
    """The run ends with one sentence holding `words`, before anything was saved."""
    with pytest.raises(kind) as caught:
        main(config)
    message = str(caught.value)
    assert isinstance(caught.value, ErnietuneError)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    run = Path(config.train.output)
    assert not (run / "run.json").exists()
    assert list((run / "checkpoints").glob("*")) == []


def copy_of(base, target, change):
    """A checkpoint whose dict of name -> (dtype, array) was edited by `change`."""
    reader = Reader(base)
    tensors = {info.name: (info.dtype, np.array(reader.array(info.name))) for info in reader.infos}
    change(tensors)
    with Writer(target, [TensorInfo(n, d, a.shape) for n, (d, a) in tensors.items()]) as writer:
        for name, (_, array) in tensors.items():
            writer.add(name, array)
    for file in base.iterdir():
        if not file.name.startswith("model.safetensors"):
            (target / file.name).write_bytes(file.read_bytes())
    return target


# Models


def test_missing_model_folder(good, tmp_path):
    path = tmp_path / "nowhere"
    refused(small_run.config(path, good, tmp_path / "run", **STEPS), CheckpointError, str(path), "folder")


def test_truncated_shard(base, good, tmp_path):
    model = copy_of(base, tmp_path / "model", lambda tensors: None)
    size = (model / "model.safetensors").stat().st_size
    os.truncate(model / "model.safetensors", size - 1000)
    refused(small_run.config(model, good, tmp_path / "run", **STEPS), CheckpointError, "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(NORM), (NORM,)),
        (lambda tensors: tensors.update({NORM: ("F32", np.ones(95, np.float32))}), (NORM, "95", "96")),
    ],
    ids=["missing", "shape"],
)
def test_wrong_tensors(base, good, tmp_path, change, words):
    model = copy_of(base, tmp_path / "model", change)
    refused(small_run.config(model, good, tmp_path / "run", **STEPS), CheckpointError, *words)


def test_a_run_is_not_resumed_with_another_rank(base, good, tmp_path):
    run = main(small_run.config(base, good, tmp_path / "run", **STEPS))
    before = small_run.tensors(run)
    changed = small_run.config(base, good, run, **STEPS | {"train_steps": 5, "lora_rank": 8})
    with pytest.raises(CheckpointError, match=r"run cannot be resumed: .*lora_A"):
        main(changed)
    assert all(np.array_equal(values, before[name]) for name, values in small_run.tensors(run).items())
    with pytest.raises(ConfigError, match="holds a run already"):
        main(small_run.config(base, good, run, **STEPS, train_resume=False))


# Records


def with_line(tmp_path, line):
    """A good record, then `line`."""
    path = small_run.write_data(tmp_path / "data", 1)
    path.write_text(path.read_text() + line + "\n")
    return path


def ask(content="Say yes.", answer="yes", **more):
    assistant = {"role": "assistant", "content": answer, **more}
    return {"messages": [{"role": "user", "content": content}, assistant]}


def picture(url):
    return ask([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}])


LINES = {
    "malformed": ('{"messages": [{"role": "user",', ("JSON",)),
    "role": (json.dumps({"messages": [{"role": "boss", "content": "Go!"}]}), ("role", "boss")),
    "missing image": (json.dumps(picture("none.png")), ("none.png",)),
    "no image": (json.dumps(picture("train.jsonl")), ("train.jsonl", "image")),
    "nothing trained": (json.dumps(ask(trained=False)), ("trained",)),
    "too long": (json.dumps(ask("word " * 400)), ("tokens", "max_length 256")),
}


@pytest.mark.parametrize("name", LINES)
def test_bad_records(base, tmp_path, name):
    line, words = LINES[name]
    config = small_run.config(base, with_line(tmp_path, line), tmp_path / "run", **STEPS)
    refused(config, DataError, "train.jsonl:2", *words)


@pytest.mark.parametrize("name", LINES)
def test_bad_records_are_skipped_and_named_when_asked(base, tmp_path, name):
    config = small_run.config(base, with_line(tmp_path, LINES[name][0]), tmp_path / "run", **STEPS)
    config.data.on_error = "skip"
    run = main(config)
    assert len(small_run.losses(run)) == 3
    dropped = [json.loads(text) for text in (run / "dropped.jsonl").read_text().splitlines()]
    assert [record["where"].endswith("train.jsonl:2") for record in dropped] == [True]


@pytest.mark.parametrize(("overlong", "reason"), [("skip", "too long"), ("truncate", "cut")])
def test_long_records(base, tmp_path, overlong, reason):
    """Two turns of which the first fits: skipped as a whole, or cut behind the first answer."""
    turns = {"messages": ask()["messages"] + ask("word " * 400)["messages"]}
    config = small_run.config(base, with_line(tmp_path, json.dumps(turns)), tmp_path / "run", **STEPS)
    config.data.overlong, config.train.rows = overlong, 2
    run = main(config)
    record = json.loads((run / "dropped.jsonl").read_text())
    assert (record["reason"], record["where"][-2:]) == (reason, ":2")
    assert small_run.log(run)[1]["samples"] == 2


def test_a_first_turn_that_is_too_long_is_skipped_under_truncate(base, tmp_path):
    path = with_line(tmp_path, json.dumps(ask("word " * 400)))
    run = main(small_run.config(base, path, tmp_path / "run", **STEPS, data_overlong="truncate"))
    assert json.loads((run / "dropped.jsonl").read_text())["reason"] == "too long"


def test_no_usable_record(base, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ask(trained=False)) + "\n")
    config = small_run.config(base, path, tmp_path / "run", **STEPS, data_on_error="skip")
    refused(config, DataError, "none of the 1 records")


# What happens on the way


@pytest.mark.parametrize("place", ["first tensor", "trainer state", "trainer.json", "run.json"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_full_disk_leaves_the_last_checkpoint(base, good, tmp_path, monkeypatch, place, lora):
    """The save of step 2 fails at one of four places; step 1 loads, and the run continues to the same end."""
    changes = {**STEPS, "train_save_every": 1, "train_keep_last": 9, "lora_enabled": lora}
    whole = main(small_run.config(base, good, tmp_path / "whole", **changes))
    config = small_run.config(base, good, tmp_path / "run", **changes)
    with monkeypatch.context() as patch:
        fill_disk(patch, place)
        with pytest.raises(
            CheckpointError, match=r"saving step 2 failed: .*last good .*step-000001"
        ) as caught:
            main(config)
    assert "No space left" in str(caught.value)
    assert "\n" not in str(caught.value)
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["last"] == "step-000001"
    assert not [path for path in run.rglob("*") if path.name.endswith(".part")]
    main(config)
    expected = small_run.tensors(whole)
    assert all(np.array_equal(values, expected[name]) for name, values in small_run.tensors(run).items())


def fill_disk(patch, place):
    """No space is left at one place of the second save."""
    written, put_json = safetensors._OutFile.write, state.write_json

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def write(file, name, data):
        if "step-000002" in str(file.path):
            if (place == "trainer state") == (file.path.name == state.TENSORS) and not place.endswith("json"):
                full(file.path)
        written(file, name, data)

    def write_json(path, content):
        second = "step-000002" in str(path) or content.get("last") == "step-000002"
        if second and path.name == place:
            full(path)
        put_json(path, content)

    patch.setattr(safetensors._OutFile, "write", write)
    patch.setattr(state, "write_json", write_json)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("name", ["log.jsonl", "config.yaml", "dropped.jsonl"])
def test_a_full_disk_met_by_another_file_of_the_run(base, tmp_path, name):
    path = with_line(tmp_path, LINES["role"][0])
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to("/dev/full")
    config = small_run.config(base, path, run, **STEPS, data_on_error="skip")
    with pytest.raises(ErnietuneError, match="run: No space left on device; make room .* last checkpoint$"):
        main(config)


def test_a_loss_that_is_no_number(base, good, tmp_path):
    def spoil(tensors):
        tensors["model.norm.weight"][1][0] = np.nan

    model = copy_of(base, tmp_path / "model", spoil)
    config = small_run.config(model, good, tmp_path / "run", **STEPS)
    refused(config, ErnietuneError, "loss of step 1 is nan", "learning_rate")


def test_an_adapter_without_gradient(base, good, tmp_path, monkeypatch):
    """As if the pictures' features were cut off from what made them."""
    features = CausalLM.picture_features
    monkeypatch.setattr(CausalLM, "picture_features", lambda *inputs: features(*inputs).detach())
    config = small_run.config(base, good, tmp_path / "run", **STEPS)
    refused(config, ErnietuneError, "no gradient reached 13 adapters", "vision_model.blocks.0.attn.qkv")
