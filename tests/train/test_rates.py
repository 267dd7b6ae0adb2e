"""The learning rate of a step and of a group of parameters."""

from __future__ import annotations

import numpy as np
import pytest
import small_run
import tiny

from ernietune.config import TrainSection
from ernietune.errors import ConfigError
from ernietune.lora import LoraSpec, inject, unfreeze
from ernietune.train.optim import Optimizer, learning_rate, rate_ratios
from ernietune.train.run import main

ATTENTION = "model.layers.0.self_attn.q_proj.lora_A"
EXPERTS = "model.layers.1.mlp.text_experts.up_proj.lora_B"
ROUTER = "model.layers.1.mlp.text_experts.router.weight"
BLOCK = "vision_model.blocks.0.attn.qkv.weight"
PATHS = [ATTENTION, EXPERTS, ROUTER, BLOCK]


def test_a_share_of_the_steps_warms_up() -> None:
    share = TrainSection(learning_rate=1.0, warmup_ratio=0.25, schedule="constant")
    assert [learning_rate(step, 10, share) for step in range(1, 5)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    count = TrainSection(learning_rate=1.0, warmup_steps=3, schedule="linear")
    share.schedule = "linear"
    assert [learning_rate(s, 10, share) for s in range(1, 11)] == [
        learning_rate(s, 10, count) for s in range(1, 11)
    ]


@pytest.mark.parametrize(
    ("ratios", "plus", "expected"),
    [
        ({}, 1.0, [1, 1, 1, 1]),
        ({}, 4.0, [1, 4, 1, 1]),
        ({"router": 0.01, "vision": 0.5}, 4.0, [1, 4, 0.01, 0.5]),
        ({"text_experts": 0.1}, 4.0, [1, 0.4, 1, 1]),
        ({r"vision_model\..*": 0.9, "vision": 0.5}, 1.0, [1, 1, 1, 0.9]),  # the first that matches
    ],
)
def test_ratios_by_group_and_pattern(ratios: dict[str, float], plus: float, expected: list[float]) -> None:
    found = rate_ratios(PATHS, ratios, plus)
    assert list(found) == PATHS
    assert list(found.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "problem"), [("norms", "matches nothing that trains"), ("(", "regular expression")]
)
def test_a_name_that_fits_nothing(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        rate_ratios(PATHS, {name: 0.5})


def test_a_step_moves_each_group_by_its_ratio() -> None:
    """Adam's first step is the rate itself, whatever the gradient."""
    model = tiny.model("tiny-moe")
    unfreeze(model, ("router", "attention"))
    optimizer = Optimizer(model, TrainSection(rate_ratios={"router": 0.1}, clip_norm=None))
    before = {path: p.numpy() for path, p in optimizer.parameters.items()}
    sum(p.sum() for p in optimizer.parameters.values()).backward()
    optimizer.step(1e-2)
    for path, parameter in optimizer.parameters.items():
        moved = 1e-3 if ".router." in path else 1e-2
        np.testing.assert_allclose(before[path] - parameter.numpy(), moved, rtol=1e-3, err_msg=path)


def test_groups_keep_their_state_in_a_resume(tmp_path) -> None:
    base, data = (
        small_run.base(tmp_path / "base", "tiny-moe"),
        small_run.write_data(tmp_path / "data", 4, False),
    )
    changes = {
        "lora_targets": ["attention", "experts"],
        "lora_plus_ratio": 4.0,
        "train_rate_ratios": {"attention": 0.5},
        "train_schedule": "constant",
    }
    whole = main(small_run.config(base, data, tmp_path / "whole", train_steps=6, **changes))
    main(small_run.config(base, data, tmp_path / "parts", train_steps=3, **changes))
    parts = main(small_run.config(base, data, tmp_path / "parts", train_steps=6, **changes))
    np.testing.assert_array_equal(small_run.losses(parts), small_run.losses(whole))


def test_plus_ratio_and_groups_multiply() -> None:
    model = tiny.model("tiny-dense")
    inject(model, LoraSpec(rank=2, targets=("attention", "mlp")))
    optimizer = Optimizer(model, TrainSection(rate_ratios={"mlp": 0.5}, clip_norm=None), plus_ratio=4.0)
    ratios = rate_ratios(optimizer.parameters, {"mlp": 0.5}, 4.0)
    assert set(ratios.values()) == {1.0, 4.0, 0.5, 2.0}
