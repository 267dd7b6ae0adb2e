"""Low-rank adapters, put around the layers of a finished model.

y = base(x) + scale * B(A(dropout(x))). The low-rank product stays apart: W + BA is formed by an export only. Adapter
weights are fp32 whatever the model computes in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from ernietune_kernels import grouped_linear
from ernietune_kernels.grouped_gemm import expert_views
from paddle import Tensor, nn

from ernietune.errors import ConfigError, listed
from ernietune.models.layers import ExpertLinear, Linear, parameter

# A target is one of these names or a regular expression for a whole module path. Routers, norms, embeddings and
# the head are never adapted: no pattern can reach them because they are neither Linear nor ExpertLinear, or are
# named in NEVER.
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
NEVER = r"lm_head|vision_model\.patch_embed\.proj"
# For the table: every parameter falls in exactly one of these, the first that matches.
TABLE_GROUPS: dict[str, str] = {
    **{name: GROUPS[name] + r"(\..*)?" for name in GROUPS if name != "experts"},
    "router": r"model\.layers\.\d+\.mlp\.\w+_experts\.router\..*",
    "norms": r".*norm\d?\.(weight|bias)|vision_model\.ln\..*|.*_linear\.3\..*",
    "embeddings": r"model\.embed_tokens\..*|lm_head\..*",
    "patch embedding": r"vision_model\.patch_embed\..*",
}


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


def inject(model: nn.Layer, spec: LoraSpec) -> list[str]:
    """Put an adapter around every targeted layer of `model`; return their paths in order.

    ConfigError names each target that matches nothing, so that a misspelt name cannot pass silently.
    """
    layers = {
        path: layer
        for path, layer in model.named_sublayers()
        if isinstance(layer, (Linear, ExpertLinear)) and not re.fullmatch(NEVER, path)
    }
    for key, names in (("targets", spec.targets), ("exclude", spec.exclude)):
        idle = [name for name in names if not any(_matches(name, path) for path in layers)]
        if idle:
            raise ConfigError(
                f"lora.{key}: {listed(idle)} matches no layer of this model; "
                f"use a group ({', '.join(GROUPS)}) or a regular expression for whole layer paths"
            )
    chosen = [
        path
        for path in layers
        if any(_matches(name, path) for name in spec.targets)
        and not any(_matches(name, path) for name in spec.exclude)
    ]
    if not chosen:
        raise ConfigError(
            "lora.exclude takes away every layer that lora.targets names; nothing would be trained"
        )
    for path in chosen:
        wrapped = LoRALinear if isinstance(layers[path], Linear) else LoRAExperts
        _replace(model, path, wrapped(layers[path], spec))
    return chosen


def _matches(target: str, path: str) -> bool:
    try:
        return re.fullmatch(GROUPS.get(target, target), path) is not None
    except re.error as error:
        raise ConfigError(f"lora.targets: {target!r} is not a regular expression ({error})") from None


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


def unfreeze(model: nn.Layer, groups: tuple[str, ...]) -> None:
    """Make parameters trainable by table group or pattern ("all" for everything but router and its bias).

    For full fine-tuning: the router trains only when it is named, because ERNIE's balance depends on it.
    """
    for name in groups:
        pattern = TABLE_GROUPS.get(name, GROUPS.get(name, name))
        touched = [
            parameter
            for path, parameter in model.named_parameters()
            if (name == "all" and not re.fullmatch(TABLE_GROUPS["router"], path))
            or re.fullmatch(pattern, path)
        ]
        if not touched:
            raise ConfigError(
                f"train.trainable: {name!r} matches no parameter; use all, {', '.join(TABLE_GROUPS)} or a pattern"
            )
        for parameter in touched:
            parameter.stop_gradient = False


@dataclass(frozen=True)
class GroupRow:
    """One line of the table of what trains."""

    group: str
    adapted: int
    frozen_layers: int
    rank: int
    trainable: int
    parameters: int


def parameter_table(model: nn.Layer) -> list[GroupRow]:
    """Layers and parameters by group: how many are adapted, at which rank, and what trains."""
    rows: dict[str, list[int]] = {}
    wrapped = dict(adapters(model))
    for path, parameter in model.named_parameters():
        owner = path.rpartition(".")[0]
        plain = path.replace(".base.", ".")
        group = next((g for g, p in TABLE_GROUPS.items() if re.fullmatch(p, plain)), "other")
        row = rows.setdefault(group, [0, 0, 0, 0, 0])
        adapter = wrapped.get(owner)
        if path.endswith(".lora_A"):
            assert adapter is not None
            row[0] += 1
            row[2] = adapter.spec.rank
        elif path.endswith(".weight") and not owner.endswith(".base") and parameter.stop_gradient:
            row[1] += 1
        row[3] += 0 if parameter.stop_gradient else parameter.size
        row[4] += parameter.size
    order = [*TABLE_GROUPS, "other"]
    return [GroupRow(g, *rows[g]) for g in order if g in rows]
