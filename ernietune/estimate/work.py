"""Arithmetic of a step, and the time it takes under stated assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from ernietune.estimate.setup import Setup
from ernietune.models.config import ModelConfig, VisionConfig


@dataclass(frozen=True)
class Card:
    """A card by its maker's data sheet: memory, and dense bf16 products a second."""

    name: str
    memory: int  # GiB
    flops: float


CARDS = (
    Card("RTX 4090", 24, 165e12),
    Card("L40S", 48, 362e12),
    Card("A100 80 GB", 80, 312e12),
    Card("H100 SXM", 80, 989e12),
    Card("H200", 141, 989e12),
)
# Assumption: the part of that which a training step reaches, at worst and at best.
SHARE = (0.15, 0.40)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an optimizer step, by what they are for."""

    forward: float
    backward: float
    recompute: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.recompute

    def seconds(self, card: Card, gpus: int = 1) -> tuple[float, float]:
        """Least and most seconds on `gpus` such cards."""
        least, most = (self.total / (share * card.flops * gpus) for share in reversed(SHARE))
        return least, most


def cards_for(memory: float) -> list[Card]:
    """The cards of the table with about this much memory; the nearest when none has."""
    near = [card for card in CARDS if abs(card.memory - memory) <= 0.1 * memory]
    return near or [min(CARDS, key=lambda card: abs(card.memory - memory))]


def work(setup: Setup) -> Work:
    """A step of all micro-batches: two operations for a weight and token, forward; every row one document."""
    g, tokens = setup.geometry, float(setup.tokens)
    parts = {name: tokens * flops for name, flops in _token_parts(g, setup).items()}
    head = tokens * 2 * g.hidden_size * g.vocab_size
    vision = _vision(setup)
    layers = sum(parts.values())
    adapters = 2 * tokens * _adapter_numbers(setup)
    forward = layers + head + vision + adapters
    # To the inputs everywhere; to the weights where they train; attention twice and a half its forward.
    backward = layers + 1.5 * parts["scores"] + head + 2 * adapters + vision * setup.trains_vision
    if setup.trained:
        backward += layers - parts["scores"] + head
    again = _repeated(setup, parts) * (1 + adapters / max(layers, 1.0))
    if setup.trains_vision:
        again += vision * setup.recompute.whole(0)
    times = setup.config.train.accumulation
    extra = forward if _has_reference_pass(setup) else 0.0
    return Work(times * (forward + extra), times * backward, times * again)


def _has_reference_pass(setup: Setup) -> bool:
    config = setup.config
    return config.train.objective == "dpo" and config.dpo.reference not in ("none", "precomputed")


def _token_parts(g: ModelConfig, setup: Setup) -> dict[str, float]:
    """Forward operations of one token in all layers: projections, scores, and MLPs."""
    layers = g.num_hidden_layers
    sparse = sum(g.is_moe_layer(i) for i in range(layers))
    share = setup.image_tokens / setup.tokens
    widths = [pool.intermediate_size for pool in g.pools] or [0]
    expert = (1 - share) * widths[0] + share * widths[-1]
    experts = 6 * g.hidden_size * (g.moe_k * expert + g.shared_intermediate_size)
    return {
        "projections": layers * 4.0 * g.hidden_size * (g.query_width + g.key_value_width),
        # Half of a row's keys are seen on average: 2 products of 2 operations each.
        "scores": layers * 2.0 * g.query_width * setup.config.data.max_length,
        "mlp": (layers - sparse) * 6.0 * g.hidden_size * g.intermediate_size,
        "moe": sparse * experts,
    }


def _adapter_numbers(setup: Setup) -> float:
    """Numbers of the adapters that a token meets: of routed experts only those that are chosen."""
    g, found = setup.geometry, 0.0
    for path, size in setup.adapted_whole.items():
        routed = path.split(".")[-2] in ("text_experts", "vision_experts")
        found += size * g.moe_k / setup.whole[path + ".weight"][0] if routed else size
    return found


def _repeated(setup: Setup, parts: dict[str, float]) -> float:
    """Forward operations that the backward pass does again."""
    mode, layers = setup.recompute, setup.geometry.num_hidden_layers
    if mode.every:
        return sum(parts.values()) * sum(mode.whole(i) for i in range(layers)) / layers
    again = parts["projections"] + parts["scores"] if "attention" in mode.parts else 0.0
    return again + (parts["moe"] if "moe" in mode.parts else 0.0)


def _vision(setup: Setup) -> float:
    """Forward operations of the tower and the resampler over all pictures."""
    v = setup.geometry.vision
    if v is None or not setup.image_tokens:
        return 0.0
    patches = float(setup.image_tokens * v.spatial_merge_size**2)
    block = 8.0 * v.embed_dim + 4.0 * v.intermediate_size + 4.0 * setup.picture_patches
    return patches * v.depth * v.embed_dim * block + setup.image_tokens * _resampler(
        v, setup.geometry.hidden_size
    )


def _resampler(v: VisionConfig, hidden: int) -> float:
    width = float(v.merged_dim)
    return 2.0 * (2 * width**2 + (v.temporal_merge_size + 1) * width**2 + width * hidden)
