"""What waits on the host gives the bits of what does not: optimizer and frozen weights."""

from __future__ import annotations

import gc

import numpy as np
import paddle
import parallel_cases
import pytest
import small_run
import tiny
from paddle.base import core

from ernietune import config as configuration
from ernietune.checkpoint.load import load_model
from ernietune.checkpoint.waiting import load_waiting
from ernietune.config import load
from ernietune.errors import ConfigError
from ernietune.lora import LoraSpec, inject
from ernietune.memory_modes import recompute_of, waits_on_host
from ernietune.models.config import ModelConfig
from ernietune.parallel.apply import apply
from ernietune.parallel.blocks import Waiting
from ernietune.parallel.host_memory import HostCopy
from ernietune.parallel.team import Team
from ernietune.train.run import main

ALL = "activations+optimizer+weights"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In bfloat16, as published ones are: the files hold half of what the model computes with."""
    return small_run.initialize("tiny-vl", tmp_path_factory.mktemp("base") / "tiny-vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_run.write_data(tmp_path_factory.mktemp("data"), 8)


def config(base, data, output, **changes):
    changes = {"train_steps": 4, "train_accumulation": 2, "train_recompute": "layers", **changes}
    return small_run.config(base, data, output, **changes)


@pytest.fixture(scope="module")
def plain(base, data, tmp_path_factory):
    return main(config(base, data, tmp_path_factory.mktemp("plain") / "run"))


def assert_same(one, other, close=0.0):
    expected, found = small_run.tensors(one), small_run.tensors(other)
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=close, err_msg=key)


@pytest.mark.parametrize("offload", ["optimizer", "weights", ALL])
def test_the_same_bits(base, data, plain, tmp_path, capsys, offload):
    run = main(config(base, data, tmp_path / "run", train_offload=offload))
    np.testing.assert_array_equal(small_run.losses(run), small_run.losses(plain))
    assert_same(plain, run)
    said = capsys.readouterr().out
    assert ("optimizer saves nothing on a CPU" in said) == ("optimizer" in offload)
    assert ("stay in the checkpoint's files" in said) == ("weights" in offload)


def test_a_run_goes_on_with_and_without(base, data, plain, tmp_path):
    """Moments on the host are moments."""
    first = config(base, data, tmp_path / "run", train_offload="optimizer", train_schedule="constant")
    whole = main(config(base, data, tmp_path / "whole", train_schedule="constant"))
    first.train.steps = 2
    main(first)
    main(config(base, data, tmp_path / "run", train_schedule="constant"))
    assert_same(whole, tmp_path / "run")


def test_two_processes(base, data, tmp_path):
    degrees = {"data": 2, "expert": 2, "sharding": 2}
    alone = config(base, data, tmp_path / "alone", train_epsilon=1e-6, train_weight_decay=0.1)
    changes = {
        "train_steps": 4,
        "train_accumulation": 2,
        "train_recompute": "layers",
        "train_offload": "optimizer+weights",
        "train_warmup_steps": 3,
        "data_max_length": 256,
    }
    case = {"base": str(base), "data": str(data), "output": str(tmp_path / "two")}
    case |= {"parallel": degrees, "changes": changes}
    started = parallel_cases.start(2, [case], tmp_path / "processes")
    main(alone)
    parallel_cases.finish(started, tmp_path / "processes")
    assert_same(tmp_path / "alone", tmp_path / "two", 1e-5)


def held(make):
    """What `make` gives, and the bytes that it keeps."""
    gc.collect()
    before = core.host_memory_stat_current_value("Allocated", 0)
    found = make()
    gc.collect()
    return found, core.host_memory_stat_current_value("Allocated", 0) - before


def test_waiting_weights_take_no_memory_and_come_back(base):
    geometry = ModelConfig.from_folder(base)

    def around(waiting):
        model, fetches = load_waiting(base, "float32", geometry) if waiting else (plainly(), None)
        inject(model, LoraSpec(rank=2, targets=("attention", "experts")))
        some = None if fetches is None else Waiting(fetches)
        apply(
            model, Team.alone(), stage=0, base_sharded=False, recomputed=recompute_of("layers"), waiting=some
        )
        return model

    def plainly():
        return load_model(base, "float32", geometry)

    there, all_bytes = held(lambda: around(False))
    absent, few_bytes = held(lambda: around(True))
    waiting = sum(
        p.size for path, p in there.named_parameters() if waits_on_host(path.replace(".base.", "."))
    )
    assert all_bytes - few_bytes == pytest.approx(4 * waiting, rel=0.02)
    batch = tiny.pack([tiny.document([9], vocab=600)])
    (expected, found), kept = held(lambda: [model(batch) for model in (there, absent)])
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    del expected, found
    assert held(lambda: None)[1] == 0
    assert kept < waiting


def test_masters_keep_digits_that_their_parameters_do_not_have():
    held = paddle.to_tensor(np.array([1.0, 2.0], np.float32)).astype("bfloat16")
    held.stop_gradient = False
    copy = HostCopy({"w": held})
    copy.copies["w"].set_value(np.array([1.001, 2.5], np.float32))
    copy.follow()  # neither is what the parameter says: one rounds to it, but a copy is taken as a whole
    np.testing.assert_array_equal(copy.masters["w"].numpy(), [1.0, 2.0])
    copy.copies["w"].set_value(np.array([1.001, 2.002], np.float32))
    copy.follow()
    np.testing.assert_array_equal(copy.masters["w"].numpy(), np.array([1.001, 2.002], np.float32))
    held.grad = paddle.ones([2], "bfloat16")
    with copy.working():
        assert held.grad is None
        copy.copies["w"].set_value(copy.copies["w"] - 0.5 * copy.copies["w"].grad)
    np.testing.assert_allclose(held.astype("float32").numpy(), [0.5, 1.5], atol=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.offload=disk"], "is 'disk'; it must be none, or of activations, optimizer, weights one or"),
        (["train.offload=weights+weights"], "joined by +"),
        (["train.offload=weights", "train.recompute=none"], "names weights, but .* set train.recompute: lay"),
        (["train.offload=weights", "lora.enabled=false"], "names weights, but nothing is frozen"),
        (["train.offload=weights", "model.quantization=nf4"], "held as nf4 stays on the device"),
        (
            ["train.offload=weights", "parallel.data=2", "parallel.base=sharded"],
            "keeps them on other devices",
        ),
    ],
)
def test_what_cannot_wait(overrides, message):
    with pytest.raises(ConfigError, match=f"`train.offload` .*{message}"):
        load("configs/21b/sft_lora_8k.yaml", ["train.accumulation=2", *overrides])


def test_all_of_it_is_a_value(tmp_path):
    found = load("configs/21b/sft_lora_8k.yaml", [f"train.offload={ALL}"])
    assert found.train.offload == ALL
    configuration.save(found, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml").train.offload == ALL
