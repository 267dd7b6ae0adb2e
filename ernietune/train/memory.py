"""Before a run: which recompute auto stands for here, and what of train.offload makes no difference."""

from __future__ import annotations

from pathlib import Path

import paddle

from ernietune.config import Config
from ernietune.estimate.report import estimate, resolved
from ernietune.estimate.setup import GIB, Setup, setup_of
from ernietune.memory_modes import budget_of, is_auto, offloads_of
from ernietune.models.config import ModelConfig
from ernietune.train.log import console


def settled(config: Config, geometry: ModelConfig) -> Setup:
    """The setup of a run on this machine, with a recompute that is not auto.

    Told are what auto has chosen, and that a CPU's memory is the host's already.
    """
    gpu = paddle.device.get_device().startswith("gpu")
    if not gpu:
        _say_what_offload_is_worth(offloads_of(config.train.offload))
    setup = setup_of(config, geometry, gpu)
    if not is_auto(config.train.recompute):
        return setup
    budget = budget_of(config.train.recompute) or available(gpu)
    chosen = resolved(setup, budget)
    needed = estimate(chosen).needed / GIB
    verdict = "fits" if needed <= budget else "does not fit: nothing saves more"
    name = chosen.config.train.recompute
    console.print(f"train.recompute: auto is {name} here: {needed:.1f} GiB of {budget:.1f} GiB, {verdict}")
    return chosen


def _say_what_offload_is_worth(parts: frozenset[str]) -> None:
    """On a CPU."""
    if idle := sorted(parts - {"weights"}):
        console.print(
            f"train.offload: {'+'.join(idle)} saves nothing on a CPU, whose memory is the host's; "
            "the copies are made all the same"
        )
    if "weights" in parts:
        console.print("train.offload: weights stay in the checkpoint's files and are read whenever they work")


def available(gpu: bool) -> float:
    """GiB of the card, or of memory that processes can still get."""
    if gpu:
        return float(paddle.device.cuda.get_device_properties().total_memory) / GIB
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kib * 1024 / GIB
