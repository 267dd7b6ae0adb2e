"""What an estimate starts from: geometry, configuration, device, and what one of the processes holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

from ernietune.checkpoint.names import parameter_shapes
from ernietune.config import Config
from ernietune.errors import ConfigError
from ernietune.memory_modes import Recompute, is_auto, offloads_of, recompute_of, waits_on_host
from ernietune.models.config import ModelConfig
from ernietune.models.forms import TRAINING, Form, Scheme, form_of
from ernietune.parallel.degrees import Degrees, Part
from ernietune.targets import LoraSpec, Shapes, choose_trained, select

GIB = 2**30
LOGITS = 1 << 24  # numbers of a chunk of the loss, and of a piece of its head
# Bytes for a number of a matrix while it is made of codes: its fp32 value, and what it comes from.
_WIDENED = {"int": 4.0, "nf4": 6.0, "fp8": 12.0}
_DECODER = re.compile(r"model\.layers\.\d+\..*")


@dataclass(frozen=True)
class Setup:
    """One process of a run. `image_tokens` of a micro-batch's tokens are pictures of `picture_patches` each.

    All processes need the same: degrees divide heads and experts evenly, and slices are padded.
    """

    geometry: ModelConfig
    config: Config
    gpu: bool = True
    image_tokens: int = 0
    picture_patches: int = 1024  # 448 x 448 pixels, 256 tokens

    @property
    def number(self) -> int:
        """c: bytes of a number the model computes with."""
        return 2 if self.gpu and self.config.model.dtype != "float32" else 4

    @property
    def tokens(self) -> int:
        """T: tokens of a full micro-batch."""
        return self.config.train.rows * self.config.data.max_length

    @property
    def recompute(self) -> Recompute:
        """What is computed again; auto must have been resolved."""
        assert not is_auto(self.config.train.recompute)
        return recompute_of(self.config.train.recompute)

    def offloads(self, part: str) -> bool:
        """Whether activations, optimizer or weights leave the device for the host.

        A CPU's memory is the host's: only weights, which stay in the checkpoint's files there, take none.
        """
        return part in offloads_of(self.config.train.offload) and (self.gpu or part == "weights")

    def waits(self, path: str) -> bool:
        """Whether a parameter of the base is away until its layer works."""
        return self.offloads("weights") and waits_on_host(path)

    @cached_property
    def degrees(self) -> Degrees:
        """How many processes share the work."""
        parallel = self.config.parallel
        return Degrees(parallel.data, parallel.expert, parallel.tensor)

    @property
    def micro_batches(self) -> int:
        """Of a step, those of one process."""
        return self.config.train.accumulation // self.degrees.data

    @property
    def sequence_part(self) -> int:
        """By how much a tensor group divides the rows between its products."""
        return self.degrees.tensor

    @cached_property
    def local(self) -> ModelConfig:
        """The geometry of what this process computes with."""
        return self.degrees.local(self.geometry)

    @cached_property
    def whole(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the base with its shape."""
        return parameter_shapes(self.geometry)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the base as this process computes with it."""
        return {path: tuple(self.degrees.local_shape(path, shape)) for path, shape in self.whole.items()}

    def sharers(self, path: str) -> int:
        """Processes that hold the same part of a parameter and read other samples."""
        return self.degrees.replicas if Part.of(path).expert else self.degrees.data

    def sliced(self, path: str) -> int:
        """Into how many slices a parameter of the base, or one that trains, is cut between its uses."""
        moving = path in self.updating
        gathered = self.config.parallel.sharding == 3 if moving else self.config.parallel.base == "sharded"
        return self.sharers(path) if gathered and _DECODER.fullmatch(path) else 1

    @cached_property
    def adapted(self) -> dict[str, int]:
        """Path of every adapted layer -> numbers in this process's part of its two factors."""
        return {path: sum(map(math.prod, self._factors(path, True).values())) for path in self._chosen}

    @cached_property
    def adapted_whole(self) -> dict[str, int]:
        """The same of all processes together."""
        return {path: sum(map(math.prod, self._factors(path, False).values())) for path in self._chosen}

    @cached_property
    def _chosen(self) -> list[str]:
        lora = self.config.lora
        if not lora.enabled:
            return []
        return select(self.whole, LoraSpec(lora.rank, lora.alpha, tuple(lora.targets), tuple(lora.exclude)))

    def _factors(self, path: str, local: bool) -> Shapes:
        *stack, outputs, inputs = self.whole[path + ".weight"]
        rank = self.config.lora.rank
        factors = {f"{path}.lora_A": [*stack, rank, inputs], f"{path}.lora_B": [*stack, outputs, rank]}
        return {p: self.degrees.local_shape(p, shape) if local else shape for p, shape in factors.items()}

    @cached_property
    def trained(self) -> dict[str, int]:
        """Path of every base parameter that trains itself -> numbers in it."""
        if self.config.lora.enabled:
            return {}
        chosen = choose_trained(self.whole, self.config.train.trainable)
        return {path: math.prod(self.shapes[path]) for path in chosen}

    @cached_property
    def updating(self) -> dict[str, int]:
        """Path of everything that takes a gradient -> numbers of this process's part, before any slicing."""
        factors = (self._factors(path, True).items() for path in self._chosen)
        return {path: math.prod(shape) for found in factors for path, shape in found} | self.trained

    @property
    def trains_before_layers(self) -> bool:
        """Whether something trains in front of the first decoder layer."""
        before = ("vision_model.", "model.resampler_model.") if self.image_tokens else ()
        return any(path.startswith((*before, "model.embed_tokens.")) for path in self.updating)

    @property
    def trains_vision(self) -> bool:
        """Whether the backward pass goes through the vision tower."""
        return any(path.startswith("vision_model.") for path in self.updating)

    def stored(self, path: str) -> float:
        """Bytes of this process's part of a base parameter."""
        shape = self.shapes[path]
        if ".router." in path:
            return 4.0 * math.prod(shape)
        form = None if self._scheme is None else self._form(path, self._scheme)
        return float(self.number * math.prod(shape) if form is None else form.nbytes(shape))

    @cached_property
    def _scheme(self) -> Scheme | None:
        """A CPU, which computes in fp32, keeps in bfloat16 what has no codes; published weights are that."""
        name = self.config.model.quantization
        if name == "none":
            return None
        return TRAINING[name].keeping_the_rest() if self.gpu else TRAINING[name]

    def _form(self, path: str, scheme: Scheme) -> Form | None:
        layer, _, last = path.rpartition(".")
        held = last == "weight" and len(self.whole[path]) > 1
        return form_of(layer, self.whole[path], scheme, {}) if held else None

    def widened(self, prefix: str) -> float:
        """Bytes that products make of the stored matrices below a path: of one at a time, of the largest."""
        return max((size for path, size in self._wide.items() if path.startswith(prefix)), default=0.0)

    @cached_property
    def _wide(self) -> dict[str, float]:
        """The same of every parameter that is held in another form than products take."""
        if self._scheme is None:
            return {}
        layers = [path for path in self.shapes if ".router." not in path]
        forms = {path: form for path in layers if (form := self._form(path, self._scheme))}
        # Kernels of a GPU read all codes but NF4's as they are.
        return {
            path: _WIDENED[form.kind] * math.prod(self.shapes[path][-2:])
            for path, form in forms.items()
            if form.kind == "nf4" or not self.gpu
        }

    @property
    def head_panel(self) -> float:
        """Bytes of the piece of a bfloat16 head that is widened at a time."""
        if self._scheme is None or self.gpu:
            return 0.0
        return 4.0 * min(LOGITS, self.local.vocab_size * self.geometry.hidden_size)

    def changed(self, **changes: object) -> Setup:
        """The same with other values, named section__key for a key of the configuration."""
        own = {name: value for name, value in changes.items() if "__" not in name}
        config = self.config
        for name, value in changes.items():
            if "__" in name:
                part, _, key = name.partition("__")
                config = replace(config, **{part: replace(vars(config)[part], **{key: value})})
        return replace(self, config=config, **own)  # type: ignore[arg-type]


def setup_of(config: Config, geometry: ModelConfig, gpu: bool = True) -> Setup:
    """The setup of a configuration; half of a row's tokens are taken for pictures where the model sees.

    ConfigError when train.recompute names a part that the model does not have, or when the model cannot be
    divided as `parallel` says.
    """
    if "moe" in config.train.recompute.split("+") and not geometry.pools:
        raise ConfigError("train.recompute: names moe, but this model has no experts; leave it out")
    images = config.train.rows * config.data.max_length // 2 if geometry.is_vl else 0
    setup = Setup(geometry, config, gpu, images)
    setup.degrees.check(geometry)
    return setup
