"""The same adapters in a transformers model and in ours: where our weights live there, and W + s B A."""

from __future__ import annotations

import re

import numpy as np
import references

from ernietune.lora import adapters

torch = references.torch

_VL_NAMES = (
    (r"^vision_model\.", "model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\b", r"model.language_model.\1"),
    (r"_linear\.0\.", "_linear.fc1."),
    (r"_linear\.2\.", "_linear.fc2."),
    (r"_linear\.3\.", "_linear.ln."),
    (r"\.(text|vision)_experts\.router\.", r".\1_moe.gate."),
    (r"\.(text|vision)_experts\.", r".\1_moe.experts."),
)
_TEXT_NAMES = ((r"\.text_experts\.router\.", ".gate."), (r"\.text_experts\.", ".experts."))


def place(kind, name, shape):
    """(parameter of transformers, the part of its last-but-one axis) of one of our parameters."""
    for pattern, replacement in _VL_NAMES if kind == "vl" else _TEXT_NAMES:
        name = re.sub(pattern, replacement, name)
    fused = re.fullmatch(r"(.*\.experts)\.(gate|up|down)_proj\.weight", name)
    if not fused:
        return name, slice(None)
    owner, which = fused.groups()
    if which == "down":
        return f"{owner}.down_proj", slice(None)
    width = shape[-2]
    return f"{owner}.gate_up_proj", slice(0, width) if which == "gate" else slice(width, 2 * width)


def part(tensor, where):
    """The rows `where` of a matrix, a vector or each matrix of a stack."""
    return tensor[where] if tensor.ndim < 2 else tensor[..., where, :]


def randomize(model, seed):
    """Both factors of every adapter random, so that each has a gradient; the sums stay near the size of W."""
    generator = np.random.default_rng(seed)
    for _, layer in adapters(model):
        inputs, rank = layer.lora_A.shape[-1], layer.spec.rank
        a = generator.standard_normal(layer.lora_A.shape) / np.sqrt(inputs)
        b = generator.standard_normal(layer.lora_B.shape) * 0.3 / (layer.scale * np.sqrt(rank))
        layer.lora_A.set_value(a.astype(np.float32))
        layer.lora_B.set_value(b.astype(np.float32))


class Adapted:
    """A transformers model whose weights are W + s B A, with A and B as leaves of torch's autograd."""

    def __init__(self, kind, reference, model):
        self.reference = reference
        self.factors = {}
        self.places = {}
        for path, layer in adapters(model):
            factors = (layer.lora_A.numpy(), layer.lora_B.numpy())
            self.factors[path] = tuple(torch.tensor(f, requires_grad=True) for f in factors)
            self.places[path] = (*place(kind, f"{path}.weight", layer.base.weight.shape), layer.scale)

    def __call__(self, **inputs):
        weights = {name: p.detach() for name, p in self.reference.named_parameters()}
        deltas = {}
        for path, (a, b) in self.factors.items():
            name, where, scale = self.places[path]
            delta = deltas.setdefault(name, torch.zeros_like(weights[name]))
            part(delta, where).copy_(scale * (b @ a))
        weights |= {name: weights[name] + delta for name, delta in deltas.items()}
        return torch.func.functional_call(self.reference, weights, kwargs=inputs)
