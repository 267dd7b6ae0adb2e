"""What the compiler made of a kernel: resources, instructions, and the loop that does the work.

Compiles a launch as Triton's own launcher would specialise it (sizes that divide by 16, sizes of 1, aligned
memory) for a card that is not there, and reads ptxas's report and the machine code back. No card, no torch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Per block and per multiprocessor: shared memory in bytes. Registers are 65,536 and 32 blocks on all three.
SHARED = {80: (166_912, 167_936), 90: (232_448, 233_472), 100: (232_448, 233_472)}
THREADS = 2048
REGISTERS = 65_536
# Of shared memory the system keeps 1 KiB a block, and registers are given out 256 a warp.
RESERVED = 1024

_TYPES = {
    "bfloat16": "bf16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8e4nv",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
}
_MMA = re.compile(r"[HQI]G?MMA|UTC[A-Z]*MMA")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]+)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)


class Outline:
    """A tensor's shape and type without its memory: what a launch is specialised on."""

    def __init__(self, shape: list[int] | tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = tuple(int(n) for n in shape), dtype

    def numel(self) -> int:
        """How many values it would have."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    def reshape(self, shape: list[int]) -> Outline:
        """As a tensor's; one size may be -1."""
        known = 1
        for n in shape:
            known *= n if n != -1 else 1
        return Outline([self.numel() // known if n == -1 else n for n in shape], self.dtype)

    def __getitem__(self, part: slice) -> Outline:
        return Outline([len(range(*part.indices(self.shape[0]))), *self.shape[1:]], self.dtype)

    def __floordiv__(self, other: int) -> Outline:
        return Outline(self.shape, self.dtype)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as `gpu.runtime.launch` was given it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @cached_property
    def signature(self) -> dict[str, str]:
        """Triton type of every argument by name."""
        given = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.constants
        return {name: _type(given[name], name in self.constants) for name in self.kernel.arg_names}

    @cached_property
    def constexprs(self) -> dict[str, Any]:
        """Values that are compiled in."""
        given = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.constants
        return {name: given[name] for name, kind in self.signature.items() if kind == "constexpr"}

    @property
    def key(self) -> str:
        """Equal for two launches that share a compiled kernel."""
        options = {n: v for n, v in self.constants.items() if n not in self.kernel.arg_names}
        return repr((self.kernel.__name__, self.signature, self.constexprs, self._aligned(), options))

    def _aligned(self) -> dict[tuple[int], list[list[Any]]]:
        given = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        hints = {}
        for place, name in enumerate(self.kernel.arg_names):
            value, kind = given.get(name), self.signature[name]
            if kind.startswith("*") or (kind in ("i32", "i64") and value % 16 == 0):
                hints[(place,)] = [["tt.divisibility", 16]]
        return hints

    def compile(self, capability: int) -> Any:
        """The compiled kernel; raises whatever the compiler or ptxas says."""
        options = {n: v for n, v in self.constants.items() if n in ("num_warps", "num_stages", "maxnreg")}
        options["enable_fp_fusion"] = True  # as gpu.runtime.launch has it
        source = ASTSource(self.kernel, self.signature, self.constexprs, self._aligned())
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(value: Any, constant: bool) -> str:
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Outline):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


@dataclass(frozen=True)
class Loop:
    """Instructions of one turn of the loop with the products (or, without any, the one that loads most)."""

    counts: Counter[str]

    def like(self, pattern: str) -> int:
        """How many match."""
        return sum(n for name, n in self.counts.items() if re.match(pattern, name))

    @property
    def products(self) -> int:
        """Tensor-core instructions."""
        return self.like(_MMA.pattern)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code for one card."""

    capability: int
    warps: int
    registers: int
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a block
    counts: Counter[str]
    loop: Loop

    @property
    def blocks(self) -> int:
        """Blocks a multiprocessor runs at once."""
        a_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // (a_warp * self.warps)
        by_shared = SHARED[self.capability][1] // (self.shared + RESERVED)
        return min(by_registers, by_shared, THREADS // (32 * self.warps), 32)

    def like(self, pattern: str) -> int:
        """Instructions of the whole kernel that match."""
        return sum(n for name, n in self.counts.items() if re.match(pattern, name))

    @property
    def tensor_core(self) -> str:
        """The kind of tensor-core instruction, or nothing."""
        kinds = sorted({m[0] for name in self.counts if (m := _MMA.match(name))})
        return "+".join(kinds)

    @property
    def ahead(self) -> int:
        """Loads of the busiest loop that nothing waits for."""
        return self.loop.like(r"LDGSTS|UTMALDG")

    @property
    def wide(self) -> int:
        """How many of them bring 16 bytes a thread, or a whole tile."""
        return self.loop.like(r"LDGSTS.*128|UTMALDG")

    @property
    def waiting(self) -> int:
        """Loads of the loop into registers."""
        return self.loop.like(r"LDG\.")


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for a card and read the machine code."""
    kernel = launch.compile(capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    lines, counts = _instructions(code)
    return Compiled(
        capability,
        launch.constants.get("num_warps", 4),
        int(found[1]),
        int(found[2]),
        kernel.metadata.shared,
        counts,
        _busiest_loop(lines, _labels(code)),
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _instructions(code: str) -> tuple[list[tuple[int, str, str]], Counter[str]]:
    lines = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(code)]
    return lines, Counter(name for _, name, _ in lines if name != "NOP")


def _labels(code: str) -> dict[str, int]:
    """Address of the instruction behind each label."""
    places = {}
    for label in _LABEL.finditer(code):
        following = _INSTRUCTION.search(code, label.end())
        if following:
            places[label[1]] = int(following[1], 16)
    return places


def _busiest_loop(lines: list[tuple[int, str, str]], labels: dict[str, int]) -> Loop:
    loops = []
    for address, name, operands in lines:
        target = re.search(r"(\.L_x_\d+)", operands)
        start = labels.get(target[1], address) if name.startswith("BRA") and target else address
        if start < address:
            inside = Counter(n for place, n, _ in lines if start <= place <= address and n != "NOP")
            loops.append(Loop(inside))
    # Of nested loops with the same products the inner, shorter one.
    return max(loops, key=lambda x: (x.products, x.like("LDG|UTMALDG"), -x.total), default=Loop(Counter()))
