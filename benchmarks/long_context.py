"""What a card would hold at 128k tokens, by arithmetic on published shapes; nothing is run.

    python benchmarks/long_context.py [--tokens 131072] [--gib 79.6]

One packed row in bf16, LoRA of rank 32 on attention and experts, recompute: layers, all experts on each card
(their fused layer) with widths divided by tensor. GB are 10^9 bytes. `weights` are the base, adapters, their
gradients and moments (sharding 2; 3 where the base is sharded, and then a gathered layer), `kept` the inputs
of the layers, `layer` one layer while its backward pass runs, by the formulas of docs/hardware.md with
divided widths: two gathered inputs, attention, experts, and their working memory. `ends` are words, last
rows and their gradient, and the logits of a chunk. The sum takes all of it to be there at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from ernietune.checkpoint.names import parameter_shapes  # noqa: E402
from ernietune.models.config import SHAPES, ModelConfig  # noqa: E402
from ernietune.parallel.degrees import Degrees  # noqa: E402
from ernietune.targets import LoraSpec, Shapes, select  # noqa: E402
from ernietune.train.division import numbers, updated_numbers  # noqa: E402

BYTES, RANK, GB = 2, 32, 1e9
CHUNKS = 3 * (1 << 26)  # three copies of 64 MiB of logits
PLANS = [
    # shape, data, tensor, base
    ("21b-a3b", 8, 1, "replicated"),
    ("21b-a3b", 2, 4, "replicated"),
    ("300b-a47b", 2, 8, "sharded"),
    ("300b-a47b", 4, 8, "sharded"),
    ("300b-a47b", 8, 8, "sharded"),
]


def weights(config: ModelConfig, degrees: Degrees, base: str) -> float:
    """The frozen base, adapters with gradients and moments, and a gathered layer where there is one."""
    gathered = base == "sharded"
    shapes = parameter_shapes(config)
    adapters = {}
    for path in select(shapes, LoraSpec(rank=RANK, targets=("attention", "experts"))):
        *experts, outputs, inputs = shapes[f"{path}.weight"]
        adapters[f"{path}.lora_A"] = [*experts, RANK, inputs]
        adapters[f"{path}.lora_B"] = [*experts, outputs, RANK]
    held = BYTES * numbers(shapes, degrees, gathered) + 4 * numbers(adapters, degrees, gathered)
    if gathered:
        held += BYTES * numbers(_last_layer(shapes), degrees, False)
        held += 4 * numbers(_last_layer(adapters), degrees, False)
    return held + 3 * 4 * updated_numbers(adapters, degrees, 2)


def _last_layer(shapes: Shapes) -> Shapes:
    number = max(int(path.split(".")[2]) for path in shapes if path.startswith("model.layers."))
    return {path: shape for path, shape in shapes.items() if path.startswith(f"model.layers.{number}.")}


def activations(config: ModelConfig, tokens: int, tensor: int) -> tuple[float, float, float]:
    """Bytes kept, of one layer at work, and at the ends."""
    row = tokens * config.hidden_size * BYTES
    kept = config.num_hidden_layers * -(-tokens // tensor) * config.hidden_size * BYTES
    attention = 3 * tokens * (config.query_width + config.key_value_width) // tensor * BYTES
    inner = config.pools[0].intermediate_size // tensor
    shared = 3 * tokens * config.shared_intermediate_size // tensor * BYTES
    experts = 3 * tokens * config.moe_k * inner * BYTES
    working = tokens * config.moe_k * (config.hidden_size + 3 * inner) * BYTES + 3 * row
    return kept, 2 * row + attention + shared + experts + working, 3 * row + CHUNKS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--gib", type=float, default=79.6, help="what a card reports")
    options = parser.parse_args()
    print("| shape | cards | data x tensor | base | weights | kept | layer | ends | sum, GB | fits |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape, data, tensor, base in PLANS:
        config = ModelConfig.from_dict(SHAPES[shape], shape)
        degrees = Degrees(data=data, tensor=tensor)
        degrees.check(config)
        parts = (weights(config, degrees, base), *activations(config, options.tokens, tensor))
        fits = "yes" if sum(parts) < options.gib * 2**30 else "no"
        shown = " | ".join(f"{part / GB:.1f}" for part in (*parts, sum(parts)))
        print(f"| {shape} | {data * tensor} | {data} x {tensor} | {base} | {shown} | {fits} |")


if __name__ == "__main__":
    main()
