"""A step from its first layer to its last gradient, and what lies in memory at its fullest moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ernietune.estimate.activations import Block, Half, decoder_block, vision_block
from ernietune.estimate.holdings import layer_in_use, publishing, shared, static_parts, summing
from ernietune.estimate.setup import LOGITS, Setup
from ernietune.memory_modes import Recompute

RESAMPLER = 10  # tensors of a tower block's width that it keeps
# What no formula gives: the CUDA context with its libraries, and what the allocator cannot hand out.
CONTEXT = 1.0 * 2**30
SLACK = 0.05


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment of a step, by part."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


@dataclass
class Walk:
    """Collects the moments of a step; `kept` and `gradients` grow and shrink on the way."""

    static: dict[str, float]
    kept: float = 0.0
    tower: float = 0.0
    gradients: float = 0.0
    moments: list[Moment] = field(default_factory=list)

    def note(self, name: str, **working: float) -> None:
        """A moment at which `working` lies beside what is kept."""
        parts = {
            **self.static,
            "gradients": self.gradients,
            "activations": self.kept,
            "vision tower": self.tower,
            "working memory": 0.0,
            "cross-entropy": 0.0,
        }
        for part, size in working.items():
            key = part.replace("_", " ").replace("cross ", "cross-")
            parts[key] = parts[key] + size
        self.moments.append(Moment(name, parts))

    @property
    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.moments, key=lambda moment: moment.total)


def walk(setup: Setup) -> Walk:
    """The moments of an optimizer step that is not the first: the moments of Adam are there."""
    found = Walk(static_parts(setup), kept=masks(setup))
    trains = shared(setup)
    every = sum(one.waiting for one in trains)
    again = setup.micro_batches > 1  # later micro-batches add to gradients that lie there
    sliced = setup.config.parallel.sharding >= 2  # and then only slices lie there, beside a whole new set
    found.gradients = every if again else 0.0
    vision = _vision_forward(found, setup)
    layers = range(setup.geometry.num_hidden_layers)
    blocks = [(index, decoder_block(setup, index)) for index in layers]
    _forward(found, setup, blocks)
    _loss(found, setup, again and not sliced)
    _backward(found, setup, blocks, again and not sliced)
    _vision_backward(found, setup, vision, again and not sliced)
    _after(found, setup, again and sliced)
    return found


def _after(found: Walk, setup: Setup, sliced: bool) -> None:
    """Sums over the processes, the update, and its publication."""
    trains = shared(setup)
    found.kept = 0.0
    found.gradients = sum(
        one.gradient + (one.waiting if sliced and not one.sliced else 0.0) for one in trains
    )
    if setup.degrees.world > 1:
        found.note("sum of gradients", communication=summing(setup))
    found.gradients = sum(one.size * (one.slice if one.stage else one.numbers) for one in trains)
    found.note("optimizer step", working_memory=_update(setup))
    found.gradients = 0.0
    found.note("publication", communication=publishing(setup))


def masks(setup: Setup) -> float:
    """Who sees whom, once for all layers: on a CPU a number for every query and each earlier key."""
    return 8.0 * setup.tokens if setup.gpu else 4.0 * setup.tokens**2 / 2


def _kept(setup: Setup, half: Half, whole: bool, first: bool) -> float:
    """What a half keeps between the passes."""
    if setup.offloads("activations"):
        return 0.0
    mode: Recompute = setup.recompute
    if whole:
        return half.input if first else 0.0
    kept = half.full
    if (half.is_moe and "moe" in mode.parts) or (first and "attention" in mode.parts):
        kept -= half.inside
    elif "activation" in mode.parts:
        kept -= half.activation
    # The input of a norm that nothing else keeps takes the place of its output.
    return kept - (half.norm if "norm" in mode.parts and half.input else 0.0)


def _whole(setup: Setup, index: int, block: Block) -> tuple[bool, float]:
    """Whether a block is recomputed as a whole, and its input, which is kept then in any case."""
    return setup.recompute.whole(index), block.width


def _block_kept(setup: Setup, index: int, block: Block) -> float:
    whole, width = _whole(setup, index, block)
    if whole:
        return 0.0 if setup.offloads("activations") else width
    return _kept(setup, block.attention, False, True) + _kept(setup, block.mlp, False, False)


def _forward(found: Walk, setup: Setup, blocks: list[tuple[int, Block]]) -> None:
    for index, block in blocks:
        whole, width = _whole(setup, index, block)
        attention, mlp = block.attention, block.mlp
        # Recomputed regions keep nothing of what they pass by, only the rows of the moment.
        inside = 0.0 if whole else attention.full
        in_use = _brought(found, setup, index)
        found.note("forward", working_memory=inside + attention.forward + width, layers_in_use=in_use)
        within = attention.forward if whole else mlp.full
        found.note("forward", working_memory=inside + within + mlp.forward + width, layers_in_use=in_use)
        found.kept += _block_kept(setup, index, block)


def _brought(found: Walk, setup: Setup, index: int) -> float:
    """Bytes of a layer that comes for its work; the moment in which it is put together is noted."""
    in_use, more = layer_in_use(setup, f"model.layers.{index}.")
    if in_use:
        found.note("bringing a layer", layers_in_use=in_use + more)
    return in_use


def _backward(found: Walk, setup: Setup, blocks: list[tuple[int, Block]], again: bool) -> None:
    for index, block in reversed(blocks):
        found.kept -= _block_kept(setup, index, block)
        before = block.attention.full
        if not _whole(setup, index, block)[0] and setup.recompute.parts:
            before = _kept(setup, block.attention, False, True)
        in_use = _brought(found, setup, index)
        if _whole(setup, index, block)[0]:
            forward = before + block.mlp.full + block.mlp.forward + block.width
            found.note("computed again", working_memory=forward, layers_in_use=in_use)
        for name, working in _backward_of(block, before):
            found.note(name, working_memory=working, layers_in_use=in_use)
        if not again:
            found.gradients += block.gradients


def _backward_of(block: Block, before: float) -> Iterator[tuple[str, float]]:
    yield "backward", before + block.mlp.full + block.mlp.backward
    yield "backward", block.attention.full + block.attention.backward


def _vision_forward(found: Walk, setup: Setup) -> list[tuple[int, Block]]:
    vision = setup.geometry.vision
    if vision is None or not setup.image_tokens:
        return []
    blocks = [(index, vision_block(setup, index)) for index in range(vision.depth)]
    width = blocks[0][1].width
    for index, block in blocks:
        for half in (block.attention, block.mlp):
            inside = half.full if setup.trains_vision else 0.0
            found.note("vision tower", vision_tower=inside + half.forward + 3 * width)
        if setup.trains_vision:
            found.tower += _block_kept(setup, index, block)
    if setup.trains_vision:
        found.tower += RESAMPLER * width
    found.note("resampler", vision_tower=4 * width + setup.widened("model.resampler_model."))
    return blocks


def _vision_backward(found: Walk, setup: Setup, blocks: list[tuple[int, Block]], again: bool) -> None:
    if not setup.trains_vision:
        return
    found.tower -= RESAMPLER * blocks[0][1].width
    for index, block in reversed(blocks):
        found.tower -= _block_kept(setup, index, block)
        for name, working in _backward_of(block, block.attention.full):
            found.note(name, vision_tower=working)
        if not again:
            found.gradients += block.gradients


def _loss(found: Walk, setup: Setup, again: bool) -> None:
    """Every token is taken to have a label."""
    g, c = setup.local, setup.number
    width = float(setup.tokens) * g.hidden_size * c
    rows = setup.config.train.loss_chunk or max(16, LOGITS // g.vocab_size)
    chunk, chunks = _chunks(setup.tokens, rows)
    chunk *= 4.0 * g.vocab_size
    found.kept += width  # the input of the last norm
    # A piece of a widened head is there before its logits are whole.
    logits = (chunks - 1) * chunk + max(chunk, setup.head_panel) + (chunk / 2 if c == 2 else 0)
    found.note("loss", cross_entropy=3 * width + logits)
    head = "lm_head.weight" if not g.tie_word_embeddings else "model.embed_tokens.weight"
    table = float(setup.trained.get(head, 0)) * c
    if table and not again:
        found.gradients += table
    found.note("loss", cross_entropy=(4 * width) + (chunks * chunk + table if table else 0.0))
    found.kept -= width


def _chunks(tokens: int, rows: int) -> tuple[float, float]:
    """Rows of a chunk of the loss, and how many such chunks of numbers exist at once.

    Those are logits and exponentials, beside the probabilities of the chunk before.
    """
    first = min(rows, tokens)
    second = min(rows, tokens - first)
    return float(first), max(2.0, 1 + 2 * second / first) if second else 2.0


def _update(setup: Setup) -> float:
    """Temporary numbers of the optimizer, in fp32: of the largest parameter."""
    return 4.0 * max((one.slice for one in shared(setup)), default=0)
