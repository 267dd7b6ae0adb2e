"""Which tensor on disk is which part of which parameter, as one table that is read in both directions.

Two layouts are published: "pt" (weights [out, in], everything separate) and "paddle" (weights [in, out],
q/k/v and gate/up fused, other prefix). A `DiskTensor` says the shape a tensor has on disk and its `Target`s:
the region of it that equals one parameter, or one expert of a stacked parameter. Loading, saving and merging
all use this table, so they cannot disagree. A tensor without targets is passed through, for the reason it
names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ernietune.checkpoint.dtypes import Array
from ernietune.errors import CheckpointError, listed
from ernietune.models.config import ModelConfig, VisionConfig

TIED = "the embedding is the output head (tie_word_embeddings)"
MTP = "multi-token prediction is not used in fine-tuning"


@dataclass(frozen=True)
class Layout:
    """A way of naming and orienting tensors; transformers 5 saves "pt" with its own vision prefix."""

    kind: Literal["pt", "paddle"]
    vision_prefix: str = "vision_model."


PT = Layout("pt")
PADDLE = Layout("paddle")


@dataclass(frozen=True)
class Target:
    """disk[start:stop along axis], transposed when flagged, equals parameter[index] (all of it when None)."""

    param: str
    index: int | None = None
    axis: int | None = None
    start: int = 0
    stop: int = 0
    transposed: bool = False

    def region(self, disk: Array) -> Array:
        """Return the view of the disk array that this target describes, in the parameter's orientation."""
        if self.axis is not None:
            disk = disk[self.start : self.stop] if self.axis == 0 else disk[:, self.start : self.stop]
        return disk.T if self.transposed else disk


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of a checkpoint; without targets it is passed through, for the stated reason."""

    name: str
    shape: tuple[int, ...]
    targets: tuple[Target, ...] = ()
    optional: bool = False
    reason: str = ""
    keep_fp32: bool = False


Table = dict[str, DiskTensor]


def layout_named(kind: str) -> Layout:
    """Return the layout called "pt" or "paddle"."""
    if kind not in ("pt", "paddle"):
        raise CheckpointError(f"unknown checkpoint layout {kind!r}; choose 'pt' or 'paddle'")
    return PT if kind == "pt" else PADDLE


def detect_layout(names: Iterable[str], where: str = "checkpoint") -> Layout:
    """Tell the layout from tensor names alone; config files of the two look alike."""
    names = list(names)
    has_paddle = any(name.startswith("ernie.") for name in names)
    has_pt = any(name.startswith("model.") for name in names)
    if has_paddle == has_pt:
        found = "both 'ernie.' and 'model.'" if has_pt else "neither 'ernie.' nor 'model.'"
        raise CheckpointError(
            f"{where} is no ERNIE-4.5 checkpoint: it has {found} tensors ({listed(names, 3)})"
        )
    if has_paddle:
        return PADDLE
    saved_by_transformers = any(name.startswith("model.vision_model.") for name in names)
    return replace(PT, vision_prefix="model.vision_model.") if saved_by_transformers else PT


def table(config: ModelConfig, layout: Layout) -> Table:
    """Return every tensor a checkpoint of this geometry and layout may hold, by name, in model order."""
    builder = _Builder(config, layout)
    builder.text_model()
    if config.vision is not None:
        builder.resampler(config.vision)
        builder.vision_tower(config.vision)
    builder.head()
    for depth in range(max(1, config.num_nextn_predict_layers)):
        builder.multi_token_prediction(depth)
    return builder.table


def matched(expected: Table, found: Mapping[str, tuple[int, ...]], where: str) -> list[DiskTensor]:
    """Return the table entry of every found tensor, in the found order.

    Missing, left-over and wrong-shaped tensors are collected and raised as one CheckpointError.
    """
    missing = [name for name, entry in expected.items() if not entry.optional and name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} expected {list(expected[name].shape)} found {list(shape)}"
        for name, shape in found.items()
        if name in expected and tuple(shape) != expected[name].shape
    ]
    problems = (("missing", missing), ("unknown", extra), ("wrong shape", wrong))
    texts = [f"{len(items)} {what}: {listed(items)}" for what, items in problems if items]
    if texts:
        raise CheckpointError(f"{where} does not fit its config.json; {'; '.join(texts)}")
    return [expected[name] for name in found]


Source = tuple[DiskTensor, Target]


def sources(entries: Iterable[DiskTensor]) -> dict[str, list[Source]]:
    """Turn the table around: parameter name -> the disk tensors and regions that make it up."""
    found: dict[str, list[Source]] = {}
    for entry in entries:
        for target in entry.targets:
            found.setdefault(target.param, []).append((entry, target))
    return found


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the model, as the "pt" table implies them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for param, parts in sources(table(config, PT).values()).items():
        entry, target = parts[0]
        rows = entry.shape
        if target.axis == 0:
            rows = rows[1:]  # a row of the correction bias
        elif target.transposed:
            rows = rows[::-1]
        shapes[param] = rows if target.index is None else (len(parts), *rows)
    return shapes


class _Builder:
    """Fills the table; `param` names are the model's, `disk` names the checkpoint's."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        self.config = config
        self.fused = self.transposed = layout.kind == "paddle"
        self.root = "ernie." if layout.kind == "paddle" else "model."
        self.vision_root = layout.vision_prefix
        self.table: Table = {}

    def put(self, name: str, shape: tuple[int, ...], *targets: Target, keep_fp32: bool = False) -> None:
        self.table[name] = DiskTensor(name, shape, targets, keep_fp32=keep_fp32)

    def vector(self, disk: str, param: str, size: int) -> None:
        self.put(disk, (size,), Target(param))

    def linear(self, disk: str, param: str, outputs: int, inputs: int, index: int | None = None) -> None:
        shape = (inputs, outputs) if self.transposed else (outputs, inputs)
        target = Target(f"{param}.weight", index, transposed=self.transposed)
        self.put(f"{disk}.weight", shape, target)

    def linear_with_bias(self, disk: str, param: str, outputs: int, inputs: int) -> None:
        self.linear(disk, param, outputs, inputs)
        self.vector(f"{disk}.bias", f"{param}.bias", outputs)

    def layer_norm(self, disk: str, param: str, size: int) -> None:
        self.vector(f"{disk}.weight", f"{param}.weight", size)
        self.vector(f"{disk}.bias", f"{param}.bias", size)

    def projections(
        self,
        disk: str,
        param: str,
        fused_name: str,
        widths: Mapping[str, int],
        inputs: int,
        index: int | None = None,
    ) -> None:
        """Linears that read the same input: side by side in one "paddle" tensor, separate in "pt"."""
        if not self.fused:
            for name, width in widths.items():
                self.linear(f"{disk}{name}", f"{param}{name}", width, inputs, index)
            return
        targets, start = [], 0
        for name, width in widths.items():
            targets.append(Target(f"{param}{name}.weight", index, 1, start, start + width, transposed=True))
            start += width
        self.put(f"{disk}{fused_name}.weight", (inputs, start), *targets)

    def text_model(self) -> None:
        config, root = self.config, self.root
        shape = (config.vocab_size, config.hidden_size)
        self.put(f"{root}embed_tokens.weight", shape, Target("model.embed_tokens.weight"))
        for layer in range(config.num_hidden_layers):
            disk, param = f"{root}layers.{layer}.", f"model.layers.{layer}."
            self.attention_and_norms(disk, param)
            if config.is_moe_layer(layer):
                self.experts(f"{disk}mlp.", f"{param}mlp.")
            else:
                self.mlp(f"{disk}mlp.", f"{param}mlp.", config.intermediate_size)
        self.vector(f"{root}norm.weight", "model.norm.weight", config.hidden_size)

    def attention_and_norms(self, disk: str, param: str) -> None:
        config = self.config
        keys = config.key_value_width
        widths = {"q_proj": config.query_width, "k_proj": keys, "v_proj": keys}
        attention = "self_attn."
        self.projections(disk + attention, param + attention, "qkv_proj", widths, config.hidden_size)
        self.linear(
            f"{disk}{attention}o_proj", f"{param}{attention}o_proj", config.hidden_size, config.query_width
        )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.vector(f"{disk}{norm}.weight", f"{param}{norm}.weight", config.hidden_size)

    def mlp(self, disk: str, param: str, inner: int, index: int | None = None) -> None:
        hidden = self.config.hidden_size
        # The fused tensor is called up_gate, but its columns are [gate | up].
        self.projections(disk, param, "up_gate_proj", {"gate_proj": inner, "up_proj": inner}, hidden, index)
        self.linear(f"{disk}down_proj", f"{param}down_proj", hidden, inner, index)

    def experts(self, disk: str, param: str) -> None:
        config = self.config
        pools = [f"{param}{modality}_experts." for modality in ("text", "vision")][: len(config.pools)]
        self.routers(disk, pools)
        first = 0
        for pool, prefix in zip(config.pools, pools, strict=True):
            for k in range(pool.count):
                self.mlp(f"{disk}experts.{first + k}.", prefix, pool.intermediate_size, k)
            first += pool.count
        if config.shared_intermediate_size:
            self.mlp(f"{disk}shared_experts.", f"{param}shared_experts.", config.shared_intermediate_size)

    def routers(self, disk: str, pools: list[str]) -> None:
        """Routers are [H, E] on disk except in "pt" text models; never told by shape, E may equal H."""
        hidden, experts = self.config.hidden_size, self.config.pools[0].count
        transposed = self.transposed or self.config.is_vl
        shape = (hidden, experts) if transposed else (experts, hidden)
        for suffix, pool in zip(("", "_1"), pools, strict=False):
            target = Target(f"{pool}router.weight", transposed=transposed)
            self.put(f"{disk}gate.weight{suffix}", shape, target, keep_fp32=True)
        rows = [
            Target(f"{pool}router.correction_bias", None, 0, row, row + 1) for row, pool in enumerate(pools)
        ]
        name = f"{disk}moe_statics.e_score_correction_bias"
        self.put(name, (len(pools), experts), *rows, keep_fp32=True)

    def resampler(self, vision: VisionConfig) -> None:
        disk, param = f"{self.root}resampler_model.", "model.resampler_model."
        width, hidden = vision.merged_dim, self.config.hidden_size
        for part, inputs in (
            ("spatial_linear", width),
            ("temporal_linear", vision.temporal_merge_size * width),
        ):
            self.linear_with_bias(f"{disk}{part}.0", f"{param}{part}.0", width, inputs)
            self.linear_with_bias(f"{disk}{part}.2", f"{param}{part}.2", width, width)
            self.layer_norm(f"{disk}{part}.3", f"{param}{part}.3", width)
        self.linear_with_bias(f"{disk}mlp", f"{param}mlp", hidden, width)
        self.vector(f"{disk}after_norm.weight", f"{param}after_norm.weight", hidden)

    def vision_tower(self, vision: VisionConfig) -> None:
        disk, param = self.vision_root, "vision_model."
        width, inner = vision.embed_dim, vision.intermediate_size
        self.linear(f"{disk}patch_embed.proj", f"{param}patch_embed.proj", width, vision.patch_dim)
        for block in range(vision.depth):
            here, there = f"{disk}blocks.{block}.", f"{param}blocks.{block}."
            self.layer_norm(f"{here}norm1", f"{there}norm1", width)
            self.layer_norm(f"{here}norm2", f"{there}norm2", width)
            self.linear_with_bias(f"{here}attn.qkv", f"{there}attn.qkv", 3 * width, width)
            self.linear_with_bias(f"{here}attn.proj", f"{there}attn.proj", width, width)
            self.linear_with_bias(f"{here}mlp.fc1", f"{there}mlp.fc1", inner, width)
            self.linear_with_bias(f"{here}mlp.fc2", f"{there}mlp.fc2", width, inner)
        self.layer_norm(f"{disk}ln", f"{param}ln", width)

    def head(self) -> None:
        """Untied heads follow the layout's orientation; a stored copy of a tied one is [V, H] everywhere."""
        config = self.config
        if config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.table["lm_head.weight"] = DiskTensor("lm_head.weight", shape, optional=True, reason=TIED)
        else:
            self.linear("lm_head", "lm_head", config.vocab_size, config.hidden_size)

    def multi_token_prediction(self, depth: int) -> None:
        """The extra dense layer of 21B and 300B: expected shapes, but no place in our model."""
        block = _Builder(self.config, PADDLE if self.fused else PT)
        hidden, root = self.config.hidden_size, self.root
        block.attention_and_norms(f"{root}mtp_block.{depth}.", "")
        block.mlp(f"{root}mtp_block.{depth}.mlp.", "", self.config.intermediate_size)
        for norm in ("mtp_emb_norm", "mtp_hidden_norm"):
            block.vector(f"{root}{norm}.{depth}.weight", "", hidden)
        block.linear(f"{root}mtp_linear_proj.{depth}", "", hidden, 2 * hidden)
        for name, entry in block.table.items():
            self.table[name] = replace(entry, targets=(), optional=True, reason=MTP)


def mtp_depth(name: str) -> int | None:
    """Return which multi-token prediction block a disk tensor belongs to, None for all other tensors."""
    found = re.match(r"(?:model|ernie)\.mtp_[a-z_]+\.(\d+)\.", name)
    return int(found[1]) if found else None
