"""The memory that `ernietune estimate` names against the peak that trainings of small models reach here.

    python benchmarks/estimate.py            all cases, in processes of their own
    python benchmarks/estimate.py NAME...    some of them

Measured: the peak of Paddle's host allocator over two optimizer steps with full rows, everything counted that
was allocated for the model, and the codes of a quantised base, which lie elsewhere. Beside it the growth of
the resident memory of the process, which the allocator of the C library rounds up. Of several both are the
largest of any, and the bytes that rank 0 sent in a step, counted call by call, stand beside those of the
formulas. Exit code 1 when memory or bytes are off by more than 10 %.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ernietune  # noqa: F401  # sets the environment before paddle is imported

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
LIMIT = 0.10
DENSE = {"num_hidden_layers": 4, "vocab_size": 16384}
# Widths of about half those of 21B and VL-28B, with fewer and smaller experts.
HALF: dict[str, Any] = {
    "vocab_size": 16384,
    "num_hidden_layers": 3,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_k": 4,
}
MOE = {**HALF, "moe_num_experts": 16, "moe_intermediate_size": 512, "moe_layer_end_index": 2}
TOWER = {"depth": 3, "embed_dim": 640, "hidden_size": 640, "num_heads": 8}
VL = {**HALF, "moe_num_experts": [8, 8], "moe_intermediate_size": [512, 256], "pixel_hidden_size": 640}
TOKENS = dict.fromkeys(("im_patch_id",), 5) | {
    f"{kind}_{end}_token_id": 6 + 2 * i + j
    for i, kind in enumerate(("image", "video"))
    for j, end in enumerate(("start", "end"))
}
ALL = ["attention", "shared_experts", "experts", "vision", "resampler"]


@dataclass(frozen=True)
class Case:
    """One training: a published shape with other sizes, a full row, and how it trains."""

    shape: str
    sizes: dict[str, Any]
    tokens: int
    recompute: str = "none"
    documents: int = 1
    images: int = 0  # tokens of pictures
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    full: bool = False
    dpo: bool = False
    dropout: float = 0.0
    accumulation: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    form: str = "none"  # of a frozen base


EXPERTS = ["attention", "experts"]
PARTS = "attention+norm+activation"


# Half of that again: several processes share two cores here.
SMALL = {**MOE, "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "moe_num_experts": 8}


def several(parallel: dict[str, Any], recompute: str = "none", accumulation: int = 2) -> Case:
    """A text model with experts in several processes."""
    return Case(
        "21b-a3b", SMALL, 1024, recompute, targets=EXPERTS, accumulation=accumulation, parallel=parallel
    )


def coded(form: str, recompute: str = "none", tokens: int = 1024) -> Case:
    """A text model with experts over a base in codes."""
    return Case("21b-a3b", MOE, tokens, recompute, targets=EXPERTS, form=form)


CASES = {
    "dense, 512 tokens, whole vocabulary": Case("0.3b", {"num_hidden_layers": 4}, 512),
    "dense, 2048 tokens": Case("0.3b", DENSE, 2048),
    "dense, 2048 tokens, layers": Case("0.3b", DENSE, 2048, "layers"),
    "dense, 8 documents, every-2, dropout": Case("0.3b", DENSE, 2048, "every-2", 8, dropout=0.1),
    "dense, attention+norm+activation": Case("0.3b", DENSE, 2048, PARTS, accumulation=2),
    "dense, full tuning": Case("0.3b", DENSE, 1024, full=True),
    "dense, DPO, layers": Case("0.3b", DENSE, 1536, "layers", dpo=True),
    "experts, 1024 tokens": Case("21b-a3b", MOE, 1024, targets=EXPERTS),
    "experts, 1024 tokens, layers": Case("21b-a3b", MOE, 1024, "layers", targets=EXPERTS),
    "experts, 4 documents, moe": Case("21b-a3b", MOE, 1024, "moe", 4, targets=EXPERTS),
    "pictures, frozen tower, activation": Case(
        "vl-28b-a3b", {**VL, "vision_config": TOWER}, 1024, "activation", images=512, targets=EXPERTS
    ),
    "pictures, adapted tower, layers": Case(
        "vl-28b-a3b", {**VL, "vision_config": TOWER}, 1024, "layers", images=512, targets=ALL
    ),
    "int8 base, layers": coded("wint8", "layers"),
    "int4 base": coded("wint4"),
    "int4 base, few tokens, layers": coded("wint4", "layers", 64),
    "int8 and int4 base, few tokens, layers": coded("mixed", "layers", 64),
    "NF4 base, few tokens, layers": coded("nf4", "layers", 64),
    "FP8 base, layers": coded("fp8", "layers"),
    "int8 base, pictures, frozen tower": Case(
        "vl-28b-a3b", {**VL, "vision_config": TOWER}, 512, images=256, targets=EXPERTS, form="wint8"
    ),
    "data 2": several({"data": 2}, accumulation=2),
    "data 2, sharding 1": several({"data": 2, "sharding": 1}, accumulation=4),
    "data 2, sharding 2": several({"data": 2, "sharding": 2}, accumulation=4),
    "data 2, sharding 3, base sharded": several({"data": 2, "sharding": 3, "base": "sharded"}, "layers"),
    "data 2, base sharded": several({"data": 2, "base": "sharded"}, "layers"),
    "expert 2": several({"data": 2, "expert": 2}),
    "expert 2, layers": several({"data": 2, "expert": 2}, "layers"),
    "tensor 2": several({"tensor": 2}, accumulation=1),
    "tensor 2, layers": several({"tensor": 2}, "layers", accumulation=1),
    "expert 2, pictures": Case(
        "vl-28b-a3b",
        {**VL, "vision_config": TOWER},
        1024,
        images=512,
        targets=EXPERTS,
        accumulation=2,
        parallel={"data": 2, "expert": 2},
    ),
}


def config_of(case: Case) -> Any:
    """The configuration of a case."""
    from ernietune.config import Config, DataSection, LoraSection, ModelSection, ParallelSection, TrainSection

    train = TrainSection(
        output="-",
        recompute=case.recompute,
        objective="dpo" if case.dpo else "sft",
        accumulation=case.accumulation,
    )
    lora = LoraSection(enabled=not case.full, targets=case.targets, dropout=case.dropout)
    data = DataSection(train=["-"], max_length=case.tokens)
    parallel = ParallelSection(**case.parallel)
    model = ModelSection(path="-", shape=case.shape, quantization=case.form)
    return Config(model, lora, data, train, parallel=parallel)


def geometry_of(case: Case) -> Any:
    """The model of a case."""
    from ernietune.models.config import ModelConfig

    return ModelConfig.from_dict(raw_of(case), case.shape)


def raw_of(case: Case) -> dict[str, Any]:
    """Its config.json."""
    from ernietune.models.config import SHAPES

    raw = SHAPES[case.shape]
    sizes = dict(case.sizes)
    if "vision_config" in sizes:
        sizes["vision_config"] = raw["vision_config"] | sizes["vision_config"]
    return raw | sizes | (TOKENS if "vl" in case.shape else {})


def batch_of(case: Case, vocabulary: int) -> Any:
    """A full row in which every position has a label; its pictures are 16 x 16 patches each."""
    import numpy as np

    from ernietune.data.collate import Batch
    from ernietune.data.pairs import PairBatch

    random = np.random.default_rng(0)
    ends = np.linspace(0, case.tokens, case.documents + 1).astype(np.int64)[1:]
    ids = random.integers(20, vocabulary, case.tokens)
    ids[: case.images] = TOKENS["im_patch_id"]
    pictures = case.images // 64
    common: dict[str, Any] = {
        "ids": ids,
        "labels": random.integers(0, vocabulary, case.tokens),
        "is_vision": np.arange(case.tokens) < case.images,
        "positions": np.stack([np.arange(case.tokens)] * 3, axis=1),
        "visible_until": np.repeat(ends, np.diff(ends, prepend=0)),
        "patches": np.zeros((pictures * 256, 588), np.uint8),
        "grids": np.array([(1, 16, 16)] * pictures, np.int64).reshape(-1, 3),
    }
    if not case.dpo:
        return Batch(**common, samples=case.documents)
    half = case.tokens // 2
    return PairBatch(
        **common,
        samples=1,
        lengths=np.array([[half, case.tokens - half]]),
        records=np.zeros(1, np.int64),
        score_gaps=np.ones(1, np.float32),
        reference=None,
    )


def base_of(case: Case, geometry: Any, team: Any) -> tuple[Any, int]:
    """The model with random weights, and the bytes of it that the allocator does not know: codes."""
    import paddle
    from paddle.base import core

    from ernietune.models.packed import stored_bytes
    from ernietune.parallel.apply import build
    from ernietune.train.base import load_base

    if case.form == "none":
        model = build(geometry, "float32", team)
        for parameter in model.parameters():
            parameter.set_value(paddle.uniform(parameter.shape, "float32", -0.02, 0.02))
        return model, 0
    with tempfile.TemporaryDirectory() as name:
        folder = written(case, Path(name))
        model = load_base(folder, geometry, "float32", case.form)
    return model, stored_bytes(model) - core.host_memory_stat_current_value("Allocated", 0)


def written(case: Case, folder: Path) -> Path:
    """A checkpoint of a case."""
    from ernietune.initialize import initialize
    from ernietune.models.config import SHAPES

    SHAPES["case"] = raw_of(case)
    return initialize("case", folder / "base")


def train(case: Case) -> dict[str, float]:
    """Two optimizer steps: bytes at the allocator's peak, growth of the resident memory, and the estimate.

    And bytes that this process sent in a step, beside the formulas'.
    """
    import paddle
    from paddle.base import core

    from ernietune.estimate.report import estimate
    from ernietune.estimate.setup import setup_of
    from ernietune.lora import inject, unfreeze
    from ernietune.memory_modes import recompute_of
    from ernietune.parallel.apply import apply
    from ernietune.parallel.team import Team
    from ernietune.train import loop
    from ernietune.train.division import degrees_of
    from ernietune.train.optim import Optimizer
    from ernietune.train.plan import lora_spec
    from ernietune.train.run import objective_of

    config, geometry = config_of(case), geometry_of(case)
    batch = batch_of(case, geometry.vocab_size)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    team = Team.of(degrees_of(config))
    paddle.seed(0)
    model, elsewhere = base_of(case, geometry, team)
    unfreeze(model, ["all"]) if case.full else inject(model, lora_spec(config.lora))
    options = {"stage": config.parallel.sharding, "base_sharded": config.parallel.base == "sharded"}
    trained = apply(model, team, recomputed=recompute_of(case.recompute), **options)
    optimizer = Optimizer(model, config.train, trained=trained)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    share = loop.Share(team, None, trained.micro_batch_is_done)
    before = sum(team.world.traffic.sent.values())
    for _ in range(2):
        loop.accumulate(model, objective_of(config), [batch] * case.accumulation, share)
        trained.collect()
        optimizer.step(1e-4)
    setup = setup_of(config, geometry, gpu=False).changed(image_tokens=case.images, picture_patches=256)
    found = estimate(setup)
    return {
        "peak": core.host_memory_stat_peak_value("Allocated", 0) + elsewhere,
        "resident": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024,
        "estimate": found.needed,
        "sent": (sum(team.world.traffic.sent.values()) - before) / 2,
        "formula": sum(found.sent.values()),
    }


def measured(name: str) -> dict[str, float]:
    """One case in processes of its own: the largest peak of any of them, and what rank 0 sent."""
    from ernietune import launch

    parallel = CASES[name].parallel
    count = parallel.get("data", 1) * parallel.get("tensor", 1)
    places = launch.variables(count) if count > 1 else [{}]
    command = [sys.executable, __file__, "--one", name]
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]
    said = [worker.communicate() for worker in workers]
    if failed := [error for (_, error), worker in zip(said, workers, strict=True) if worker.returncode]:
        sys.exit(f"{name} failed:\n{failed[0]}")
    found = [json.loads(output.splitlines()[-1]) for output, _ in said]
    return found[0] | {key: max(each[key] for each in found) for key in ("peak", "resident")}


def line(name: str, found: dict[str, float]) -> tuple[str, float]:
    """One row of the table, and how far the estimate is off in it."""
    ratios = [found["estimate"] / found["peak"]]
    text = f"{name:38} {sizes(found, 'peak', 'resident', 'estimate')}  {ratios[0]:.3f}"
    if found["sent"]:
        ratios.append(found["formula"] / found["sent"])
        text += f"  {sizes(found, 'sent', 'formula')}  {ratios[1]:.3f}"
    return text, max(abs(ratio - 1) for ratio in ratios)


def sizes(found: dict[str, float], *keys: str) -> str:
    """Some of the figures in MiB."""
    return " ".join(f"{found[key] / MIB:6.0f} MiB" for key in keys)


def main() -> None:
    """Measure the named cases, or all."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(train(CASES[sys.argv[2]])))
        return
    names = sys.argv[1:] or list(CASES)
    if unknown := set(names) - set(CASES):
        sys.exit(f"no case {', '.join(unknown)}; known are: {'; '.join(CASES)}")
    print(
        f"{'case':38} {'measured':>10} {'resident':>10} {'estimate':>10}  ratio  {'sent':>10} {'formula':>10}"
    )
    worst = 0.0
    for name in names:
        text, off = line(name, measured(name))
        worst = max(worst, off)
        print(text, flush=True)
    print(f"furthest from what was measured: {worst:.1%}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
