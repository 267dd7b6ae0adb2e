"""The vision tower and the resampler: patches of pictures -> embeddings of the text model."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from ernietune_kernels import frame_attention, quick_gelu
from paddle import Tensor, nn

from ernietune.models.config import ModelConfig, VisionConfig
from ernietune.models.layers import LayerNorm, Linear, RMSNorm

Grid = tuple[int, int, int]  # frames, patch rows, patch columns


def patch_coordinates(grid: Grid, merge: int) -> np.ndarray:
    """(row, column) of each patch [t*h*w, 2], in the order of the patches: blocks of merge x merge."""
    frames, height, width = grid
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = np.stack([rows, columns], axis=-1).reshape(height // merge, merge, width // merge, merge, 2)
    return np.tile(blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2), (frames, 1))


def frame_lengths(grids: list[Grid]) -> list[int]:
    """Patches of each frame; attention does not cross a frame."""
    return [height * width for frames, height, width in grids for _ in range(frames)]


def frame_pairs(grids: list[Grid], merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the merged positions that are paired over time; a picture (one frame) pairs with itself."""
    first, second, start = [], [], 0
    for frames, height, width in grids:
        tokens = height * width // merge**2
        index = start + np.arange(frames * tokens).reshape(frames, tokens)
        first.append(index[0::2].reshape(-1))
        second.append((index[1::2] if frames > 1 else index).reshape(-1))
        start += frames * tokens
    return np.concatenate(first), np.concatenate(second)


class PatchEmbed(nn.Layer):
    """Flattened patches [P, 588] -> [P, embed_dim]."""

    def __init__(self, config: VisionConfig, dtype: str) -> None:
        super().__init__()
        self.proj = Linear(config.patch_dim, config.embed_dim, dtype)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class VisionAttention(nn.Layer):
    """Bidirectional attention inside a frame, with the two halves of a head rotated against each other."""

    def __init__(self, config: VisionConfig, dtype: str) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim, dtype, bias=True)
        self.proj = Linear(config.embed_dim, config.embed_dim, dtype, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).reshape([-1, 3, self.heads, self.head_dim]).unbind(1)
        q, k = _rotate_half(q, cos, sin), _rotate_half(k, cos, sin)
        return self.proj(frame_attention(q, k, v, lengths).reshape([-1, self.heads * self.head_dim]))


def _rotate_half(x_PHd: Tensor, cos_P1d: Tensor, sin_P1d: Tensor) -> Tensor:
    x32 = x_PHd.astype("float32")
    first, second = x32.chunk(2, axis=-1)
    return (x32 * cos_P1d + paddle.concat([-second, first], axis=-1) * sin_P1d).astype(x_PHd.dtype)


class VisionMLP(nn.Layer):
    """fc2(quick_gelu(fc1(x)))."""

    def __init__(self, config: VisionConfig, dtype: str) -> None:
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.intermediate_size, dtype, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.embed_dim, dtype, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class VisionBlock(nn.Layer):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig, dtype: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.embed_dim, dtype)
        self.norm2 = LayerNorm(config.embed_dim, dtype)
        self.attn = VisionAttention(config, dtype)
        self.mlp = VisionMLP(config, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Layer):
    """Patches of all pictures, one after the other -> one feature per patch."""

    def __init__(self, config: VisionConfig, dtype: str) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype)
        self.blocks = nn.LayerList([VisionBlock(config, dtype) for _ in range(config.depth)])
        self.ln = LayerNorm(config.embed_dim, dtype)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        cos, sin = self.rotary(grids)
        lengths = frame_lengths(grids)
        x = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        return self.ln(x)

    def rotary(self, grids: list[Grid]) -> tuple[Tensor, Tensor]:
        """cos and sin [P, 1, head_dim]: row angles, then column angles, the whole twice."""
        quarter = self.config.head_dim // 4
        inverse = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
        coordinates = np.concatenate([patch_coordinates(g, self.config.spatial_merge_size) for g in grids])
        # Formed in fp32 like the references.
        angles = coordinates[:, :, None].astype(np.float32) * inverse.astype(np.float32)
        angles = np.tile(angles.reshape(len(coordinates), -1), (1, 2))[:, None]
        return paddle.to_tensor(np.cos(angles)), paddle.to_tensor(np.sin(angles))


class Projector(nn.Layer):
    """Linear, exact GELU, Linear, LayerNorm; the checkpoint numbers them 0, (1), 2, 3."""

    def __init__(self, inputs: int, outputs: int, dtype: str) -> None:
        super().__init__()
        self.add_sublayer("0", Linear(inputs, outputs, dtype, bias=True))
        self.add_sublayer("2", Linear(outputs, outputs, dtype, bias=True))
        self.add_sublayer("3", LayerNorm(outputs, dtype))

    def forward(self, x: Tensor) -> Tensor:
        first, second, norm = self.children()
        return norm(second(F.gelu(first(x))))


class Resampler(nn.Layer):
    """Merges 2 x 2 patches, then two frames, then projects to the text model's width."""

    def __init__(self, config: ModelConfig, vision: VisionConfig, dtype: str) -> None:
        super().__init__()
        self.merge = vision.spatial_merge_size
        merged = vision.embed_dim * self.merge**2
        self.spatial_linear = Projector(merged, merged, dtype)
        self.temporal_linear = Projector(merged * vision.temporal_merge_size, merged, dtype)
        self.mlp = Linear(merged, config.hidden_size, dtype, bias=True)
        self.after_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, features: Tensor, grids: list[Grid]) -> Tensor:
        """[P, embed_dim] -> one row per image token, in (frame pair, row, column) order."""
        merged = self.spatial_linear(features.reshape([-1, features.shape[-1] * self.merge**2]))
        first, second = (paddle.to_tensor(index) for index in frame_pairs(grids, self.merge))
        paired = paddle.concat([paddle.gather(merged, first), paddle.gather(merged, second)], axis=-1)
        return self.after_norm(self.mlp(self.temporal_linear(paired)))
