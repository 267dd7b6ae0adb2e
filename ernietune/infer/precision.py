"""In which form the weights are held for inference, as an operator chooses it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ernietune_kernels.cpu.library import kernels

from ernietune.checkpoint.load import load_model
from ernietune.checkpoint.packed import load_packed, stored_dtype
from ernietune.errors import ConfigError, listed
from ernietune.infer.cache import on_gpu
from ernietune.infer.memory import require_room
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM
from ernietune.models.devices import fp8_problem
from ernietune.models.forms import SCHEMES, TRAINING, Scheme

_log = logging.getLogger(__name__)
_DTYPES = ("auto", "float32", "bfloat16")
_ON_CPU = tuple(name for name in SCHEMES if name != "bfloat16")
_QUANTIZED = (*_ON_CPU, "fp8")


@dataclass(frozen=True)
class Precision:
    """`dtype` of the weights and `quantization` (wint8, wint4, mixed, on a GPU fp8 too).

    ConfigError for a value unknown here.

    `auto` keeps bfloat16 checkpoints in bfloat16, where a CPU still computes in fp32: the numbers are those
    of fp32 weights. Other checkpoints are float32 on a CPU and bfloat16 on a GPU.
    """

    dtype: str = "auto"
    quantization: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"--dtype {self.dtype} is unknown; choose one of {listed(_DTYPES)}")
        if self.quantization not in (None, *_QUANTIZED):
            raise ConfigError(
                f"--quantization {self.quantization} is unknown; choose one of {listed(_QUANTIZED)}"
            )
        if self.quantization and self.dtype == "float32":
            raise ConfigError(
                f"--quantization {self.quantization} contradicts --dtype float32, which keeps every weight; "
                "leave one of them out"
            )

    def load(self, folder: Path, config: ModelConfig) -> CausalLM:
        """The model of a checkpoint folder in this form; what it cannot have is said by a warning."""
        if on_gpu():
            return self._on_gpu(folder, config)
        if self.quantization not in (None, *_ON_CPU):
            raise ConfigError(
                f"--quantization {self.quantization} needs a GPU; choose one of {listed(_ON_CPU)} on a CPU"
            )
        form = self.quantization or self._form(folder, config)
        require_room(folder, config, form)
        if form == "float32":
            return load_model(folder, "float32", config)
        return self._packed(folder, config, form, SCHEMES[form], "float32")

    def _packed(self, folder: Path, config: ModelConfig, form: str, scheme: Scheme, dtype: str) -> CausalLM:
        model, notes = load_packed(folder, scheme, config, dtype)
        for note in notes:
            _log.warning("%s: %s", form, note)
        return model

    def _form(self, folder: Path, config: ModelConfig) -> str:
        if self.dtype != "auto":
            return self.dtype
        # Without the C kernels every product would widen its weight first, which is slower than fp32.
        kept = stored_dtype(folder, config) == "BF16" and kernels() is not None
        return "bfloat16" if kept else "float32"

    def _on_gpu(self, folder: Path, config: ModelConfig) -> CausalLM:
        dtype = "bfloat16" if self.dtype == "auto" else self.dtype
        form = self.quantization
        if form is None:
            return load_model(folder, dtype, config)
        if form == "fp8" and (problem := fp8_problem()):
            raise ConfigError(f"--quantization: {problem}; use wint8")
        # As the frozen base of a training: its kernels are those that read codes on a GPU.
        return self._packed(folder, config, form, TRAINING[form].keeping_the_rest(), dtype)
