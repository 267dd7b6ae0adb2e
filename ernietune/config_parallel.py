"""The `parallel` section, and the rules on it that need no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ernietune.config_extras import REFERENCES


@dataclass
class ParallelSection:
    """Several processes; how they divide the work is in docs/parallel.md."""

    data: int = 1  # processes (or tensor groups) that each take micro-batches of a step
    expert: int = 1  # of these, how many share one set of experts
    tensor: int = 1  # processes that share every product of a micro-batch
    sharding: int = 0  # over `data`: 1 optimizer state, 2 gradients too, 3 what trains too
    base: str = "replicated"  # the frozen weights; sharded: each decoder layer's over `data`, gathered in use


def parallel_problems(config: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(key of the parallel section, what is wrong with it) where degrees do not fit each other or the run."""
    parallel, train = config["parallel"], config["train"]
    data, expert = parallel["data"], parallel["expert"]
    if data % expert:
        yield (
            "expert",
            f"is {expert}, which does not divide parallel.data {data}, whose processes share experts",
        )
    if train["accumulation"] % data:
        yield (
            "data",
            f"is {data}, which does not divide train.accumulation {train['accumulation']}, the micro-batches "
            "of a step of all processes together; make that a multiple",
        )
    yield from _stage_problems(config)
    yield from _gathering_problems(config)
    if expert * parallel["tensor"] > 1:
        key = "expert" if expert > 1 else "tensor"
        for problem in _divided_problems(config):
            yield key, problem


def _gathering_problems(config: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    parallel, train = config["parallel"], config["train"]
    stage, sharded = parallel["sharding"], parallel["base"] == "sharded"
    for name in [name for name, shares in (("sharding", stage), ("base", sharded)) if shares]:
        if parallel["data"] == 1:
            yield name, "needs parallel.data above 1: there is nobody to share with"
    for name in [name for name, gathers in (("sharding", stage == 3), ("base", sharded)) if gathers]:
        if train["recompute"] != "layers":
            yield name, f"is {parallel[name]}, which gathers a layer at a time; set train.recompute: layers"
        if train["eval_generate"]:
            yield name, f"is {parallel[name]}: no process has a whole model; set train.eval_generate to 0"


def _stage_problems(config: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    parallel, stage = config["parallel"], config["parallel"]["sharding"]
    if not 0 <= stage <= 3:
        yield "sharding", f"is {stage}; it must be 0, 1, 2 or 3"
    if stage >= 2 and "orthogonal" in config["train"]["router_losses"]:
        yield "sharding", f"is {stage}, but train.router_losses names orthogonal, which needs 0 or 1"
    if parallel["base"] == "sharded" and not config["lora"]["enabled"]:
        yield "base", "is sharded, but nothing is frozen without adapters; use parallel.sharding: 3"
    form = config["model"]["quantization"]
    if parallel["base"] == "sharded" and form != "none":
        yield "base", f"is sharded, but a base held as {form} is not cut into slices; use replicated"


def _divided_problems(config: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    train, reference = config["train"], config["dpo"]["reference"]
    if not config["lora"]["enabled"]:
        yield "needs adapters (lora.enabled): whole models are trained with data and sharding only"
    if train["eval_generate"]:
        yield "leaves no process a whole model for train.eval_generate; set that to 0"
    if train["objective"] == "dpo" and reference not in REFERENCES:
        yield "cannot divide the adapter that dpo.reference names; use dpo.reference: precomputed"
