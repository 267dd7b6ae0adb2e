"""In which form each weight of a model is held, from names and widths alone; imports no paddle.

One table for two uses: inference (`SCHEMES`) and the frozen base of a training (`TRAINING`). Loading,
planning and the sums of bytes all ask the one function that reads it, `form_of`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# How many columns share a scale, the largest that divides the width; int4 codes also know 128.
_GROUPS = {"int": (128, 64, 32), "nf4": (64, 32)}
FP8_BLOCK = 128  # FP8 has a scale for 128 x 128 numbers


@dataclass(frozen=True)
class Form:
    """How a weight is stored: 16 bits are bfloat16, 8 and 4 codes; `group` columns share a 4-bit scale.

    `kind` says what codes mean: evenly spaced ("int"), NF4's quantiles ("nf4"), e4m3 in blocks ("fp8").
    Through a `frozen` weight gradients of its inputs flow; others are for inference.
    """

    bits: int
    group: int = 0
    kind: str = "int"
    frozen: bool = False

    @property
    def name(self) -> str:
        """As users write it."""
        if self.kind != "int":
            return self.kind
        return {16: "bfloat16", 8: "int8", 4: "int4"}[self.bits]

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of codes and fp32 scales of a weight [.., out, in]."""
        *front, outputs, inputs = shape
        count, rows = math.prod(shape), math.prod(front) * outputs
        if self.bits == 16:
            return 2 * count
        if self.kind == "fp8":
            return count + 4 * math.prod(front) * -(-outputs // FP8_BLOCK) * -(-inputs // FP8_BLOCK)
        return count * self.bits // 8 + 4 * rows * (1 if self.bits == 8 else inputs // self.group)


BFLOAT16 = Form(16)
INT8 = Form(8)


@dataclass(frozen=True)
class Scheme:
    """The bits of each part of a model: `rest` is embedding and vision tower; norms and routers are fp32.

    A picture's patches are many rows, so the tower's weights are read once per picture and not once per
    token: codes would cost accuracy there and win nothing. 0 bits leave a part as the model has it.
    """

    name: str
    layers: int
    experts: int
    head: int
    rest: int = 16
    kind: str = "int"
    frozen: bool = False

    def keeping_the_rest(self) -> Scheme:
        """The same with every part that has no codes in the model's own type."""
        return replace(self, head=0, rest=0)


SCHEMES = {
    "bfloat16": Scheme("bfloat16", 16, 16, 16),
    "wint8": Scheme("wint8", 8, 8, 8),
    "wint4": Scheme("wint4", 4, 4, 8),  # every token's probability goes through the head: 8 bits
    "mixed": Scheme("mixed", 8, 4, 8),
}
TRAINING = {
    "wint8": Scheme("wint8", 8, 8, 16, frozen=True),
    "wint4": Scheme("wint4", 4, 4, 16, frozen=True),
    "mixed": Scheme("mixed", 8, 4, 16, frozen=True),
    "nf4": Scheme("nf4", 4, 4, 16, kind="nf4", frozen=True),
    "fp8": Scheme("fp8", 8, 8, 16, kind="fp8", frozen=True),
}


def form_of(path: str, shape: Sequence[int], scheme: Scheme, notes: dict[str, str]) -> Form | None:
    """The form of the weight of a layer; None where it stays in the model's own type.

    `notes` takes a sentence for each kind of layer whose width no group divides: it has int8.
    """
    if path == "lm_head":
        bits, coded = scheme.head, False
    elif path.startswith("model.layers."):
        bits, coded = (scheme.experts if len(shape) == 3 else scheme.layers), True
    else:
        bits, coded = scheme.rest, False
    if not bits:
        return None
    frozen = scheme.frozen and path not in ("lm_head", "model.embed_tokens")
    if not coded or scheme.kind == "fp8":
        return Form(bits, kind=scheme.kind if coded else "int", frozen=frozen)
    return replace(_grouped(bits, scheme.kind, shape[-1], path, notes), frozen=frozen)


def _grouped(bits: int, kind: str, width: int, path: str, notes: dict[str, str]) -> Form:
    if bits != 4:
        return Form(bits)
    group = next((group for group in _GROUPS[kind] if width % group == 0), None)
    if group is None:
        layer, what = path.rpartition(".")[2], "int4" if kind == "int" else kind
        notes[layer] = f"{layer} has {width} inputs, which no {what} group divides: it is int8"
        return INT8
    return Form(4, group, kind)


@dataclass(frozen=True)
class Part:
    """One line of what a base is held as: the layers of one form, their numbers and bytes."""

    form: str
    layers: str
    numbers: int
    nbytes: int


def parts_of(shapes: Mapping[str, Sequence[int]], scheme: Scheme, plain_bytes: int) -> list[Part]:
    """Every weight by form and kind of layer; a number in the model's own type has `plain_bytes`."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for name, shape in shapes.items():
        path, _, last = name.rpartition(".")
        held = last == "weight" and len(shape) > 1 and not path.endswith(".router")
        form = form_of(path, shape, scheme, {}) if held else None
        own = 4 if ".router" in path else plain_bytes
        size = own * math.prod(shape) if form is None else form.nbytes(shape)
        key = (f"{8 * own}-bit float" if form is None else form.name), _kind_of(path)
        numbers, nbytes = found.get(key, (0, 0))
        found[key] = numbers + math.prod(shape), nbytes + size
    return [Part(*key, *sums) for key, sums in found.items()]


_KINDS = {
    "attention": r"model\.layers\.\d+\.self_attn\..*",
    "experts": r"model\.layers\.\d+\.mlp\.\w+_experts\.(gate|up|down)_proj",
    "shared experts": r"model\.layers\.\d+\.mlp\.shared_experts\..*",
    "mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "routers": r".*\.router",
    "norms": r"model\..*norm",
    "embedding": r"model\.embed_tokens",
    "head": r"lm_head",
    "vision tower and resampler": r"vision_model\..*|model\.resampler_model\..*",
}


def _kind_of(path: str) -> str:
    # Shared experts come before the pools, whose pattern would take them as well.
    order = ["attention", "shared experts", *(name for name in _KINDS)]
    return next((name for name in order if re.fullmatch(_KINDS[name], path)), "other")
