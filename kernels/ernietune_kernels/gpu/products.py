"""What the grouped kernels compute, as functions: products, gate and up, and the adapters' own gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton

from .grouped import gate_up_kernel, grouped_kernel
from .lowrank import narrow_kernel, outer_kernel
from .runtime import capability, launch, upcast
from .stacks import Stack
from .tensors import Tensor, dtype_name, empty
from .tuning import Tiles, tiles

# From Hopper on: two warpgroups of 64 x 256, which shared memory feeds as fast as the tensor cores multiply
# (benchmarks/gpu_compiled.py); an A100 has not the shared memory for it.
WIDE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 4}
LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
# Few rows an expert: the stack is streamed once, in wide reads, the more stages the fewer bytes one has.
STREAM = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 3}
STREAM_STAGES = {16: 3, 8: 4, 4: 6}
PROGRAMS = 132
NARROW = {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
OUTER = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}
FEW_ROWS = 16


@dataclass(frozen=True)
class Rows:
    """How `total` sorted rows belong to experts: counts int32 [E].

    `source` int64 [total] is the operand's row that each of them reads; None: they are the operand's rows.
    """

    total: int
    counts: Tensor
    source: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return int(self.counts.shape[0])

    def tiles(self, block: int) -> int:
        """Row tiles that are always enough, without asking the device: each expert may need one more."""
        return min(self.total, triton.cdiv(self.total, block) + self.experts)


@dataclass(frozen=True)
class Factor:
    """The low-rank part of a product: narrow [N, r], with the adapter's scale in it, and what widens it.

    `wide` is B [E, O, r] in a forward and A [E, r, I] in an input gradient.
    """

    narrow: Tensor
    wide: Tensor


@dataclass(frozen=True)
class Term:
    """Columns of the operand from `first` on times a stack, plus the low-rank part where there is one."""

    stack: Stack
    factor: Factor | None = None
    first: int = 0


def grouped(x: Tensor, rows: Rows, terms: Sequence[Term], forward: bool = True) -> Tensor:
    """Sum over one or two terms of x W^T (forward: one) or of x W (the input gradient) -> [N, O or I]."""
    term, other = terms[0], terms[-1]
    assert len(terms) == 1 or (len(terms) == 2 and not forward)
    _, outputs, inputs = term.stack.shape
    width, inner = (outputs, inputs) if forward else (inputs, outputs)
    y = empty([rows.total, width], dtype_name(x), x)
    shape = _tiles("grouped" if forward else "grouped_back", rows, term.stack, width)
    tiles_m = rows.tiles(shape["BLOCK_M"])
    operands = [x, _read(rows.source, y), y, rows.counts, *_operands(term, y), *_operands(other, y)]
    sizes = (rows.experts, tiles_m, x.shape[1], outputs, inputs, rank_of(term.factor))
    form = {"FORWARD": forward, "TERMS": len(terms), "EVEN_N": width % shape["BLOCK_N"] == 0}
    constants = {**form, **_loop(shape, inner), **_common(rows, term), **shape}
    launch(grouped_kernel, [tiles_m * triton.cdiv(width, shape["BLOCK_N"])], *operands, *sizes, **constants)
    return y


def gate_up(
    x: Tensor, rows: Rows, gate: Term, up: Term, row_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """([gate | up] [N, 2 O], silu(gate) * up * weight of the row [N, O]) of one reading of x."""
    _, outputs, inputs = gate.stack.shape
    halves = empty([rows.total, 2 * outputs], dtype_name(x), x)
    h = empty([rows.total, outputs], dtype_name(x), x)
    shape = _tiles("gate_up", rows, gate.stack, outputs)
    tiles_m = rows.tiles(shape["BLOCK_M"])
    operands = [x, _read(rows.source, h), _read(row_weight, h), halves, h, rows.counts]
    operands += [*_operands(gate, h)[:4], *_operands(up, h)[:4]]
    sizes = (rows.experts, tiles_m, outputs, inputs, rank_of(gate.factor))
    form = {"WEIGHTED": row_weight is not None, **_loop(shape, inputs)}
    constants = {**form, **_common(rows, gate), **shape}
    launch(gate_up_kernel, [tiles_m * triton.cdiv(outputs, shape["BLOCK_N"])], *operands, *sizes, **constants)
    return halves, h


def narrow(
    x: Tensor, rows: Rows, factor: Tensor, scale: float, transposed: bool = False, first: int = 0
) -> Tensor:
    """scale * x A^T [N, r] for A [E, r, width], or scale * x B for B [E, width, r] when `transposed`.

    The operand is the factor's width of columns of x, from `first` on.
    """
    rank, inner = _rank_and_width(factor, transposed)
    y = empty([rows.total, rank], dtype_name(x), x)
    shape = tiles("narrow", f"r{rank}", NARROW)
    sizes = (rows.experts, x.shape[1], first, inner, rank, scale)
    constants = {"TRANSPOSED": transposed, "R": padded_rank(rank), **row_constants(rows), **shape}
    launch(
        narrow_kernel,
        [rows.tiles(shape["BLOCK_M"])],
        *(x, _read(rows.source, y), factor, y, rows.counts),
        *sizes,
        **constants,
    )
    return y


def outer(
    narrow_Nr: Tensor, x: Tensor, rows: Rows, width: int, transposed: bool = False, first: int = 0
) -> Tensor:
    """Per expert, narrow^T x over its rows: fp32 [E, r, width], or [E, width, r] when `transposed`."""
    rank = narrow_Nr.shape[1]
    shape = tiles("outer", f"r{rank}", OUTER)
    y = empty([rows.experts, *((width, rank) if transposed else (rank, width))], "float32", x)
    sizes = (rows.experts, x.shape[1], first, width, rank)
    constants = {"TRANSPOSED": transposed, "R": padded_rank(rank), **row_constants(rows), **shape}
    launch(
        outer_kernel,
        [rows.experts, triton.cdiv(width, shape["BLOCK_N"])],
        *(narrow_Nr, x, _read(rows.source, y), y, rows.counts),
        *sizes,
        **constants,
    )
    return y


def _tiles(kernel: str, rows: Rows, stack: Stack, width: int) -> Tiles:
    few = rows.total <= FEW_ROWS * rows.experts
    default = _stream_tiles(rows, stack, width) if few else _large_tiles(kernel, stack)
    form = "" if stack.bits == 16 else f"/int{stack.bits}"
    return tiles(kernel, f"{'stream' if few else 'large'}{form}", default)


def _large_tiles(kernel: str, stack: Stack) -> Tiles:
    """Codes against the grain take more registers to unpack than the wide tile leaves."""
    roomy = stack.bits == 16 or kernel != "grouped_back"
    chosen = WIDE if roomy and capability() >= 90 else LARGE
    # The tile of gate and up is as wide as two.
    return chosen | {"BLOCK_N": chosen["BLOCK_N"] // 2} if kernel == "gate_up" else chosen


def _stream_tiles(rows: Rows, stack: Stack, width: int) -> Tiles:
    chosen = STREAM | {"num_stages": STREAM_STAGES[stack.bits]}
    if stack.bits == 4 and stack.group in (32, 64):  # A step has one scale a row.
        chosen |= {"BLOCK_K": stack.group, "num_stages": 8}
    if rows.tiles(chosen["BLOCK_M"]) * triton.cdiv(width, chosen["BLOCK_N"]) < PROGRAMS:
        # Or some multiprocessors have nothing to read, and the others too little on its way.
        chosen |= {"BLOCK_N": chosen["BLOCK_N"] // 2, "num_stages": min(2 * chosen["num_stages"], 10)}
    return chosen


def _operands(term: Term, unread: Tensor) -> tuple[Tensor | int, ...]:
    """What a kernel reads of a term; where it reads nothing it still needs some tensor."""
    factor = term.factor
    pair = (unread, unread) if factor is None else (factor.narrow, factor.wide)
    return term.stack.codes, term.stack.scales, *pair, term.first


def _common(rows: Rows, term: Term) -> Tiles:
    lora = {"LORA": term.factor is not None, "R": padded_rank(rank_of(term.factor))}
    return row_constants(rows) | lora | {"BITS": term.stack.bits, "GROUP": term.stack.group}


def _loop(shape: Tiles, inner: int) -> Tiles:
    return {"STAGES": shape.get("num_stages", 1), "EVEN_K": inner % shape["BLOCK_K"] == 0}


def row_constants(rows: Rows) -> Tiles:
    """The constants that tell a kernel how its rows lie."""
    experts = triton.next_power_of_2(rows.experts)
    return {"GATHER": rows.source is not None, "EXPERTS": experts, "UPCAST": upcast()}


def _read(tensor: Tensor | None, unread: Tensor) -> Tensor:
    return unread if tensor is None else tensor


def rank_of(factor: Factor | None) -> int:
    """r, or 0 without a low-rank part."""
    return 0 if factor is None else int(factor.narrow.shape[1])


def padded_rank(rank: int) -> int:
    """Tensor cores take at least 16 columns."""
    return max(16, triton.next_power_of_2(rank))


def _rank_and_width(factor: Tensor, transposed: bool) -> tuple[int, int]:
    _, rows, columns = factor.shape
    return (columns, rows) if transposed else (rows, columns)
