"""The geometry of a model: one frozen description read from any published form of config.json.

Accepted are the flat hub files ("-PT" and "-Paddle", scalar or per-modality lists) and the nested files that
transformers writes for the vision-language model. Everything is checked here, so the layers need not be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernietune.errors import CheckpointError, listed
from ernietune.models.fields import Fields
from ernietune.models.shapes import SHAPES

__all__ = ["SHAPES", "ExpertPoolConfig", "ModelConfig", "VisionConfig", "parameter_counts"]

_MODEL_TYPES = {
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5_moe",
    "ernie4_5_moe_vl": "ernie4_5_moe_vl",
    "ernie4_5_vl_moe": "ernie4_5_moe_vl",  # the name transformers uses
}
_MARKER_KEYS = (
    "image_start_token_id",
    "image_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
)
_PUBLISHED_CONTEXT = 131072  # the "-Paddle" VL config omits max_position_embeddings


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: widths, depth and how patches merge into one token."""

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    patch_size: int = 14
    in_channels: int = 3
    spatial_merge_size: int = 2
    temporal_merge_size: int = 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels x patch x patch, 588 in every published model."""
        return self.in_channels * self.patch_size**2

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP inside a block."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def merged_dim(self) -> int:
        """Width of the patches that merge into one token, side by side: the resampler's working width."""
        return self.embed_dim * self.spatial_merge_size**2


@dataclass(frozen=True)
class ExpertPoolConfig:
    """The routed experts of one modality."""

    count: int
    intermediate_size: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything the layers need to know; `pools` is () for dense, (text,) for MoE, (text, vision) for VL."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    pools: tuple[ExpertPoolConfig, ...] = ()
    moe_k: int = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_layer_end_index: int = -1
    moe_layer_interval: int = 1
    num_nextn_predict_layers: int = 0
    freq_allocation: int = 0  # rotary frequencies that follow the time axis; 0 in text models
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    vision_marker_ids: tuple[int, ...] = ()
    video_token_id: int | None = None

    @property
    def is_vl(self) -> bool:
        """True for a vision-language model."""
        return self.vision is not None

    @property
    def query_width(self) -> int:
        """Width of all query heads side by side; not the hidden size in the 0.3B model."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of all key (or value) heads side by side."""
        return self.num_key_value_heads * self.head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, stored as one MLP; 0 when there are none."""
        return self.pools[0].intermediate_size * self.moe_num_shared_experts if self.pools else 0

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Ids routed to the vision experts: placeholders and the image and video start and end marks."""
        placeholders = (self.image_token_id, self.video_token_id)
        return tuple(i for i in placeholders if i is not None) + self.vision_marker_ids

    def is_moe_layer(self, layer: int) -> bool:
        """True when the 0-based `layer` has experts instead of one dense MLP."""
        if not self.pools or (layer + 1) % self.moe_layer_interval:
            return False
        return self.moe_layer_start_index <= layer <= self.moe_layer_end_index

    def with_tokens(self, image_token_id: int, vision_marker_ids: tuple[int, ...]) -> ModelConfig:
        """Return a copy with the media token ids of the checkpoint's tokenizer."""
        return replace(self, image_token_id=image_token_id, vision_marker_ids=vision_marker_ids)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json; CheckpointError when it is missing, not JSON or not a known geometry."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}); is this a model folder?"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: object, where: str = "config.json") -> ModelConfig:
        """Build the config from parsed JSON; CheckpointError names `where` and the offending key."""
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        return _build(raw, where)


def _build(raw: dict[str, Any], where: str) -> ModelConfig:
    top = Fields(raw, where)
    kind = _MODEL_TYPES.get(top.value("model_type"))
    if kind is None:
        raise top.wrong("model_type", f"is {raw['model_type']!r}; known are {listed(sorted(_MODEL_TYPES))}")
    text = top.child("text_config") if "text_config" in raw else top
    _reject_unsupported(text)
    fields = _backbone(text)
    fields["model_type"] = kind
    fields["tie_word_embeddings"] = top.boolean("tie_word_embeddings", True)
    if kind != "ernie4_5":
        fields |= _experts(text, fields["num_hidden_layers"], 2 if kind == "ernie4_5_moe_vl" else 1)
    if kind == "ernie4_5_moe_vl":
        fields |= _multimodal(top, text, fields)
    return ModelConfig(**fields)


def _reject_unsupported(text: Fields) -> None:
    """Refuse options that would change the mathematics and that no published checkpoint uses."""
    expected = {"use_bias": False, "hidden_act": "silu", "compression_ratio": 1.0}
    for key, wanted in expected.items():
        if text.value(key, wanted) != wanted:
            raise text.wrong(key, f"is {text.raw[key]!r}; only {wanted!r} is supported")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = text.value(key, {})
        kind = (
            scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
        )
        if kind not in ("default", "ernie_3d"):
            raise text.wrong(key, f"asks for {kind!r} scaling of positions; only 'default' is supported")


def _backbone(text: Fields) -> dict[str, Any]:
    hidden, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    kv_heads = text.integer("num_key_value_heads", heads)
    head_dim = text.integer("head_dim", None)
    if head_dim is None and hidden % heads:
        raise text.wrong("head_dim", f"is missing and hidden_size {hidden} is no multiple of {heads} heads")
    head_dim = head_dim or hidden // heads
    if head_dim % 4:
        raise text.wrong("head_dim", f"must be a multiple of 4 for the rotary pairs, found {head_dim}")
    if heads % kv_heads:
        raise text.wrong("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    theta_home = text if "rope_theta" in text.raw else text.child("rope_parameters")
    return {
        "vocab_size": text.integer("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": text.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": text.integer("intermediate_size"),
        "rms_norm_eps": text.number("rms_norm_eps"),
        "rope_theta": theta_home.number("rope_theta"),
        "max_position_embeddings": text.integer("max_position_embeddings", _PUBLISHED_CONTEXT),
        "num_nextn_predict_layers": text.integer("num_nextn_predict_layers", 0, at_least=0),
    }


def _experts(text: Fields, layers: int, modalities: int) -> dict[str, Any]:
    counts = text.integers("moe_num_experts")
    widths = text.integers("moe_intermediate_size")
    if len(counts) == 1:
        counts = counts * modalities  # transformers stores the count per modality once
    for key, found in (("moe_num_experts", counts), ("moe_intermediate_size", widths)):
        if len(found) != modalities or min(found) < 1:
            raise text.wrong(key, f"needs {modalities} positive value(s), one per modality, found {found}")
    if len(set(counts)) > 1:
        raise text.wrong("moe_num_experts", f"must be equal for text and vision, found {counts}")
    active = text.integer("moe_k")
    if active > min(counts):
        raise text.wrong("moe_k", f"is {active}, more than the {min(counts)} experts of a layer")
    return {
        "pools": tuple(ExpertPoolConfig(c, w) for c, w in zip(counts, widths, strict=True)),
        "moe_k": active,
        "moe_num_shared_experts": text.integer("moe_num_shared_experts", 0, at_least=0),
        **_moe_layers(text, layers),
    }


def _moe_layers(text: Fields, layers: int) -> dict[str, int]:
    """Which layers have experts: first, last and interval, from either way of writing it."""
    kinds = text.value("mlp_layer_types", None)
    if kinds is not None:
        return _moe_layers_by_type(text, kinds, layers)
    start = min(text.integers("moe_layer_start_index"))
    end = max(text.integers("moe_layer_end_index", -1))
    last = layers - 1 if end < 0 else min(end, layers - 1)
    if not 0 <= start <= last:
        raise text.wrong("moe_layer_start_index", f"{start} leaves no MoE layer among {layers} (end {end})")
    interval = text.integer("moe_layer_interval")
    return {"moe_layer_start_index": start, "moe_layer_end_index": last, "moe_layer_interval": interval}


def _moe_layers_by_type(text: Fields, kinds: object, layers: int) -> dict[str, int]:
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
        raise text.wrong("mlp_layer_types", f"must list 'dense' or 'sparse' for each of the {layers} layers")
    sparse = [i for i, kind in enumerate(kinds) if kind == "sparse"]
    if not sparse or sparse != list(range(sparse[0], sparse[-1] + 1)):
        raise text.wrong("mlp_layer_types", "must hold one unbroken run of 'sparse' layers")
    return {
        "moe_layer_start_index": sparse[0],
        "moe_layer_end_index": sparse[-1],
        "moe_layer_interval": 1,
    }


def _multimodal(top: Fields, text: Fields, backbone: dict[str, Any]) -> dict[str, Any]:
    vision = _vision(top)
    markers = tuple(top.integer(key) for key in _MARKER_KEYS if top.value(key, None) is not None)
    if markers and len(markers) < len(_MARKER_KEYS):
        missing = [key for key in _MARKER_KEYS if top.value(key, None) is None]
        raise top.wrong(missing[0], "is missing although other media token ids are given")
    placeholder = "im_patch_id" if "im_patch_id" in top.raw else "image_token_id"
    return {
        "vision": vision,
        "freq_allocation": _time_frequencies(text, backbone["head_dim"] // 2),
        "image_token_id": top.integer(placeholder, None),
        "vision_marker_ids": markers,
        "video_token_id": top.integer("video_token_id", None),
    }


def _time_frequencies(text: Fields, frequencies: int) -> int:
    """How many of the rotary frequencies turn with the time axis; height and width share the rest equally."""
    for home in ("rope_scaling", "rope_parameters"):
        if "mrope_section" in text.value(home, {}):
            section = text.child(home).integers("mrope_section")
            if len(section) != 3 or section[0] != section[1] or sum(section) != frequencies:
                raise text.wrong(f"{home}.mrope_section", f"{section} is no (h, w, t) split of {frequencies}")
            return section[2]
    time: int = text.integer("freq_allocation", 20, at_least=0)
    if time > frequencies or (frequencies - time) % 2:
        raise text.wrong(
            "freq_allocation", f"{time} of {frequencies} frequencies leaves no equal h and w parts"
        )
    return time


def _vision(top: Fields) -> VisionConfig:
    raw = top.child("vision_config")
    width = raw.integer("embed_dim", None) or raw.integer("hidden_size")
    inner = raw.integer("intermediate_size", None)
    merge = raw.integer("spatial_merge_size", None) or top.integer("spatial_conv_size")
    temporal = raw.integer("temporal_merge_size", None) or top.integer("temporal_conv_size", 2)
    channels = raw.integer("in_channels", None) or raw.integer("in_chans", 3)
    heads = raw.integer("num_heads")
    if width % heads or (width // heads) % 4:
        raise raw.wrong("num_heads", f"{heads} does not cut width {width} into heads of a multiple of 4")
    if top.integer("pixel_hidden_size", width) != width:
        raise top.wrong(
            "pixel_hidden_size", f"{top.raw['pixel_hidden_size']} differs from the tower's {width}"
        )
    return VisionConfig(
        depth=raw.integer("depth"),
        embed_dim=width,
        num_heads=heads,
        mlp_ratio=inner / width if inner else raw.number("mlp_ratio"),
        patch_size=raw.integer("patch_size"),
        in_channels=channels,
        spatial_merge_size=merge,
        temporal_merge_size=temporal,
    )


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Count parameters by group from the geometry; `mtp` is stored on disk but is no part of our model."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    sparse = sum(config.is_moe_layer(i) for i in range(layers))
    attention = 2 * hidden * (config.query_width + config.key_value_width)
    dense_mlp = 3 * hidden * config.intermediate_size
    counts = {
        "embedding": config.vocab_size * hidden,
        "attention": layers * attention,
        "norms": (2 * layers + 1) * hidden,
        "dense_mlp": (layers - sparse) * dense_mlp,
        "shared_experts": sparse * 3 * hidden * config.shared_intermediate_size,
        "head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
        "mtp": config.num_nextn_predict_layers * (attention + dense_mlp + 4 * hidden + 2 * hidden**2),
    }
    for name, pool in zip(("text", "vision"), config.pools, strict=False):
        counts[f"{name}_routers"] = sparse * pool.count * (hidden + 1)
        counts[f"{name}_experts"] = sparse * pool.count * 3 * hidden * pool.intermediate_size
    if config.vision is not None:
        counts["vision_tower"] = _vision_tower_count(config.vision)
        counts["resampler"] = _resampler_count(config.vision, hidden)
    return counts


def _vision_tower_count(vision: VisionConfig) -> int:
    width, inner = vision.embed_dim, vision.intermediate_size
    block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
    return vision.patch_dim * width + vision.depth * block + 2 * width


def _resampler_count(vision: VisionConfig, hidden: int) -> int:
    width = vision.merged_dim
    spatial = 2 * (width * width + width) + 2 * width
    temporal = (vision.temporal_merge_size * width * width + width) + (width * width + width) + 2 * width
    return spatial + temporal + width * hidden + hidden + hidden
