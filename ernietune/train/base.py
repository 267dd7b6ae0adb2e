"""The model a run starts from, its frozen weights in the form that `model.quantization` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import paddle
import yaml

from ernietune.checkpoint import state
from ernietune.checkpoint.load import load_model
from ernietune.checkpoint.packed import load_packed, stored_dtype
from ernietune.checkpoint.waiting import load_waiting
from ernietune.errors import CheckpointError, ConfigError
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM
from ernietune.models.devices import fp8_problem
from ernietune.models.forms import TRAINING
from ernietune.models.packed import stored_bytes
from ernietune.parallel.blocks import Waiting
from ernietune.parallel.degrees import Holding
from ernietune.train.log import console

NONE = "none"


@dataclass(frozen=True)
class Base:
    """The model, and what of it is not there but waits on the host."""

    model: CausalLM
    waiting: Waiting | None = None


def waiting_base(
    folder: Path,
    geometry: ModelConfig,
    dtype: str,
    build: Callable[[ModelConfig, str], CausalLM],
    holding: Holding,
) -> Base:
    """The model of a checkpoint folder for `train.offload: weights`."""
    model, fetches = load_waiting(folder, dtype, geometry, build, holding)
    return Base(model, Waiting(fetches))


def load_base(
    folder: Path,
    geometry: ModelConfig,
    dtype: str,
    quantization: str,
    build: Callable[[ModelConfig, str], CausalLM] = CausalLM,
    holding: Holding | None = None,
) -> CausalLM:
    """The model of a checkpoint folder, computing in `dtype`; codes are made tensor by tensor while reading.

    What has no codes keeps the checkpoint's own numbers: bfloat16 ones stay so on a CPU as well, where each
    weight is widened for its product.
    """
    if quantization == NONE:
        return load_model(folder, dtype, geometry, build, holding)
    on_cpu = paddle.get_device() == "cpu"
    if quantization == "fp8" and not on_cpu and (problem := fp8_problem()):
        raise ConfigError(f"model.quantization: {problem}; use wint8")
    scheme = TRAINING[quantization]
    if not on_cpu or stored_dtype(folder, geometry) != "BF16":
        scheme = scheme.keeping_the_rest()
    model, notes = load_packed(folder, scheme, geometry, dtype, build, holding)
    for note in notes:
        console.print(f"{quantization}: {note}")
    console.print(f"the frozen base is held as {quantization}: {stored_bytes(model) / 1e9:.3f} GB")
    return model


def require_same_form(folder: Path, quantization: str) -> None:
    """CheckpointError when the run in `folder` has trained over another form of its base."""
    file = folder / "config.yaml"
    if not state.pointers(folder) or not file.is_file():
        return
    section = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("model") or {}
    before = section.get("quantization", NONE)
    if before != quantization:
        raise CheckpointError(
            f"{folder} cannot be resumed: its base was held as {before} and model.quantization is "
            f"{quantization}; set it back or choose another train.output"
        )
