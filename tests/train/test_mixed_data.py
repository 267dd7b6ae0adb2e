"""A run on files of two forms, in turn, with conversations that give several samples; and its resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import small_run

from ernietune.train.run import main

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_run.base(tmp_path_factory.mktemp("base") / "m")


def config(base, output, steps):
    made = small_run.config(base, SAMPLES / "erniekit_vl.json", output, train_steps=steps, train_rows=2)
    made.data.train.append(str(SAMPLES / "alpaca.json"))
    made.data.mixing, made.data.weights = "interleave", [2.0, 1.0]
    made.train.save_every = 2
    return made


def test_a_run_on_a_mixture_resumes_exactly(base, tmp_path):
    whole = main(config(base, tmp_path / "whole", 4))
    assert [small_run.log(whole)[step]["samples"] for step in range(1, 5)] == [2] * 4
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for name in ("step-000004",):
        shutil.rmtree(stopped / "checkpoints" / name)
    (stopped / "run.json").write_text('{"last": "step-000002"}')
    (stopped / "log.jsonl").unlink()
    main(config(base, stopped, 4))
    resumed = small_run.log(stopped)
    assert sorted(resumed) == [3, 4]
    assert [resumed[step]["loss"] for step in (3, 4)] == small_run.losses(whole)[2:].tolist()
    assert np.isfinite(small_run.losses(whole)).all()
