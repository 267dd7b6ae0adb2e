"""Every Triton kernel compiled for cards that are not here, and what that says about its speed.

    python benchmarks/gpu_compiled.py                        all kernels and shapes for an H200 (sm_90)
    python benchmarks/gpu_compiled.py --cards 80 90 100      also an A100 and a B200
    python benchmarks/gpu_compiled.py --only "bf16 FP8"      lines that have one of the words
    python benchmarks/gpu_compiled.py --json FILE            the figures for another program

Needs triton alone. A line is one compiled kernel in its default configuration, with the models whose shapes
take it: a kernel is compiled once for all sizes that divide by 16.
  regs, spill   registers, and bytes of them kept in memory, a thread
  KiB, blocks   shared memory a block, and blocks that fit on a multiprocessor
  loop          tensor-core instructions of the busiest loop + all its others
  loads         of that loop: made ahead / of these 16 bytes wide / waited for
  bound         sm_90 only. What is left of an H200's 989 TFLOP/s in bf16 (1,979 in FP8), multiplied, by
                S traffic of shared memory or I instructions of the loop, whichever is more; O instructions
                outside it, where no second block fills the time; R row tiles half full; W the last wave.
                For few rows: KiB of weights on their way to a multiprocessor (4.8 TB/s take about 29) and
                the share of 4.8 TB/s at which the loop's instructions fill the time.
Arithmetic, not a measurement: bounds from above, which know nothing of latencies, caches or clocks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
HERE = Path(__file__).resolve().parent
# The folder of the kernels as a package of its own: ernietune_kernels itself imports paddle.
sys.path[:0] = [str(HERE.parent / "kernels" / "ernietune_kernels"), str(HERE)]

from compiled import TOOLS, Compiled, Launch, Outline, compiled  # noqa: E402
from gpu import runtime, tensors  # noqa: E402

RECORDED: list[Launch] = []
TARGET = [90]

# Nothing is computed: tensors are outlines, launches are written down. Set before others import them.
tensors.empty = tensors.zeros = lambda shape, dtype, like: Outline(shape, dtype)
tensors.take = lambda tensor, index: Outline([*index.shape, *tensor.shape[1:]], tensor.dtype)
tensors.concat = lambda parts: parts[0]
tensors.matmul = lambda x, y, transpose_x=False: Outline([x.shape[transpose_x], y.shape[1]], x.dtype)
runtime.capability = lambda: TARGET[0]
runtime.upcast = lambda: False
runtime.launch = lambda kernel, grid, *given, **constants: RECORDED.append(
    Launch(kernel, tuple(grid), given, constants)
)

from gpu import activation, cross_entropy, decode, fp8, norm, permute, products, rope  # noqa: E402
from gpu.products import Factor, Rows, Term  # noqa: E402
from gpu.stacks import Stack  # noqa: E402

MULTIPROCESSORS = 132
# A multiprocessor's turn of the clock: floating-point operations of bf16 products, bytes of shared memory,
# instructions of its four schedulers.
FLOPS, SHARED_BYTES, ISSUED = 4096, 128, 4
FP8_FLOPS = 2 * FLOPS
CLOCK = 989.4e12 / MULTIPROCESSORS / FLOPS


@dataclass(frozen=True)
class Model:
    """Sizes of one expert layer on one card, and of what is around it."""

    name: str
    hidden: int
    inner: int
    experts: int
    rows: int  # (token, choice) pairs of a training step of 8,192 tokens a card
    heads: int
    groups: int
    chosen: int = 6
    rank: int = 16
    tokens: int = 8192
    vocabulary: int = 103_424
    divided: bool = False  # rows come from other cards, which keep the routing weights

    @property
    def sources(self) -> int:
        """Rows that those of the experts are read from."""
        return self.rows if self.divided else self.tokens


MODELS = (
    Model("21b", 2560, 1536, 64, 49_152, 20, 4),
    Model("vl28b-vision", 2560, 512, 64, 49_152, 20, 4),
    # Eight cards, eight of 64 experts each: as many rows arrive as leave.
    Model("300b-ep8", 8192, 3584, 8, 65_536, 64, 8, chosen=8, divided=True),
    Model("0.3b", 1024, 3072, 1, 8192, 16, 2, chosen=1),
)
BF16, FP32 = "bfloat16", "float32"


def stack(model: Model, outputs: int, inputs: int, bits: int, group: int = 128) -> Stack:
    """A frozen stack in one of its forms."""
    e = model.experts
    if bits == 16:
        return Stack(Outline([e, outputs, inputs], BF16))
    if bits == 8:
        return Stack(Outline([e, outputs, inputs], "int8"), Outline([e, outputs], FP32), 8)
    codes = Outline([e, outputs, inputs // 2], "uint8")
    return Stack(codes, Outline([e, outputs, inputs // group], FP32), 4, group)


def sorted_rows(model: Model, total: int, gathered: bool = False) -> Rows:
    """Rows in expert order."""
    return Rows(total, Outline([model.experts], "int32"), Outline([total], "int64") if gathered else None)


def factor(model: Model, total: int, outputs: int, inputs: int, forward: bool) -> Factor:
    """The low-rank part of a product."""
    shape = [model.experts, outputs, model.rank] if forward else [model.experts, model.rank, inputs]
    return Factor(Outline([total, model.rank], BF16), Outline(shape, BF16))


def product_calls(m: Model) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Training: the three products forward and backward, in every stored form; decoding: few rows."""
    for bits, group in ((16, 1), (8, 1), (4, 64), (4, 128)):
        form = {16: "bf16", 8: "int8", 4: f"int4/{group}"}[bits]
        gate, down = stack(m, m.inner, m.hidden, bits, group), stack(m, m.hidden, m.inner, bits, group)
        for total, word in ((m.rows, "train"), (m.chosen, "decode")):
            x, h = Outline([total, m.hidden], BF16), Outline([total, m.inner], BF16)
            rows, own = sorted_rows(m, total, True), sorted_rows(m, total)
            up = Term(gate, factor(m, total, m.inner, m.hidden, True))
            weight = None if m.divided else Outline([total], FP32)
            run = lambda x=x, rows=rows, up=up, w=weight: products.gate_up(x, rows, up, up, w)  # noqa: E731
            yield f"gate+up {form} {word}", run
            wide = Term(down, factor(m, total, m.hidden, m.inner, True))
            yield f"down {form} {word}", lambda h=h, own=own, wide=wide: products.grouped(h, own, [wide])
        back = Term(down, factor(m, m.rows, m.hidden, m.inner, False))
        grad, both = Outline([m.sources, m.hidden], BF16), Outline([m.rows, 2 * m.inner], BF16)
        rows, own = sorted_rows(m, m.rows, True), sorted_rows(m, m.rows)
        run = lambda grad=grad, rows=rows, back=back: products.grouped(grad, rows, [back], forward=False)  # noqa: E731
        yield f"down back {form} train", run
        low = factor(m, m.rows, m.inner, m.hidden, False)
        terms = [Term(gate, low), Term(gate, low, m.inner)]
        run = lambda both=both, own=own, terms=terms: products.grouped(both, own, terms, forward=False)  # noqa: E731
        yield f"gate+up back {form} train", run


def adapter_calls(m: Model) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The adapters' own products and gradients."""
    rows, own = sorted_rows(m, m.rows, True), sorted_rows(m, m.rows)
    x, grads = Outline([m.sources, m.hidden], BF16), Outline([m.rows, 2 * m.inner], BF16)
    a, b = Outline([m.experts, m.rank, m.hidden], BF16), Outline([m.experts, m.inner, m.rank], BF16)
    low = Outline([m.rows, m.rank], BF16)
    yield "x A^T", lambda: products.narrow(x, rows, a, 0.5)
    yield "dy B", lambda: products.narrow(grads, own, b, 0.5, transposed=True, first=m.inner)
    yield "dA", lambda: products.outer(low, x, rows, m.hidden)
    wide, short = Term(Stack(b)), Term(Stack(a))
    yield "x A^T B^T", lambda: products.grouped(low, own, [wide])
    yield "dy B A", lambda: products.grouped(low, own, [short], forward=False)
    yield "dB", lambda: products.outer(low, grads, own, m.inner, transposed=True, first=m.inner)


def fp8_calls(m: Model) -> Iterator[tuple[str, Callable[[], Any]]]:
    """FP8: quantising and both products."""
    rows = sorted_rows(m, m.rows)
    weights = fp8.quantize_blocks(Outline([m.experts, m.inner, m.hidden], BF16))
    RECORDED.clear()
    yield "FP8 rows quantised", lambda: fp8.quantize_rows(Outline([m.rows, m.hidden], BF16))
    yield (
        "FP8 stack quantised",
        lambda: fp8.quantize_blocks(Outline([m.experts, m.inner, m.hidden], BF16)),
    )
    for forward, width, word in ((True, m.hidden, "forward"), (False, m.inner, "input gradient")):
        codes = Outline([m.rows, width], "float8_e4m3fn")
        x = fp8.Fp8(codes, Outline([m.rows, width // 128], FP32))
        low = factor(m, m.rows, m.inner, m.hidden, forward)
        run = lambda x=x, low=low, f=forward: fp8.grouped_fp8(x, rows, weights, BF16, low, f)  # noqa: E731
        yield f"FP8 {word} train", run


def other_calls(m: Model) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Routing, the head, attention of one token, and the small ones."""
    x, halves = Outline([m.tokens, m.hidden], BF16), Outline([m.rows, 2 * m.inner], BF16)
    if m.experts > 1:
        chosen = Outline([m.tokens, m.chosen], "int64")
        weights, all_experts = Outline([m.tokens, m.chosen], FP32), 64
        logits = Outline([m.tokens, all_experts], FP32)
        yield "route", lambda: permute.route(logits, Outline([all_experts], FP32), m.chosen)
        yield "route back", lambda: permute.route_backward(weights, weights, chosen, all_experts)
        yield "sort", lambda: permute.sort_by_expert(chosen, all_experts)
        inverse = Outline([m.tokens * m.chosen], "int64")
        sent = Outline([m.tokens * m.chosen, m.hidden], BF16)
        yield "combine", lambda: permute.combine(sent, inverse, m.chosen)
        yield "combine, weighted", lambda: permute.combine(sent, inverse, m.chosen, weights)
        yield "combine, weighted, back", lambda: permute.spread(x, sent, inverse, weights)
        if m.divided:
            yield "sort by 128 destinations", lambda: permute.sort_by_expert(chosen, 2 * all_experts)
            yield "combine, one choice", lambda: permute.combine(sent, inverse, 1)
        weight = None if m.divided else Outline([m.rows], FP32)
        yield "SwiGLU", lambda: activation.swiglu(halves, weight)
        grad = Outline([m.rows, m.inner], BF16)
        yield "SwiGLU back", lambda: activation.swiglu_backward(grad, halves, weight)
    yield "norm", lambda: norm.rms_norm(x, Outline([m.hidden], BF16), 1e-5)
    inverse_rms = Outline([m.tokens], FP32)
    yield "norm back", lambda: norm.rms_norm_backward(x, x, Outline([m.hidden], BF16), inverse_rms)
    q, k = Outline([m.tokens, m.heads, 128], BF16), Outline([m.tokens, m.groups, 128], BF16)
    angles = Outline([m.tokens, 64], FP32)
    yield "rope", lambda: rope.rope(q, k, angles, angles)
    head = Outline([m.vocabulary, m.hidden], BF16)
    labels = Outline([m.tokens], "int64")
    yield "cross-entropy", lambda: cross_entropy.linear_cross_entropy(x, head, labels)
    pages, slots = Outline([1 << 17, m.groups, 128], BF16), Outline([1, 8192], "int64")
    one = Outline([1, m.heads, 128], BF16)
    lengths = Outline([1], "int32")
    yield "decode attention", lambda: decode.decode_attention(one, pages, pages, slots, lengths)


def calls() -> Iterator[tuple[Model, str, Launch]]:
    """Every launch of every model."""
    for m in MODELS:
        sources = [product_calls, adapter_calls, fp8_calls, other_calls]
        for source in sources if m.experts > 1 else [other_calls]:
            for name, call in source(m):
                RECORDED.clear()
                call()
                for launch in tuple(RECORDED):
                    yield m, name, launch


@dataclass
class Line:
    """One compiled kernel and who takes it."""

    kernel: str
    card: int
    tile: str
    registers: int
    spilled: int
    shared: int
    blocks: int
    tensor_core: str
    products: int
    others: int
    ahead: int
    wide: int
    waiting: int
    bounds: dict[str, str]  # by model
    calls: list[str]

    def __str__(self) -> str:
        loop = f"{self.products} {self.tensor_core} + {self.others}" if self.products else str(self.others)
        alike: dict[str, list[str]] = {}
        for name, text in self.bounds.items():
            alike.setdefault(text, []).append(name)
        (bound, first), *further = alike.items()
        cells = (
            f"{self.kernel:18} sm_{self.card:<4} {self.tile:18} {self.registers:4} {self.spilled:5}",
            f"{self.shared / 1024:4.0f} {self.blocks:6}  {loop:22}",
            f"{self.ahead:3}/{self.wide:3}/{self.waiting:3}  {bound:40}",
            f"{', '.join(self.calls)} ({', '.join(first)})",
        )
        return "\n".join(
            [" ".join(cells), *(f"{'':99}{text:40} ({', '.join(names)})" for text, names in further)]
        )


_TITLES = f"{'kernel':18} {'card':7} {'tile':18} regs spill  KiB blocks  {'loop':22} {'loads':11}"
HEAD = f"{_TITLES}  {'bound':40} calls"


def tile_of(launch: Launch) -> str:
    """Block sizes, warps and stages."""
    c = launch.constants
    sizes = [c.get(n) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_S", "BLOCK")]
    shape = "x".join(str(s) for s in sizes if s)
    return f"{shape} {c.get('num_warps', 4)}w" + (f" {c['num_stages']}s" if "num_stages" in c else "")


def bound(launch: Launch, made: Compiled, m: Model) -> str:
    """What is left of an H200, in words (see the top)."""
    name = launch.kernel.__name__
    if made.capability != 90 or name not in ("grouped_kernel", "gate_up_kernel", "fp8_kernel"):
        return ""
    if launch.constants["BLOCK_M"] < 64:
        return _stream_bound(launch, made)
    shares = _shares(launch, made, m)
    total = 1.0
    for share in shares.values():
        total *= share
    return f"{total:.0%} = " + " x ".join(f"{n} {s:.0%}" for n, s in shares.items())


def _width(launch: Launch) -> int:
    """Outputs of a tile: gate's and up's together."""
    return launch.constants["BLOCK_N"] * (2 if launch.kernel.__name__ == "gate_up_kernel" else 1)


def _shares(launch: Launch, made: Compiled, m: Model) -> dict[str, float]:
    """Of the tensor cores' time, by reason."""
    c, given = launch.constants, dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    low = launch.kernel.__name__ == "fp8_kernel"
    rows, columns, inner = c["BLOCK_M"], _width(launch), c["BLOCK"] if low else c["BLOCK_K"]
    size = 1 if low else 2
    busy = 2 * rows * columns * inner / (FP8_FLOPS if low else FLOPS)
    # A warpgroup's instruction reads 64 rows and all columns; a copy writes each tile once.
    moved = size * inner * (rows // 64 * (64 + columns) + rows + columns) / SHARED_BYTES
    issued = made.loop.total * made.warps / ISSUED
    shares = {"S" if moved >= issued else "I": min(1.0, busy / max(moved, issued))}
    depth = given["ins"] if low or c.get("FORWARD", True) else given["outs"]
    work = c.get("TERMS", 1) * depth / inner * max(busy, moved, issued)
    if made.blocks == 1:
        shares["O"] = work / (work + (sum(made.counts.values()) - made.loop.total) * made.warps / ISSUED)
    average = m.rows / m.experts
    shares["R"] = average / (average + rows / 2)
    tiles = (
        launch.grid[0] * (average + rows / 2) / (average + rows)
    )  # The grid has a tile an expert to spare.
    places = MULTIPROCESSORS * made.blocks
    shares["W"] = tiles / (-(-tiles // places) * places)
    return shares


def _stream_bound(launch: Launch, made: Compiled) -> str:
    """KiB on their way to a multiprocessor (all stages but one); a turn's bytes against its instructions."""
    c = launch.constants
    turn = _width(launch) * c["BLOCK_K"] * c["BITS"] / 8
    together = min(made.blocks, launch.grid[0] / MULTIPROCESSORS)
    clocks = turn / (4.8e12 / MULTIPROCESSORS / CLOCK)
    share = min(1.0, clocks / (made.loop.total * made.warps / ISSUED))
    return f"{(c['num_stages'] - 1) * turn * together / 1024:.0f} KiB, I {share:.0%}"


def lines(cards: list[int], models: list[str], words: list[str], once: bool) -> Iterator[Line]:
    """Compile what is asked for, each kernel once, or `once` each kernel's first form alone."""
    for card in cards:
        TARGET[0] = card
        found: dict[str, dict[str, tuple[Launch, Model]]] = {}
        named: dict[str, list[str]] = {}
        for m, name, launch in calls():
            text = f"{launch.kernel.__name__} {name}"
            if (
                m.name not in models
                or (words and not any(word in text for word in words))
                or (card < 89 and "FP8" in name)
            ):
                continue
            key = launch.kernel.__name__ if once else launch.key
            found.setdefault(key, {}).setdefault(m.name, (launch, m))
            names = named.setdefault(key, [])
            names += [name] if name not in names else []
        for key, users in found.items():
            yield _line(users, card, named[key])


def _line(users: dict[str, tuple[Launch, Model]], card: int, names: list[str]) -> Line:
    launch, _ = next(iter(users.values()))
    made = compiled(launch, card)
    bounds = {name: bound(own, made, m) for name, (own, m) in users.items()}
    products = made.loop.products
    return Line(
        *(launch.kernel.__name__.removesuffix("_kernel"), card, tile_of(launch), made.registers),
        *(made.spilled, made.shared, made.blocks, made.tensor_core, products, made.loop.total - products),
        *(made.ahead, made.wide, made.waiting, bounds, names),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", type=int, nargs="+", default=[90], choices=[80, 90, 100])
    names = [m.name for m in MODELS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--only", default="", help="words, of which a line's kernel or call has one")
    parser.add_argument("--once", action="store_true", help="each kernel in its first form alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (TOOLS / "nvdisasm").exists():
        sys.exit("this Triton has no cuobjdump and nvdisasm beside its ptxas: nothing can be read back")
    print(HEAD)
    found = []
    for line in lines(options.cards, options.models, options.only.split(), options.once):
        print(line, flush=True)
        found.append(line)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in found], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
