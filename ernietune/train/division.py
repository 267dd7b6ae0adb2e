"""What every process of a run would hold, from shapes alone; imports no paddle."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.table import Table

from ernietune.checkpoint.names import parameter_shapes
from ernietune.config import Config
from ernietune.errors import ConfigError
from ernietune.models.config import ModelConfig
from ernietune.models.forms import FP8_BLOCK, TRAINING, Scheme, form_of
from ernietune.parallel.degrees import Degrees, Holding, Part
from ernietune.targets import LoraSpec, Shapes, choose_trained, select
from ernietune.train.log import console

_LAYER = re.compile(r"model\.layers\.\d+\..*")


def degrees_of(config: Config) -> Degrees:
    """The degrees of a configuration."""
    return Degrees(config.parallel.data, config.parallel.expert, config.parallel.tensor)


def check_division(config: Config, geometry: ModelConfig) -> None:
    """ConfigError when the model cannot be divided as `parallel` says, in the form that its base has."""
    degrees, form = degrees_of(config), config.model.quantization
    degrees.check(geometry)
    if form == "none" or degrees.tensor == 1:
        return
    for path, shape in parameter_shapes(geometry).items():
        axis = Part.of(path).tensor
        multiple = _codes_of(path, shape, TRAINING[form], axis)
        if axis is not None and shape[axis] // degrees.tensor % multiple:
            layer, what = path.split(".")[-2], "inputs" if axis == -1 else "outputs"
            raise ConfigError(
                f"parallel.tensor: each of {degrees.tensor} processes would have "
                f"{shape[axis] // degrees.tensor} of the {shape[axis]} {what} of {layer}, but a base held as "
                f"{form} has a scale for {multiple} of them together; use another degree, or "
                "model.quantization: wint8"
            )


def _codes_of(path: str, shape: Sequence[int], scheme: Scheme, axis: int | None) -> int:
    """How many neighbours along an axis of a weight have one scale, and so cannot be parted."""
    layer, _, last = path.rpartition(".")
    form = form_of(layer, shape, scheme, {}) if last == "weight" and len(shape) > 1 else None
    if form is None or form.bits == 16:
        return 1
    if form.kind == "fp8":
        return FP8_BLOCK
    return form.group if form.group and axis == -1 else 1


def trained_shapes(shapes: Shapes, config: Config, spec: LoraSpec | None) -> dict[str, list[int]]:
    """Everything that takes a gradient, whole: factors of adapters, or parameters themselves."""
    if spec is None:
        return {path: list(shapes[path]) for path in choose_trained(shapes, config.train.trainable)}
    found = {}
    for path in select(shapes, spec):
        *experts, outputs, inputs = shapes[f"{path}.weight"]
        found[f"{path}.lora_A"] = [*experts, spec.rank, inputs]
        found[f"{path}.lora_B"] = [*experts, outputs, spec.rank]
    return found


def numbers(shapes: Shapes, degrees: Degrees, gathered: bool) -> int:
    """Numbers one process keeps; `gathered`: of decoder layers a slice only."""
    total = 0
    for path, shape in shapes.items():
        size = math.prod(degrees.local_shape(path, shape))
        sharers = degrees.replicas if Part.of(path).expert else degrees.data
        total += -(-size // sharers) if gathered and _LAYER.fullmatch(path) else size
    return total


def updated_numbers(trained: Shapes, degrees: Degrees, stage: int) -> int:
    """Trained numbers whose optimizer state one process keeps."""
    total = 0
    for path, shape in trained.items():
        size = math.prod(degrees.local_shape(path, shape))
        sharers = degrees.replicas if Part.of(path).expert else degrees.data
        total += -(-size // sharers) if stage else size
    return total


def print_division(config: Config, geometry: ModelConfig, shapes: Shapes, spec: LoraSpec | None) -> None:
    """The processes of a run, and what each holds; ConfigError when the model cannot be divided so."""
    degrees, parallel = degrees_of(config), config.parallel
    check_division(config, geometry)
    if degrees.world == 1:
        return
    trained = trained_shapes(shapes, config, spec)
    base = {path: shape for path, shape in shapes.items() if path not in trained}
    kept = numbers(base, degrees, parallel.base == "sharded")
    own = numbers(trained, degrees, parallel.sharding == 3)
    updated = updated_numbers(trained, degrees, parallel.sharding)
    per_step = config.train.accumulation // degrees.data
    sizes = f"data {degrees.data}, expert {degrees.expert}, tensor {degrees.tensor}"
    title = f"{degrees.world} processes: {sizes}, sharding {parallel.sharding}, base {parallel.base}"
    table = Table(title=f"{title}; millions of parameters")
    for name in ("rank", "micro-batches", "experts", "heads", "frozen", "trained", "updated"):
        table.add_column(name, justify="right")
    experts = geometry.pools[0].count // degrees.expert if geometry.pools else 0
    heads = geometry.num_attention_heads // degrees.tensor
    for rank in range(degrees.world):
        place, part = rank // degrees.tensor, rank % degrees.tensor
        first = Holding(degrees, rank).first_expert(experts)
        shown = ", ".join(str(place + i * degrees.data) for i in range(min(per_step, 4)))
        table.add_row(
            str(rank),
            shown + ", ..." * (per_step > 4),
            f"{first}-{first + experts - 1}" if experts else "-",
            f"{part * heads}-{(part + 1) * heads - 1}",
            *(f"{count / 1e6:,.2f}" for count in (kept, own, updated)),
        )
    console.print(table)
