"""Runs of 2 and 4 processes against one process: the same losses, weights, optimizer state and data position.

Every case is a whole `train.run.main`; the processes of one size are started once and work on all its cases.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import parallel_cases
import pytest
import small_run
import tiny_pairs

from ernietune import config as configuration
from ernietune.checkpoint import state
from ernietune.models.config import ModelConfig
from ernietune.parallel import traffic
from ernietune.train import run

CLOSE = 1e-5

# What is trained, each once by one process: the measure.
MEASURES = {
    # One conversation a micro-batch: every second one has no picture.
    "pictures": {"model": "tiny-vl", "changes": {"train_router_losses": {"load_balance": 0.01, "z": 0.001}}},
    "packed": {
        "model": "tiny-vl",
        "changes": {
            "data_packing": True,
            "data_eval": ["DATA"],
            "train_rows": 2,
            "train_neftune_alpha": 5.0,
        },
    },
    "answers": {
        "model": "tiny-vl",
        "changes": {"train_steps": 1, "data_eval": ["DATA"], "train_eval_generate": 2},
    },
    "text": {"model": "tiny-moe", "changes": {"data_packing": True, "lora_targets": ["experts"]}},
    "whole": {
        "model": "tiny-dense",
        "changes": {"lora_enabled": False, "train_learning_rate": 1e-4, "train_rate_ratios": {"mlp": 0.5}},
    },
    "pairs": {
        "model": "tiny-vl",
        "changes": {"train_objective": "dpo", "train_learning_rate": 1e-4, "data_eval": ["DATA"]},
    },
    "precomputed": {
        "model": "tiny-vl",
        "changes": {
            "train_objective": "dpo",
            "train_learning_rate": 1e-4,
            "dpo_reference": "precomputed",
        },
    },
}
GATHERED = {"sharding": 3, "base": "sharded"}
CASES = {
    # name: (processes, measure, parallel section)
    "data": (2, "pictures", {"data": 2}),
    "experts": (2, "pictures", {"data": 2, "expert": 2}),
    "tensor": (2, "pictures", {"tensor": 2}),
    "experts-text": (2, "text", {"data": 2, "expert": 2, "sharding": 2}),
    "sharding-1": (2, "packed", {"data": 2, "sharding": 1}),
    "sharding-2": (2, "packed", {"data": 2, "sharding": 2}),
    "sharding-3": (2, "packed", {"data": 2, **GATHERED}),
    "whole-sharded": (2, "whole", {"data": 2, "sharding": 3}),
    "pairs-experts": (2, "pairs", {"data": 2, "expert": 2, "sharding": 1}),
    "precomputed-tensor": (2, "precomputed", {"tensor": 2}),
    "answers": (2, "answers", {"data": 2}),
    "tensor-sharded": (4, "packed", {"data": 2, "tensor": 2, **GATHERED}),
    "experts-4": (4, "pictures", {"data": 4, "expert": 4}),
    "experts-2-replicas-2": (4, "packed", {"data": 4, "expert": 2, **GATHERED}),
    "all-at-once": (4, "pairs", {"data": 2, "expert": 2, "tensor": 2, "sharding": 2}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of all runs: measure-NAME and NAME of every case."""
    folder = tmp_path_factory.mktemp("parallel")
    mixed, pairs = small_run.write_data(folder / "data", 10), tiny_pairs.write(folder / "data")
    text = small_run.write_data(folder / "text", 10, pictures=False)
    for shape in {measure["model"] for measure in MEASURES.values()}:
        small_run.base(folder / shape, shape)

    def case(measure, output, parallel):
        found = MEASURES[measure]
        dpo = found["changes"].get("train_objective") == "dpo"
        data = str(pairs if dpo else mixed if found["model"] == "tiny-vl" else text)
        changes = dict(found["changes"])
        if "data_eval" in changes:
            changes["data_eval"] = [data]
        if parallel.get("sharding") == 3:
            changes["train_recompute"] = "layers"
        made = {"base": str(folder / found["model"]), "data": data, "output": str(folder / output)}
        return {**made, "parallel": parallel, "changes": changes}

    for processes in (2, 4):
        cases = [case(m, name, parallel) for name, (n, m, parallel) in CASES.items() if n == processes]
        started = parallel_cases.start(processes, cases, folder / f"of-{processes}")
        if processes == 2:
            for measure in MEASURES:
                run.main(parallel_cases.settings(case(measure, f"measure-{measure}", {})))
        parallel_cases.finish(started, folder / f"of-{processes}")
    return folder


def newest(folder):
    """progress of the newest checkpoint."""
    progress, _ = state.load(folder)
    return progress


@pytest.mark.parametrize("name", CASES)
def test_a_divided_run_is_the_run_of_one_process(world, name):
    one, many = world / f"measure-{CASES[name][1]}", world / name
    for kind in ("train", "eval"):
        expected, found = small_run.log(one, kind), small_run.log(many, kind)
        assert expected.keys() == found.keys()
        for step, record in expected.items():
            for key in set(record) - {"time", "seconds", "tokens_per_second", "kind"}:
                assert found[step][key] == pytest.approx(record[key], rel=1e-4, abs=CLOSE), (step, key)
    expected, found = small_run.tensors(one), small_run.tensors(many)
    assert expected.keys() == found.keys()
    worst = {key: float(np.abs(expected[key] - found[key]).max()) for key in expected}
    assert max(worst.values()) <= CLOSE, max(worst, key=worst.get)
    assert newest(one).data == newest(many).data


def test_the_adapter_on_disk_has_the_names_and_shapes_of_one_process(world):
    for name in ("experts-4", "all-at-once"):
        one = state.checkpoint_in(world / f"measure-{CASES[name][1]}", "last") / "adapter_model.safetensors"
        many = state.checkpoint_in(world / name, "last") / "adapter_model.safetensors"
        expected, found = small_run.Reader(one), small_run.Reader(many)
        assert [(i.name, i.shape) for i in expected.infos] == [(i.name, i.shape) for i in found.infos]
        for info in expected.infos:
            assert np.allclose(expected.float32(info.name), found.float32(info.name), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["experts-4", "sharding-3", "all-at-once"])
def test_a_run_of_many_goes_on_in_one(world, name):
    measure = CASES[name][1]
    again = world / f"again-{name}"
    shutil.copytree(world / name, again)
    (again / "run.json").write_text(json.dumps({"last": "step-000002"}))  # as if it had died in step 3
    (again / "log.jsonl").unlink()
    alone = ["data=1", "expert=1", "tensor=1", "sharding=0", "base=replicated"]
    overrides = [f"train.output={again}", *(f"parallel.{value}" for value in alone)]
    run.main(configuration.load(again / "config.yaml", overrides))
    expected, found = small_run.tensors(world / f"measure-{measure}"), small_run.tensors(again)
    assert max(np.abs(expected[key] - found[key]).max() for key in expected) <= CLOSE
    assert list(small_run.log(again)) == [3]


def processes_of(folder):
    return json.loads((folder / "processes.json").read_text())["processes"]


def test_a_process_holds_less_of_what_is_divided(world):
    replicated = processes_of(world / "data")[0]["held"]
    for name in ("experts", "tensor"):
        assert max(each["held"] for each in processes_of(world / name)) < 0.95 * replicated, name
    whole = processes_of(world / "sharding-1")[0]
    gathered = processes_of(world / "sharding-3")[0]
    assert gathered["held"] < 0.9 * whole["held"]


def test_the_bytes_that_are_sent_are_those_of_the_formulas(world):
    trained = {k: v.size for k, v in small_run.tensors(world / "data").items() if k.startswith("weight::")}
    step = traffic.StepTraffic(common=sum(trained.values()))
    sent = processes_of(world / "data")[0]["sent"]["all_reduce"]
    expected = 3 * traffic.gradient_bytes(step, 2, 2)
    # Beside the gradients: a flag for each parameter, losses and norms.
    assert expected <= sent <= 1.15 * expected
    tokens = sum(record["tokens"] for record in small_run.log(world / "tensor").values())
    config = ModelConfig.from_folder(world / "tiny-vl")
    labels = sum(record["supervised_tokens"] for record in small_run.log(world / "tensor").values())
    step = traffic.StepTraffic(
        tokens=tokens, supervised=labels, width=config.hidden_size, layers=config.num_hidden_layers
    )
    sent = processes_of(world / "tensor")[0]["sent"]
    expected = traffic.tensor_bytes(step, 2)
    # Rows are filled up to even numbers; and the last ones are gathered.
    assert expected <= 2 * sent["reduce_scatter"] <= 1.05 * expected
    expected += traffic.vocabulary_bytes(step, 2)
    # And sums of gradients that are partial, gradients of pictures, what a checkpoint gathers.
    assert expected <= sum(sent.values()) <= 1.35 * expected
