"""Low-rank adapters, put around the layers of a finished model.

y = base(x) + scale * B(A(dropout(x))). The low-rank product stays apart: W + BA is formed by an export only.
Adapter weights are fp32 whatever the model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import paddle
import paddle.nn.functional as F
from ernietune_kernels import ExpertFactors, grouped_lora_linear, grouped_low_rank, lora_linear
from paddle import Tensor, nn

from ernietune.models.layers import ExpertLinear, Linear, parameter
from ernietune.models.packed import is_plain, packed_shapes
from ernietune.targets import LoraSpec, choose_trained, select

__all__ = [
    "LoRAExperts",
    "LoRALinear",
    "LoraSpec",
    "adapters",
    "disabled",
    "inject",
    "replace",
    "replaced",
    "unfreeze",
    "wrap",
]


class _Adapter(nn.Layer):
    """What both kinds of adapter share: the base, the factors and the switch."""

    def __init__(self, base: Linear | ExpertLinear, spec: LoraSpec) -> None:
        super().__init__()
        *experts, outputs, inputs = base.weight.shape  # a packed base's weight has a shape too
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

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B in the computation's dtype."""
        return self.lora_A.astype(x.dtype), self.lora_B.astype(x.dtype)

    @property
    def _apart(self) -> bool:
        """Whether base and low-rank product cannot be one node: inputs that differ, or a packed base."""
        return (self.training and self.spec.dropout > 0) or not is_plain(self.base)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.spec.dropout, training=self.training)


class LoRALinear(_Adapter):
    """A linear layer with a low-rank product beside it: A [r, in], B [out, r]."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        a, b = self._factors(x)
        if self._apart:
            narrow = paddle.matmul(self._dropped(x), a, transpose_y=True) * self.scale
            return self.base(x) + paddle.matmul(narrow, b, transpose_y=True)
        y = lora_linear(x, self.base.weight, a, b, self.scale)
        return y if self.base.bias is None else y + self.base.bias


class LoRAExperts(_Adapter):
    """A stack of expert layers with one low-rank product per expert: A [E, r, in], B [E, out, r]."""

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        if not self.enabled:
            return self.base(x, counts)
        a, b = self._factors(x)
        if self._apart:
            return self.base(x, counts) + grouped_low_rank(self._dropped(x), a, b, self.scale, counts)
        return grouped_lora_linear(x, self.base.weight, a, b, self.scale, counts, self.base.views())

    def factors(self) -> ExpertFactors | None:
        """What a fused expert layer reads; None where there is none: dropout, or a base without kernels."""
        base = self.base.factors()
        if not self.enabled or base is None:
            return base
        if self.training and self.spec.dropout > 0:
            return None
        # Fused layers compute in bfloat16; codes have no type of their own to ask.
        dtype = base.weight.dtype if isinstance(base.weight, Tensor) else "bfloat16"
        a, b = self.lora_A.astype(dtype), self.lora_B.astype(dtype)
        return ExpertFactors(base.weight, a, b, self.scale)


def inject(model: nn.Layer, spec: LoraSpec) -> list[str]:
    """Put an adapter around every targeted layer of `model`; return their paths in order."""
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()} | packed_shapes(model)
    chosen = select(shapes, spec)
    wrap(model, chosen, spec)
    return chosen


def wrap(model: nn.Layer, paths: Iterable[str], spec: LoraSpec) -> dict[str, LoRALinear | LoRAExperts]:
    """Put an adapter around each of these layers; return the adapters by path."""
    layers = dict(model.named_sublayers())
    found = {}
    for path in paths:
        wrapped = LoRALinear if isinstance(layers[path], Linear) else LoRAExperts
        found[path] = wrapped(layers[path], spec)
        replace(model, path, found[path])
    return found


def replace(model: nn.Layer, path: str, layer: nn.Layer) -> None:
    """Put another layer at a path of the model."""
    parent_path, _, name = path.rpartition(".")
    parent = model
    for part in parent_path.split("."):
        parent = dict(parent.named_children())[part]
    parent.add_sublayer(name, layer)


@contextmanager
def replaced(model: nn.Layer, layers: Mapping[str, nn.Layer]) -> Iterator[None]:
    """Other layers at some paths inside the block."""
    there = dict(model.named_sublayers())
    before = {path: there[path] for path in layers}
    for path, layer in layers.items():
        replace(model, path, layer)
    try:
        yield
    finally:
        for path, layer in before.items():
            replace(model, path, layer)


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


def unfreeze(model: nn.Layer, groups: Sequence[str]) -> None:
    """Make the parameters of `choose_trained` take gradients."""
    parameters = dict(model.named_parameters())
    for path in choose_trained({path: p.shape for path, p in parameters.items()}, groups):
        parameters[path].stop_gradient = False
