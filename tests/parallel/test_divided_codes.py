"""A base in codes that processes share: the codes and the training of one process, or a sentence why not."""

from __future__ import annotations

import numpy as np
import paddle
import parallel_cases
import pytest
import small_run
from ernietune_kernels.frozen import FrozenWeight

from ernietune.checkpoint.packed import load_packed
from ernietune.config import load
from ernietune.errors import ConfigError
from ernietune.initialize import initialize
from ernietune.models.config import SHAPES, ModelConfig
from ernietune.models.forms import TRAINING
from ernietune.models.packed import packed_layers
from ernietune.parallel.apply import build
from ernietune.parallel.collectives import Group
from ernietune.parallel.degrees import Degrees, Holding
from ernietune.parallel.team import Team
from ernietune.train import run
from ernietune.train.division import check_division

CLOSE = 1e-5
# 256 numbers are two groups of int4 and two blocks of FP8: two processes can have one each.
WIDE = {"intermediate_size": 256, "moe_intermediate_size": 256, "moe_num_experts": 4}
WIDE |= {"head_dim": 64, "num_key_value_heads": 4}
CASES = {
    "experts": ("mixed", {"data": 2, "expert": 2}),
    "tensor": ("mixed", {"tensor": 2}),
    "tensor-nf4": ("nf4", {"tensor": 2}),
    "gathered-adapters": ("wint4", {"data": 2, "expert": 2, "sharding": 3}),
    "both": ("wint8", {"data": 2, "expert": 2, "sharding": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random checkpoint whose widths can be parted."""
    SHAPES["wide-moe"] = SHAPES["tiny-moe"] | WIDE
    try:
        return initialize("wide-moe", tmp_path_factory.mktemp("models") / "wide", seed=5)
    finally:
        del SHAPES["wide-moe"]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Every case, and `one-FORM` of one process."""
    folder = tmp_path_factory.mktemp("runs")
    data = small_run.write_data(folder / "data", 10, pictures=False)

    def case(name, form, parallel):
        changes = {"model_quantization": form, "lora_targets": ["attention", "experts", "shared_experts"]}
        changes["train_recompute"] = "layers" if parallel.get("sharding") == 3 else "none"
        made = {"base": str(model), "data": str(data), "output": str(folder / name)}
        return {**made, "parallel": parallel, "changes": changes}

    cases = [case(name, form, parallel) for name, (form, parallel) in CASES.items()]
    started = parallel_cases.start(2, cases, folder / "processes")
    for form in {form for form, _ in CASES.values()}:
        run.main(parallel_cases.settings(case(f"one-{form}", form, {})))
    parallel_cases.finish(started, folder / "processes")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_divided_run_is_the_run_of_one_process(runs, name):
    one, many = runs / f"one-{CASES[name][0]}", runs / name
    assert np.abs(small_run.losses(one) - small_run.losses(many)).max() <= CLOSE
    expected, found = small_run.tensors(one), small_run.tensors(many)
    assert expected.keys() == found.keys()
    worst = {key: float(np.abs(expected[key] - found[key]).max()) for key in expected}
    assert max(worst.values()) <= CLOSE, max(worst, key=worst.get)


def part_of(degrees, rank):
    """What a process of that rank would know of its place; it talks to nobody."""
    return Team(degrees, *(Group((0,), 0) for _ in range(5))), Holding(degrees, rank)


def numbers(layer):
    """What the codes of a layer stand for."""
    assert isinstance(layer.stored, FrozenWeight)
    if len(layer.shape) == 2:
        return layer.stored.matrix(None, paddle.float32).numpy()
    return np.stack([layer.stored.matrix(e, paddle.float32).numpy() for e in range(layer.shape[0])])


@pytest.mark.parametrize("form", TRAINING)
@pytest.mark.parametrize("degrees", [Degrees(2, 2, 1), Degrees(1, 1, 2), Degrees(2, 2, 2)])
def test_every_process_has_its_part_of_the_codes_of_one(model, form, degrees):
    geometry, scheme = ModelConfig.from_folder(model), TRAINING[form].keeping_the_rest()
    whole = {path: numbers(layer) for path, layer in packed_layers(load_packed(model, scheme, geometry)[0])}
    for rank in range(degrees.world):
        team, holding = part_of(degrees, rank)
        found, _ = load_packed(
            model,
            scheme,
            geometry,
            build=lambda config, dtype, t=team: build(config, dtype, t),
            holding=holding,
        )
        parts = dict(packed_layers(found))
        assert parts.keys() == whole.keys()
        for path, layer in parts.items():
            np.testing.assert_array_equal(numbers(layer), holding.cut(f"{path}.weight", whole[path]), path)


def settings(*overrides):
    return load("configs/21b/sft_lora_8k.yaml", ["train.accumulation=2", *overrides])


@pytest.mark.parametrize(
    ("shape", "form", "message"),
    [
        ("tiny-dense", "wint4", "would have 64 of the 128 inputs of o_proj, .* wint4 has a scale for 128 of"),
        ("tiny-dense", "fp8", "would have 64 of the 128 outputs of q_proj, .* fp8 has a scale for 128 of"),
    ],
)
def test_codes_are_not_parted_within_a_group(shape, form, message):
    geometry = ModelConfig.from_dict(SHAPES[shape], shape)
    config = settings("parallel.tensor=2", f"model.quantization={form}")
    with pytest.raises(ConfigError, match=f"parallel.tensor: each of 2 processes {message}"):
        check_division(config, geometry)


@pytest.mark.parametrize("shape", ["21b-a3b", "300b-a47b", "vl-28b-a3b", "vl-424b-a47b"])
def test_published_models_can_be_shared_by_two_in_every_form(shape):
    geometry = ModelConfig.from_dict(SHAPES[shape], shape)
    for form in TRAINING:
        check_division(settings("parallel.tensor=2", f"model.quantization={form}"), geometry)


def test_codes_are_not_cut_into_slices():
    base = ["parallel.data=2", "parallel.base=sharded", "train.recompute=layers"]
    with pytest.raises(ConfigError, match="a base held as wint8 is not cut into slices; use replicated"):
        settings(*base, "model.quantization=wint8")
