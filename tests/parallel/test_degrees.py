"""Who works with whom and who holds what, against hand-written layouts; mistakes name the key."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from ernietune.checkpoint.names import parameter_shapes
from ernietune.config import load
from ernietune.errors import ConfigError
from ernietune.parallel.degrees import Degrees, Holding
from ernietune.train.division import numbers, updated_numbers


def test_groups_of_eight_processes():
    degrees = Degrees(data=4, expert=2, tensor=2)
    assert degrees.tensor_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert degrees.data_groups() == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert sorted(degrees.expert_groups()) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert sorted(degrees.replica_groups()) == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize("degrees", [Degrees(2, 2, 1), Degrees(2, 1, 2), Degrees(4, 2, 2), Degrees(4, 4, 1)])
def test_every_number_of_every_parameter_is_held_by_as_many_processes_as_it_has_copies(degrees):
    for path, shape in parameter_shapes(tiny.config("tiny-vl")).items():
        whole = np.arange(np.prod(shape)).reshape(shape)
        parts = [Holding(degrees, rank).cut(path, whole) for rank in range(degrees.world)]
        assert {part.shape for part in parts} == {tuple(degrees.local_shape(path, shape))}, path
        held = np.bincount(np.concatenate([part.ravel() for part in parts]), minlength=whole.size)
        copies = degrees.world * parts[0].size // whole.size
        assert (held == copies).all(), path


def test_an_adapter_is_cut_as_its_matrix_is():
    """(B A) of the parts must be the part of (B A): rows where outputs are split, sums where inputs are."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((4, 12)), random.standard_normal((8, 4))
    degrees = Degrees(tensor=2)
    for name, axis in (("q_proj", 0), ("o_proj", 1)):
        path = f"model.layers.0.self_attn.{name}"
        parts = [
            Holding(degrees, rank).cut(f"{path}.lora_B", b) @ Holding(degrees, rank).cut(f"{path}.lora_A", a)
            for rank in range(2)
        ]
        assert np.allclose(np.concatenate(parts, axis), b @ a)


def test_an_expert_is_in_one_place():
    path = "model.layers.1.mlp.vision_experts.up_proj.weight"
    places = [[Holding(Degrees(4, 4), rank).place(path, e, 2) for e in range(8)] for rank in range(4)]
    assert places[1] == [None, None, 0, 1, None, None, None, None]
    assert [sum(p is not None for p in column) for column in zip(*places, strict=True)] == [1] * 8


def test_what_a_process_holds_shrinks_as_the_degrees_say():
    shapes = {
        "model.layers.0.mlp.text_experts.up_proj.weight": [8, 6, 4],
        "model.layers.0.self_attn.q_proj.weight": [8, 8],
        "model.norm.weight": [10],
    }
    assert numbers(shapes, Degrees(), False) == 192 + 64 + 10
    assert numbers(shapes, Degrees(4, 2, 1), False) == 96 + 64 + 10
    assert numbers(shapes, Degrees(4, 2, 2), True) == 48 // 2 + 32 // 4 + 10
    assert updated_numbers(shapes, Degrees(4, 2, 1), 1) == 96 // 2 + 64 // 4 + 3


@pytest.mark.parametrize(
    ("degrees", "shape", "message"),
    [
        (Degrees(2, 2), "tiny-dense", "parallel.expert: this model has no experts"),
        (Degrees(3, 3), "tiny-moe", "parallel.expert: 3 processes cannot share 8 experts"),
        (Degrees(tensor=4), "tiny-moe", "parallel.tensor: 4 processes cannot share 2 key/value heads"),
    ],
)
def test_a_model_that_cannot_be_divided_so(degrees, shape, message):
    with pytest.raises(ConfigError, match=message):
        degrees.check(tiny.config(shape))


def test_a_vocabulary_that_cannot_be_divided():
    with pytest.raises(ConfigError, match="parallel.tensor: 2 processes cannot share 2049 words"):
        Degrees(tensor=2).check(tiny.config("tiny-dense", vocab_size=2049))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.data=2"], "`parallel.data` is 2, which does not divide train.accumulation"),
        (["parallel.data=4", "parallel.expert=3"], "`parallel.expert` is 3, which does not divide"),
        (["parallel.sharding=1"], "`parallel.sharding` needs parallel.data above 1"),
        (["parallel.sharding=4"], "`parallel.sharding` is 4; it must be 0, 1, 2 or 3"),
        (["parallel.base=split"], "`parallel.base` is 'split'"),
        (["parallel.tensor=2", "lora.enabled=false"], "`parallel.tensor` needs adapters"),
        (
            ["parallel.data=2", "train.accumulation=2", "parallel.base=sharded"],
            "set train.recompute: layers",
        ),
    ],
)
def test_degrees_that_do_not_fit_the_run(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load("configs/21b/sft_lora_8k.yaml", ["train.accumulation=1", "train.recompute=none", *overrides])
