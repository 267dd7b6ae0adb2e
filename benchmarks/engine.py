"""What batching and the prefix cache are worth: streams side by side, one after another, first tokens.

python benchmarks/engine.py                    a random tiny MoE model
python benchmarks/engine.py --model FOLDER     any model folder, e.g. of `ernietune init --shape`
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np

from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.infer.request import Request, SamplingParams
from ernietune.initialize import initialize


def prompt(engine: Engine, length: int, seed: int) -> Request:
    """Random ordinary tokens."""
    ids = np.random.default_rng(seed).integers(300, engine.model.config.vocab_size, length)
    return engine.prepare_ids(ids.tolist())


def tokens_per_second(engine: Engine, streams: int, at_once: int, length: int, answer: int) -> float:
    """Generated tokens per second of wall time, `at_once` requests at a time."""
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    requests = [prompt(engine, length, 1000 * at_once + seed) for seed in range(streams)]
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda request: engine.generate(request, params), requests))
    return sum(len(a.ids) for a in answers) / (time.perf_counter() - started)


def first_token(engine: Engine, request: Request) -> float:
    """Seconds until the first token is there."""
    started = time.perf_counter()
    with closing(engine.stream(request, SamplingParams(temperature=0.0, ignore_eos=True))) as deltas:
        next(delta for delta in deltas if delta.ids)
    return time.perf_counter() - started


def shared_prefix(engine: Engine, length: int) -> tuple[float, float]:
    """Seconds to the first token of a long prompt, and of another one that differs in its last 16 tokens."""
    ids = prompt(engine, length, 7).ids.tolist()
    cold = first_token(engine, engine.prepare_ids(ids))
    return cold, first_token(engine, engine.prepare_ids(ids[:-16] + ids[-32:-16]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="tiny-moe", help="the random model, where no folder is given")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--prefix", type=int, default=2048)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.model or Path(folder) / "model"
        if given.model is None:
            initialize(given.shape, path)
        options = EngineOptions(max_sequences=given.streams)
        engine = Engine.load(path, max_length=given.prefix + 64, options=options)
    tokens_per_second(engine, 2, 2, given.prompt, 4)  # warm
    shape = (given.streams, given.prompt, given.answer)
    alone = tokens_per_second(engine, shape[0], 1, *shape[1:])
    together = tokens_per_second(engine, shape[0], shape[0], *shape[1:])
    cold, warm = shared_prefix(engine, given.prefix)
    print(f"{given.model or given.shape}: {shape[0]} streams of {shape[1]} + {shape[2]} tokens")
    print(f"one after another            {alone:8.1f} tokens/s")
    print(f"side by side                 {together:8.1f} tokens/s   {together / alone:5.1f} x")
    print(f"first token, {given.prefix} tokens     {1000 * cold:8.1f} ms")
    print(f"first token, shared prefix   {1000 * warm:8.1f} ms         {cold / warm:5.1f} x sooner")


if __name__ == "__main__":
    main()
