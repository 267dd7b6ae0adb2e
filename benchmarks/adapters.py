"""What adapters cost a step of the engine: none, one and four beside the model, and one merged into it.

python benchmarks/adapters.py                              a random tiny MoE model
python benchmarks/adapters.py --shape tiny-dense           another shape; also --streams, --rank ...
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ernietune.checkpoint.adapter import save_adapter
from ernietune.checkpoint.load import load_model
from ernietune.export import export
from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.infer.request import Delta, SamplingParams
from ernietune.initialize import initialize
from ernietune.lora import LoraSpec, adapters, inject

_ROUNDS = 3
_COUNT = 4


@dataclass(frozen=True)
class Load:
    """So many streams at once, each with a prompt and an answer of so many tokens."""

    streams: int
    prompt: int
    answer: int


def write_adapters(base: Path, folder: Path, rank: int) -> list[Path]:
    """Random adapters around attention and all experts (or the MLP) of a text model."""
    model = load_model(base)
    targets = ("attention", "experts", "shared_experts") if model.config.pools else ("attention", "mlp")
    inject(model, LoraSpec(rank=rank, targets=targets))
    paths = [folder / f"adapter-{number}" for number in range(_COUNT)]
    for number, path in enumerate(paths):
        generator = np.random.default_rng(number)
        for _, layer in adapters(model):
            layer.lora_B.set_value(0.01 * generator.standard_normal(layer.lora_B.shape).astype(np.float32))
        path.mkdir()
        save_adapter(model, path, str(base))
    return paths


def milliseconds_per_step(engine: Engine, load: Load, users: list[str | None]) -> float:
    """CPU time of all threads; the streams use the adapters in turn."""
    generator = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=load.answer, ignore_eos=True)
    vocabulary = engine.model.config.vocab_size
    requests = [
        engine.prepare_ids(
            generator.integers(300, vocabulary, load.prompt).tolist(), users[stream % len(users)]
        )
        for stream in range(load.streams)
    ]
    arrived: queue.SimpleQueue[Delta | BaseException] = queue.SimpleQueue()
    steps, started = engine.stats().steps, time.process_time()
    for request in requests:
        engine.run(request, params, arrived.put).start()
    left = len(requests)
    while left:
        item = arrived.get()
        if isinstance(item, BaseException):
            raise item
        left -= item.finish_reason is not None
    return 1000 * (time.process_time() - started) / (engine.stats().steps - steps)


def measure(engines: dict[str, tuple[Engine, list[str | None]]], load: Load) -> dict[str, float]:
    """The best of the rounds, in which all take turns."""
    best = dict.fromkeys(engines, float("inf"))
    for number in range(_ROUNDS + 1):  # the first one warms up
        for name, (engine, users) in engines.items():
            found = milliseconds_per_step(engine, load, users)
            best[name] = min(best[name], found) if number else best[name]
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny-moe")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--answer", type=int, default=48)
    given = parser.parse_args()
    load = Load(given.streams, given.prompt, given.answer)
    # Every round reads its prompts anew: a prefix cache would answer from the second round on.
    options = EngineOptions(max_sequences=load.streams, prefix_cache=False)
    length = load.prompt + load.answer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = initialize(given.shape, folder / "base", given.layers, dtype="float32")
        paths = write_adapters(base, folder, given.rank)
        served = Engine.load(base, max_length=length, options=options)
        export(paths[0], folder / "merged", base)
        merged = Engine.load(folder / "merged", max_length=length, options=options)
        without = Engine.load(base, max_length=length, options=options)
        for path in paths:
            served.adapters.load(path.name, path)
    names: list[str | None] = [path.name for path in paths]
    engines: dict[str, tuple[Engine, list[str | None]]] = {
        "no adapter": (without, [None]),
        "loaded, none used": (served, [None]),
        "one adapter": (served, names[:1]),
        f"{_COUNT} adapters": (served, names),
        "merged": (merged, [None]),
    }
    best = measure(engines, load)
    print(f"{given.shape}, {load.streams} streams of {load.prompt} + {load.answer} tokens, rank {given.rank}")
    for what, value in best.items():
        print(f"{what:20} {value:8.2f} ms of CPU time per step   {value / best['merged']:5.2f} x merged")


if __name__ == "__main__":
    main()
