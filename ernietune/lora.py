"""Low-rank adapters, put around the layers of a finished model.

y = base(x) + scale * B(A(dropout(x))). The low-rank product stays apart: W + BA is formed by an export only. Adapter
weights are fp32 whatever the model computes in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from ernietune_kernels import grouped_linear
from ernietune_kernels.grouped_gemm import expert_views
from paddle import Tensor, nn

from ernietune.errors import ConfigError, listed
from ernietune.models.layers import ExpertLinear, Linear, parameter

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


class _Adapter(nn.Layer):
    """What both kinds of adapter share: the base, the factors and the switch."""

    def __init__(self, base: Linear | ExpertLinear, spec: LoraSpec) -> None:
        super().__init__()
        *experts, outputs, inputs = base.weight.shape
        self.base, self.spec, self.scale, self.enabled = base, spec, spec.scale, True
        self.lora_A = parameter([*experts, spec.rank, inputs], "float32")
        self.lora_B = parameter([*experts, outputs, spec.rank], "float32")
        self.reset()

    def reset(self) -> None:
        """A uniform within sqrt(1 / in) (Kaiming, a = sqrt 5), B zero: the adapter starts as nothing."""
        bound = 1.0 / math.sqrt(self.lora_A.shape[-1])
        self.lora_A.set_value(paddle.uniform(self.lora_A.shape, "float32", -bound, bound))
        self.lora_B.set_value(paddle.zeros(self.lora_B.shape, "float32"))
        self.lora_A.stop_gradient = self.lora_B.stop_gradient = False

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.spec.dropout, training=self.training) if self.spec.dropout else x


class LoRALinear(_Adapter):
    """A linear layer with a low-rank product beside it: A [r, in], B [out, r]."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        narrow = paddle.matmul(self._dropped(x), self.lora_A.astype(x.dtype), transpose_y=True)
        return y + paddle.matmul(narrow * self.scale, self.lora_B.astype(x.dtype), transpose_y=True)


class LoRAExperts(_Adapter):
    """A stack of expert layers with one low-rank product per expert: A [E, r, in], B [E, out, r]."""

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        y = self.base(x, counts)
        if not self.enabled:
            return y
        narrow = _expert_product(self._dropped(x), self.lora_A, counts) * self.scale
        return y + _expert_product(narrow, self.lora_B, counts)


def _expert_product(x: Tensor, stack: Tensor, counts: list[int]) -> Tensor:
    weight = stack.astype(x.dtype)
    return grouped_linear(x, weight, counts, expert_views(weight))


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


def inject(model: nn.Layer, spec: LoraSpec) -> list[str]:
    """Put an adapter around every targeted layer of `model`; return their paths in order."""
    chosen = select({path: parameter.shape for path, parameter in model.named_parameters()}, spec)
    layers = dict(model.named_sublayers())
    for path in chosen:
        wrapped = LoRALinear if isinstance(layers[path], Linear) else LoRAExperts
        _replace(model, path, wrapped(layers[path], spec))
    return chosen


def _replace(model: nn.Layer, path: str, layer: nn.Layer) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = model
    for part in parent_path.split("."):
        parent = dict(parent.named_children())[part]
    parent.add_sublayer(name, layer)


def adapters(model: nn.Layer) -> Iterator[tuple[str, LoRALinear | LoRAExperts]]:
    """(path of the wrapped layer, adapter) of everything `inject` has put in."""
    for path, layer in model.named_sublayers():
        if isinstance(layer, (LoRALinear, LoRAExperts)):
            yield path, layer


@contextmanager
def disabled(model: nn.Layer) -> Iterator[None]:
    """The base model alone inside the block."""
    layers = [layer for _, layer in adapters(model)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def choose_trained(shapes: Shapes, groups: Sequence[str]) -> list[str]:
    """Parameter paths for full fine-tuning, by group or pattern; "all" is everything but the routers.

    Routers train only when they are named, because the balance of the experts depends on them.
    """
    chosen: dict[str, None] = {}
    for name in groups:
        pattern = PARAMETER_GROUPS.get(name, GROUPS.get(name, name) + r"(\..*)?")
        routers = PARAMETER_GROUPS["router"]
        touched = [
            path
            for path in shapes
            if (not re.fullmatch(routers, path) if name == "all" else re.fullmatch(pattern, path))
        ]
        if not touched:
            raise ConfigError(
                f"train.trainable: {name!r} matches no parameter; use all, {', '.join(PARAMETER_GROUPS)} or a pattern"
            )
        chosen |= dict.fromkeys(touched)
    return list(chosen)


def unfreeze(model: nn.Layer, groups: Sequence[str]) -> None:
    """Make the parameters of `choose_trained` take gradients."""
    parameters = dict(model.named_parameters())
    for path in choose_trained({path: p.shape for path, p in parameters.items()}, groups):
        parameters[path].stop_gradient = False


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
