"""Layers whose weights stay in a stored form (bf16 or codes) while the computation is in a wider one.

They stand in the place of the plain layers of a finished model, for inference or as the frozen base of a
training: `convert` swaps them in before a loader fills the model, so the wide weights are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import paddle.nn.functional as F
from ernietune_kernels import ExpertFactors
from ernietune_kernels.frozen import FrozenWeight, Weight
from ernietune_kernels.quantized import QuantizedWeight
from ernietune_kernels.stored import StoredWeight
from paddle import Tensor, nn

from ernietune.models.decoder import CausalLM
from ernietune.models.forms import BFLOAT16, INT8, SCHEMES, Form, Scheme, form_of
from ernietune.models.layers import Embedding, ExpertLinear, Linear


class PackedLinear(Linear):
    """y = x W^T (+ b) with W in a stored form; filled by `take`."""

    def __init__(self, shape: tuple[int, int], form: Form, bias: Tensor | None = None) -> None:
        nn.Layer.__init__(self)
        self.shape, self.form = shape, form
        self.bias = bias
        self.stored: Stored | None = None

    def take(self, weight: Weight) -> None:
        """Keep a weight [out, in], which others may share."""
        self.stored = _kept(weight, self.form)

    @property
    def weight(self) -> Weight:
        """The stored weight; its `shape` is that of the plain layer's."""
        return _filled(self.stored).weight

    def forward(self, x: Tensor) -> Tensor:
        y = _filled(self.stored).product(x.reshape([-1, x.shape[-1]]))
        y = y.reshape([*x.shape[:-1], self.shape[0]])
        return y if self.bias is None else y + self.bias


class PackedExperts(ExpertLinear):
    """A stack [experts, out, in] in a stored form; filled by `take`."""

    def __init__(self, shape: tuple[int, int, int], form: Form) -> None:
        nn.Layer.__init__(self)
        self.shape, self.form = shape, form
        self.stored: Stored | None = None

    def take(self, weight: Weight) -> None:
        """Keep a weight stack."""
        self.stored = _kept(weight, self.form)

    @property
    def weight(self) -> Weight:
        """The stored stack; its `shape` is that of the plain layer's."""
        return _filled(self.stored).weight

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Rows [N, in] sorted by expert, counts[e] of them for expert e -> [N, out]."""
        return _filled(self.stored).grouped(x, counts)

    def factors(self) -> ExpertFactors | None:
        """Int8 and int4 stacks and plain ones have fused kernels; others are multiplied one by one."""
        weight = self.weight
        return ExpertFactors(weight) if isinstance(weight, (Tensor, QuantizedWeight)) else None


class PackedEmbedding(Embedding):
    """Token ids -> fp32 rows of a bfloat16 table; filled by `take`."""

    def __init__(self, shape: tuple[int, int]) -> None:
        nn.Layer.__init__(self)
        self.shape, self.form = shape, BFLOAT16
        self.stored: Stored | None = None

    def take(self, weight: Weight) -> None:
        """Keep a table [count, width] in bfloat16."""
        self.stored = _kept(weight, self.form)

    @property
    def weight(self) -> Weight:
        """The stored table."""
        return _filled(self.stored).weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).astype("float32")


Stored: TypeAlias = StoredWeight | FrozenWeight
_Plain = Linear | ExpertLinear | Embedding
Packed = PackedLinear | PackedExperts | PackedEmbedding


def _kept(weight: Weight, form: Form) -> Stored:
    if form.frozen:
        return FrozenWeight(weight)
    assert isinstance(weight, (Tensor, QuantizedWeight)), f"{form.name} is for training only"
    return StoredWeight(weight)


def _filled(stored: Stored | None) -> Stored:
    assert stored is not None, "a packed layer was used before it was filled"
    return stored


def convert(
    model: CausalLM, scheme: Scheme, whole_shape: Callable[[str, list[int]], Sequence[int]] | None = None
) -> list[str]:
    """Put packed layers in the place of the plain ones; return a sentence for each departure from `scheme`.

    The output head becomes a layer of its own, also where it is the embedding, unless it stays as it is.
    `whole_shape` gives the shape of a parameter of which this model has a part: the form is the whole's.
    """
    notes: dict[str, str] = {}
    for path, layer in list(model.named_sublayers()):
        if isinstance(layer, (Linear, ExpertLinear, Embedding)):
            shape = layer.weight.shape
            whole = whole_shape(f"{path}.weight", shape) if whole_shape else shape
            form = form_of(path, tuple(whole), scheme, notes)
            if form is not None:
                _replace(model, path, _packed(layer, form))
    if model.lm_head is None and scheme.head:
        shape = model.model.embed_tokens.shape
        model.lm_head = PackedLinear(shape, Form(scheme.head))
    return list(notes.values())


def _packed(layer: _Plain, form: Form) -> Packed:
    shape = tuple(layer.weight.shape)
    if isinstance(layer, Embedding):
        return PackedEmbedding(shape)
    if isinstance(layer, ExpertLinear):
        return PackedExperts(shape, form)
    return PackedLinear(shape, form, layer.bias)


def _replace(model: nn.Layer, path: str, layer: nn.Layer) -> None:
    parent_path, _, name = path.rpartition(".")
    parents: dict[str, nn.Layer] = dict(model.named_sublayers(include_self=True))
    parents[parent_path].add_sublayer(name, layer)


def packed_layers(model: nn.Layer) -> Iterator[tuple[str, Packed]]:
    """(path, layer) of everything `convert` has put in, and an adapter may have wrapped since."""
    for path, layer in model.named_sublayers():
        if isinstance(layer, (PackedLinear, PackedExperts, PackedEmbedding)):
            yield path, layer


def stored_bytes(model: nn.Layer) -> int:
    """Bytes of all weights; what a tied head shares with the embedding counts once."""
    held: Mapping[int, Stored] = {
        id(layer.weight): _filled(layer.stored) for _, layer in packed_layers(model)
    }
    rest = sum(t.size * t.element_size() for t in model.state_dict().values())
    return int(rest) + sum(stored.nbytes for stored in held.values())


def packed_shapes(model: nn.Layer) -> dict[str, list[int]]:
    """Parameter name -> shape of the packed layers: `named_parameters` does not know them."""
    return {f"{path}.weight": list(layer.shape) for path, layer in packed_layers(model)}


def is_plain(layer: nn.Layer) -> bool:
    """Whether a layer computes with a `weight` tensor of the computation's own type."""
    return not isinstance(layer, (PackedLinear, PackedExperts, PackedEmbedding))


__all__ = [
    "BFLOAT16",
    "INT8",
    "SCHEMES",
    "Form",
    "Packed",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "Scheme",
    "Stored",
    "convert",
    "is_plain",
    "packed_layers",
    "packed_shapes",
    "stored_bytes",
]
