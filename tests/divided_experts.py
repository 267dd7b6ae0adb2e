"""One MoE layer whose experts two processes share, plain and by the kernels of a GPU in their interpreter.

Started twice: each process compares what comes of its rows, their gradients and those of its experts and its
routers with the whole layer, and writes the largest differences, by the largest value, to a file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import ernietune  # noqa: F401  (sets the environment before paddle)

os.environ.setdefault("TRITON_INTERPRET", "1")

import ernietune_kernels.quantized as quantized
import numpy as np
import paddle
from ernietune_kernels import fp8, fused
from paddle import Tensor

from ernietune.lora import LoRAExperts
from ernietune.models import moe
from ernietune.models.config import SHAPES, ModelConfig
from ernietune.models.forms import Form
from ernietune.models.moe import ExpertPool, ModalitySplit, MoE
from ernietune.models.packed import PackedExperts
from ernietune.parallel.degrees import Degrees
from ernietune.parallel.experts import DividedExperts
from ernietune.parallel.team import Team
from ernietune.targets import LoraSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
TOKENS = (5, 3)  # of either process
SMALL = {"hidden_size": 64, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
TEXT = ModelConfig.from_dict(SHAPES["tiny-moe"] | SMALL | {"moe_intermediate_size": 32}, "text")
PAIR = {"moe_num_experts": [4, 4], "moe_intermediate_size": [32, 32]}
MIXED = ModelConfig.from_dict(SHAPES["tiny-vl"] | SMALL | PAIR, "mixed")
FORMS = {"int8": Form(8, frozen=True), "int4": Form(4, 32, frozen=True), "fp8": Form(8, 0, "fp8", True)}


@dataclass(frozen=True)
class Case:
    """`bias` is added to the choice of the first half of the experts; `pictures`: tokens by process."""

    config: ModelConfig
    form: str = ""
    bias: float = 0.0
    pictures: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


CASES = {
    "uneven": Case(TEXT),
    "all rows to one process": Case(TEXT, bias=9.0),
    "text and pictures": Case(MIXED, pictures=((1, 2, 4), (0,))),
    "pictures in one process": Case(MIXED, pictures=((0, 3), ())),
    "nothing but pictures there": Case(MIXED, pictures=((0, 1, 2, 3, 4), ()), bias=9.0),
    **{form: Case(TEXT, form) for form in FORMS},
}


def random(*shape: int, seed: int) -> np.ndarray:
    """Normal numbers that bfloat16 has too: factors beside codes are cast to it."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32) * 0.5
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def pools(layer: MoE) -> list[ExpertPool]:
    return [pool for pool in (layer.text_experts, layer.vision_experts) if pool is not None]


def layer(case: Case, rank: int | None) -> MoE:
    """The whole layer, or with a rank that process's half, with adapters on the experts."""
    degrees = Degrees(2, 2, 1)
    made = MoE(case.config if rank is None else degrees.local(case.config), "float32")
    for number, pool in enumerate(pools(made)):
        count = case.config.pools[number].count
        pool.count, pool.router = count, moe.Router(case.config.hidden_size, count, case.config.moe_k)
        pool.router.weight.set_value(random(*pool.router.weight.shape, seed=number))
        pool.router.weight.stop_gradient = False
        pool.router.correction_bias.set_value(np.repeat(np.float32([case.bias, 0.0]), count // 2))
        for place, name in enumerate(PROJECTIONS):
            _fill(pool, name, case.form, count, rank, 10 * number + place)
    for seed, parameter in enumerate(made.shared_experts.parameters()):
        parameter.set_value(random(*parameter.shape, seed=seed))
    return made


def _fill(pool: ExpertPool, name: str, form: str, count: int, rank: int | None, seed: int) -> None:
    def part(*shape: int, seed: int) -> np.ndarray:
        whole = random(count, *shape, seed=seed)
        return whole if rank is None else np.split(whole, 2)[rank]

    base = dict(pool.named_children())[name]
    held, outputs, inputs = base.weight.shape
    values = part(outputs, inputs, seed=seed)
    if form:
        base = PackedExperts((held, outputs, inputs), FORMS[form])
        base.take(_codes(values, form))
    else:
        base.weight.set_value(values)
    adapter = LoRAExperts(base, LoraSpec(rank=4))
    adapter.lora_A.set_value(part(4, inputs, seed=seed + 100))
    adapter.lora_B.set_value(part(outputs, 4, seed=seed + 200))
    pool.add_sublayer(name, adapter)


def _codes(values: np.ndarray, form: str) -> quantized.QuantizedWeight | fp8.Fp8Weight:
    if form != "fp8":
        return quantized.quantize(values, int(form[3:]), 32)
    stacks = tuple(fp8.quantize_blocks(paddle.to_tensor(matrix[None])) for matrix in values)
    return fp8.Fp8Weight(stacks, values.shape)


def rows(process: int, name: str) -> Tensor:
    """Rows of a process, or the gradient of its result."""
    seed = 1000 + process + 50 * (name == "grad")
    x = paddle.to_tensor(random(TOKENS[process], TEXT.hidden_size, seed=seed))
    x.stop_gradient = False
    return x


def split(pictures: tuple[int, ...], tokens: int) -> ModalitySplit | None:
    where = np.isin(np.arange(tokens), pictures)
    return ModalitySplit.of(paddle.to_tensor(where))


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Every operation takes its kernel, which Triton interprets."""
    with (
        patch.object(fused, "available", lambda tensor: True),
        patch.object(fused, "available_for_products", lambda tensor: True),
        patch.object(moe, "available_for_products", lambda tensor: True),
    ):
        yield


def compare(case: Case, team: Team, kernels: bool) -> dict[str, float]:
    """The largest differences of the half from the whole, which takes the plain path."""
    rank = team.expert.index
    mine, whole = layer(case, rank), layer(case, None)
    x, everybody = rows(rank, "x"), [rows(process, "x") for process in (0, 1)]
    with kernels_of_a_gpu() if kernels else nullcontext():
        y = DividedExperts(mine, team).forward(x, split(case.pictures[rank], TOKENS[rank]))
        (y * rows(rank, "grad").detach()).sum().backward()
    for process in (1 - rank, rank):
        for pool in pools(whole):  # a router's gradient is of its own process's rows
            pool.router.weight.clear_gradient(set_to_zero=False)
        truth = whole(everybody[process], split(case.pictures[process], TOKENS[process]))
        (truth * rows(process, "grad").detach()).sum().backward()
    differences = {"y": off(y, truth), "dx": off(x.grad, everybody[rank].grad)}
    for found, expected in zip(pools(mine), pools(whole), strict=True):
        difference = off(found.router.weight.grad, expected.router.weight.grad)
        differences["routers"] = max(differences.get("routers", 0.0), difference)
        adapters, others = dict(found.named_children()), dict(expected.named_children())
        for name in PROJECTIONS:
            for factor, truth in zip(_factors(adapters[name]), _factors(others[name]), strict=True):
                key = f"factors of {name}"
                differences[key] = max(differences.get(key, 0.0), off(factor.grad, _half(truth, rank)))
    return differences


def _factors(adapter: LoRAExperts) -> tuple[Tensor, Tensor]:
    return adapter.lora_A, adapter.lora_B


def _half(parameter: Tensor, rank: int) -> Tensor | None:
    return None if parameter.grad is None else parameter.grad.split(2)[rank]


def off(found: Tensor | None, truth: Tensor | None) -> float:
    """The largest difference by the largest value; no gradient is one of zeros."""
    if found is None or truth is None:
        given = truth if found is None else found
        return 0.0 if given is None else float(given.abs().max())
    largest = max(float(truth.abs().max()), 1e-3)
    return float((found - truth).abs().max()) / largest


def main(folder: Path) -> None:
    """All cases, plain and by the kernels, in this process."""
    team, found = Team.of(Degrees(2, 2, 1)), {}
    for name, case in CASES.items():
        for path in ("plain", "kernels"):
            found[f"{name}, {path}"] = compare(case, team, path == "kernels")
    (folder / f"rank-{team.world.index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
