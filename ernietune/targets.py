"""What an adapter goes around and what trains, worked out from names and shapes alone; imports no paddle."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ernietune.errors import ConfigError, listed

# A target is one of these names or a regular expression for a whole layer path.
GROUPS: dict[str, str] = {
    "attention": r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "shared_experts": r"model\.layers\.\d+\.mlp\.shared_experts\.(gate|up|down)_proj",
    "experts": r"model\.layers\.\d+\.mlp\.(text|vision)_experts\.(gate|up|down)_proj",
    "text_experts": r"model\.layers\.\d+\.mlp\.text_experts\.(gate|up|down)_proj",
    "vision_experts": r"model\.layers\.\d+\.mlp\.vision_experts\.(gate|up|down)_proj",
    "vision": r"vision_model\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
    "resampler": r"model\.resampler_model\.((spatial|temporal)_linear\.[02]|mlp)",
}
NEVER = r"lm_head|.*\.embed_tokens|.*\.router|vision_model\.patch_embed\.proj"
# Every parameter falls in the first of these that matches its path.
PARAMETER_GROUPS: dict[str, str] = {
    **{name: GROUPS[name] + r"(\..*)?" for name in GROUPS if name != "experts"},
    "router": r"model\.layers\.\d+\.mlp\.\w+_experts\.router\..*",
    "norms": r".*norm\d?\.(weight|bias)|vision_model\.ln\..*|.*_linear\.3\..*",
    "embeddings": r"model\.embed_tokens\..*|lm_head\..*",
    "patch_embedding": r"vision_model\.patch_embed\..*",
}
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LoraSpec:
    """What is adapted and how strongly; `alpha` None means twice the rank."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("attention", "experts")
    exclude: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False

    @property
    def effective_alpha(self) -> float:
        """Alpha with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """Factor of B(A(x)): alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.effective_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def named_targets(paths: Collection[str], shapes: Shapes) -> tuple[str, ...]:
    """Targets that mean exactly these layers: names of groups where all of a group is there, else paths."""
    layers, left, names = adaptable(shapes), set(paths), []
    for name, pattern in GROUPS.items():
        group = {path for path in layers if re.fullmatch(pattern, path)}
        if group and group <= left:
            names.append(name)
            left -= group
    return (*names, *sorted(re.escape(path) for path in left))


def adaptable(shapes: Shapes) -> list[str]:
    """Paths of the layers an adapter can go around: matrices and stacks, but no router, embedding or head."""
    layers = [path.removesuffix(".weight") for path, shape in shapes.items() if len(shape) > 1]
    return [path for path in layers if not re.fullmatch(NEVER, path)]


def select(shapes: Shapes, spec: LoraSpec) -> list[str]:
    """Paths of the layers that `spec` adapts, in order.

    ConfigError names each target that matches nothing, so that a misspelt name cannot pass silently.
    """
    layers = adaptable(shapes)
    for key, names in (("targets", spec.targets), ("exclude", spec.exclude)):
        idle = [name for name in names if not any(_matches(name, path, key) for path in layers)]
        if idle:
            raise ConfigError(
                f"lora.{key}: {listed(idle)} matches no layer of this model; "
                f"use a group ({', '.join(GROUPS)}) or a regular expression for whole layer paths"
            )
    chosen = [
        path
        for path in layers
        if any(_matches(name, path, "targets") for name in spec.targets)
        and not any(_matches(name, path, "exclude") for name in spec.exclude)
    ]
    if not chosen:
        raise ConfigError("lora.targets, less lora.exclude, names no layer; nothing would be trained")
    return chosen


def _matches(name: str, path: str, key: str) -> bool:
    try:
        return re.fullmatch(GROUPS.get(name, name), path) is not None
    except re.error as error:
        raise ConfigError(f"lora.{key}: {name!r} is not a regular expression ({error})") from None


def choose_trained(shapes: Shapes, groups: Sequence[str]) -> list[str]:
    """Parameter paths for full fine-tuning, by group or pattern; "all" is everything but the routers.

    Routers train only when they are named, because the balance of the experts depends on them.
    """
    chosen: dict[str, None] = {}
    for name in groups:
        routers = PARAMETER_GROUPS["router"]
        touched = [
            path
            for path in shapes
            if (not re.fullmatch(routers, path) if name == "all" else matches_group(name, path))
        ]
        if not touched:
            raise ConfigError(
                f"train.trainable: {name!r} matches no parameter; "
                f"use all, {', '.join(PARAMETER_GROUPS)} or a pattern"
            )
        chosen |= dict.fromkeys(touched)
    return list(chosen)


def matches_group(name: str, path: str) -> bool:
    """Whether a parameter's path is in a group, or matched by a regular expression for it or its layer."""
    pattern = PARAMETER_GROUPS.get(name, GROUPS.get(name, name) + r"(\..*)?")
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ConfigError(f"{name!r} is not a group or regular expression ({error})") from None


@dataclass(frozen=True)
class GroupRow:
    """One line of the table of what trains; `adapted` and `frozen` count layers, the rest parameters."""

    group: str
    adapted: int
    frozen: int
    rank: int
    trainable: int
    parameters: int


def parameter_table(shapes: Shapes, spec: LoraSpec | None, trained: Sequence[str] = ()) -> list[GroupRow]:
    """What trains, by group, worked out from the base model's shapes alone.

    `spec` gives the adapters, `trained` the parameters that train themselves (full fine-tuning).
    """
    adapted = set(select(shapes, spec)) if spec else set()
    full = set(trained)
    rows: dict[str, list[int]] = {}
    for path, shape in shapes.items():
        group = next((g for g, p in PARAMETER_GROUPS.items() if re.fullmatch(p, path)), "other")
        row = rows.setdefault(group, [0, 0, 0, 0, 0])
        size, layer = math.prod(shape), path.removesuffix(".weight")
        row[4] += size
        if spec and layer in adapted:
            row[0] += 1
            row[2] = spec.rank
            row[3] += spec.rank * (shape[-1] + shape[-2]) * math.prod(shape[:-2])
        elif path in full:
            row[3] += size
        elif path.endswith(".weight"):
            row[1] += 1
    order = [*PARAMETER_GROUPS, "other"]
    return [GroupRow(group, *rows[group]) for group in order if group in rows]
