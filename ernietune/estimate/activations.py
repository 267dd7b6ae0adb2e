"""Bytes that the layers of a model keep for the backward pass, and need for a moment in either pass.

The letters are those of docs/hardware.md: T tokens, P patches, H hidden size, Q and K widths of all query and
of all key heads, I width of an MLP, k experts of a token, r rank, c bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ernietune.estimate.holdings import shared
from ernietune.estimate.setup import Setup


@dataclass(frozen=True)
class Half:
    """Attention or MLP of one layer, in bytes.

    Kept when nothing is recomputed: `input` (of the norm), `norm` (its output) and `inside`, of which
    `activation` is what follows from the rest by one cheap operation. `forward` and `backward` are needed for
    a moment, beside what is kept.
    """

    input: float
    norm: float
    inside: float
    activation: float
    forward: float
    backward: float
    is_moe: bool = False

    @property
    def full(self) -> float:
        """All that the half keeps when nothing is recomputed."""
        return self.input + self.norm + self.inside


@dataclass(frozen=True)
class Block:
    """A decoder layer or vision block: its halves, the bytes of its input and of the gradients it gives."""

    attention: Half
    mlp: Half
    width: float
    gradients: float


def decoder_block(setup: Setup, layer: int) -> Block:
    """A decoder layer."""
    path = f"model.layers.{layer}."
    attention = _attention(setup, path + "self_attn.")
    # In several processes it asks for a gradient all the same: a backward pass on one is one on all.
    if layer == 0 and not setup.trains_before_layers and setup.degrees.world == 1:
        attention = replace(attention, input=0.0)
    mlp = _moe(setup, path + "mlp.") if setup.geometry.is_moe_layer(layer) else _dense(setup, path + "mlp.")
    halves = _widening(setup, attention, path + "self_attn."), _widening(setup, mlp, path + "mlp.")
    return Block(*halves, _stream(setup), gradients_under(setup, path))


def _widening(setup: Setup, half: Half, path: str) -> Half:
    """The same beside the numbers of the matrix that is multiplied with, where it is held as codes."""
    wide = setup.widened(path)
    return replace(half, forward=half.forward + wide, backward=half.backward + wide)


def _stream(setup: Setup) -> float:
    """The rows between the products, of which each process of a tensor group has a part."""
    return float(setup.tokens) * setup.geometry.hidden_size * setup.number / setup.sequence_part


def gradients_under(setup: Setup, prefix: str) -> float:
    """Bytes of the gradients of all that trains below a path."""
    return sum(one.gradient for one in shared(setup, prefix))


def _low_rank(setup: Setup, path: str, names: str, rows: float, inputs: float) -> float:
    """What the adapters of some layers with one input width keep: products with A, dropout, bf16 factors."""
    found = [path + name for name in names.split() if path + name in setup.adapted]
    lora, c = setup.config.lora, setup.number
    dropped = rows * inputs * (c + 1) if lora.dropout else 0.0
    factors = sum(setup.adapted[name] for name in found) * c if setup.gpu and c != 4 else 0
    return len(found) * (rows * lora.rank * c + dropped) + factors


def _attention(setup: Setup, path: str) -> Half:
    g, c, t = setup.local, setup.number, float(setup.tokens)
    width, queries, keys = t * g.hidden_size * c, t * g.query_width * c, t * g.key_value_width * c
    inside = 2 * queries + 2 * keys + _low_rank(setup, path, "q_proj k_proj v_proj", t, g.hidden_size)
    inside += _low_rank(setup, path, "o_proj", t, g.query_width) + 4 * t + 4 * t * g.num_attention_heads
    forward = queries + width
    if setup.gpu:
        inside += queries + keys  # before the rotation
        backward = 4 * queries + 2 * keys + 2 * width
    else:
        backward = max(3 * queries + 2 * keys + width, 2 * keys + queries + 5 * width)
    return Half(_stream(setup), width, inside, 0.0, forward, backward)


def _dense(setup: Setup, path: str) -> Half:
    return _swiglu(setup, path, setup.local.intermediate_size)


def _swiglu(setup: Setup, path: str, inner_width: int) -> Half:
    """An MLP, as part of a layer with its norm: gate, up and their product."""
    g, c, t = setup.geometry, setup.number, float(setup.tokens)
    width, inner = t * g.hidden_size * c, t * inner_width * c
    low_rank = _low_rank(setup, path, "gate_proj up_proj", t, g.hidden_size)
    low_rank += _low_rank(setup, path, "down_proj", t, inner_width)
    backward = max(2 * width + 2 * inner, 5 * width + 2 * inner - 3 * inner)
    return Half(_stream(setup), width, 3 * inner + low_rank + 4 * t, inner, 2 * width, backward)


def _moe(setup: Setup, path: str) -> Half:
    g, c, t = setup.local, setup.number, float(setup.tokens)
    width = t * g.hidden_size * c
    pools = [_pool(setup, path, "text", t - setup.image_tokens, 0)]
    if len(g.pools) > 1 and setup.image_tokens:
        pools.append(_pool(setup, path, "vision", float(setup.image_tokens), 1))
    inside = sum(pool.inside for pool in pools) + 4 * t
    activation = sum(pool.activation for pool in pools)
    if len(pools) > 1:
        inside += width  # the rows of either modality by themselves
    if g.shared_intermediate_size:
        shared = _swiglu(setup, path + "shared_experts.", g.shared_intermediate_size)
        inside, activation = inside + shared.inside, activation + shared.activation
    forward = max(pool.forward for pool in pools) + width
    backward = max(pool.backward for pool in pools) + 3 * width
    if setup.degrees.expert > 1:
        there, back = _exchange(setup)
        forward, backward = max(forward, there), max(backward, back)
    return Half(_stream(setup), width, inside, activation, forward, backward, is_moe=True)


def _pool(setup: Setup, path: str, name: str, tokens: float, index: int) -> Half:
    """The routed experts of one modality: every token's row k times."""
    g, c = setup.local, setup.number
    rows = tokens * g.moe_k
    wide, inner = rows * g.hidden_size * c, rows * g.pools[index].intermediate_size * c
    prefix = f"{path}{name}_experts."
    low_rank = _low_rank(setup, prefix, "gate_proj up_proj", rows, g.hidden_size)
    low_rank += _low_rank(setup, prefix, "down_proj", rows, g.pools[index].intermediate_size)
    routing = tokens * setup.geometry.pools[index].count * 4 + rows * (3 * 8 + 8 + 3 * 4)
    if setup.gpu and setup.degrees.expert == 1:  # kernels read rows where they lie and keep no copy
        return Half(0.0, 0.0, 3 * inner + low_rank + routing, inner, wide, wide + 3 * inner)
    kept = 2 * wide + 3 * inner + low_rank + routing
    if setup.gpu:  # of rows that travel, those that arrived and those that came back are kept
        return Half(0.0, 0.0, kept, inner, wide, 3 * wide + 3 * inner)
    return Half(0.0, 0.0, kept, inner, wide, max(wide, 2 * inner, 2 * wide - inner))


def _exchange(setup: Setup) -> tuple[float, float]:
    """While rows travel to other processes' experts and back: forward, backward.

    As many arrive as leave when experts are chosen evenly. gloo has no such exchange: there everybody gets
    all rows of everybody and picks.
    """
    wide = float(setup.tokens) * setup.geometry.moe_k * setup.geometry.hidden_size * setup.number
    everybody = 0 if setup.gpu else setup.degrees.expert
    return (3 + everybody) * wide, (2 + everybody) * wide


def vision_block(setup: Setup, index: int) -> Block:
    """A block of the vision tower over the patches of all pictures of a micro-batch."""
    v = setup.geometry.vision
    assert v is not None
    c, p = setup.number, float(patches(setup))
    width, inner = p * v.embed_dim * c, p * v.intermediate_size * c
    path = f"vision_model.blocks.{index}."
    low_rank = _low_rank(setup, path, "attn.qkv attn.proj", p, v.embed_dim)
    # In C on a CPU, which keeps none of the weights.
    scores = float(v.num_heads) * p * setup.picture_patches if setup.gpu else 0.0
    piece = 2 * min(64 * 2**20, 4 * scores)
    # q and k before and in the rotation in fp32, the three as they are multiplied, the output; the weights.
    inside = 4 * 4 * p * v.embed_dim + 4 * width + (4 if c == 4 else 6) * scores + low_rank
    attention = Half(width, width, inside, 0.0, 5 * width + piece, 6 * width + piece + 4 * scores)
    low_rank = _low_rank(setup, path, "mlp.fc1", p, v.embed_dim)
    low_rank += _low_rank(setup, path, "mlp.fc2", p, v.intermediate_size)
    mlp = Half(width, width, 3 * inner + low_rank, inner, 2 * inner, 3 * inner + 2 * width)
    halves = _widening(setup, attention, path + "attn."), _widening(setup, mlp, path + "mlp.")
    return Block(*halves, width, gradients_under(setup, path))


def patches(setup: Setup) -> int:
    """P: patches of the pictures in a micro-batch."""
    v = setup.geometry.vision
    return setup.image_tokens * v.spatial_merge_size**2 if v else 0
