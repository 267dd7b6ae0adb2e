"""What batching and the prefix cache are worth: streams side by side, one after another, first tokens.

python benchmarks/engine.py                    a random tiny MoE model
python benchmarks/engine.py --model FOLDER     any model folder, e.g. of `ernietune init --shape`
python benchmarks/engine.py --transformers     beside transformers, which answers one request after another

The ways are measured in turn; the best of the rounds counts. With OMP_NUM_THREADS=1 all times are
CPU-seconds, which others on the machine stretch less than those of the wall clock.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.infer.precision import Precision
from ernietune.infer.request import Request, SamplingParams
from ernietune.initialize import initialize


def clock() -> float:
    """Seconds of CPU where there is one thread for products, of the wall clock otherwise."""
    return time.process_time() if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    """What one call takes."""
    started = clock()
    run()
    return clock() - started


def prompt(words: int, length: int, seed: int) -> list[int]:
    """Random ordinary tokens."""
    return np.random.default_rng(seed).integers(300, words, length).tolist()


def answers(engine: Engine, prompts: list[list[int]], at_once: int, answer: int) -> None:
    """Answer all prompts, `at_once` at a time."""
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    requests = [engine.prepare_ids(ids) for ids in prompts]
    with ThreadPoolExecutor(at_once) as pool:
        said = list(pool.map(lambda request: engine.generate(request, params), requests))
    assert all(len(each.ids) == answer for each in said)


def first_token(engine: Engine, request: Request) -> None:
    """Wait until the first token is there."""
    with closing(engine.stream(request, SamplingParams(temperature=0.0, ignore_eos=True))) as deltas:
        next(delta for delta in deltas if delta.ids)


def shared_prefix(engine: Engine, ids: list[int]) -> tuple[float, float]:
    """Seconds to the first token of a long prompt, and of another one that differs in its last 16 tokens."""
    other = ids[:-16] + ids[-32:-16]
    cold = seconds(lambda: first_token(engine, engine.prepare_ids(ids)))
    return cold, seconds(lambda: first_token(engine, engine.prepare_ids(other)))


def reference(folder: Path) -> Any:
    """The model in transformers, in the type it is stored in."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def reference_answers(model: Any, prompts: list[list[int]], answer: int) -> None:
    """Answer one prompt after the other, greedily."""
    import torch

    for ids in prompts:
        asked = torch.tensor(ids)[None]
        mask = torch.ones_like(asked)
        said = model.generate(
            asked, attention_mask=mask, max_new_tokens=answer, do_sample=False, eos_token_id=None
        )
        assert said.shape[1] == len(ids) + answer


def one_round(given: argparse.Namespace, engine: Engine, theirs: Any, number: int) -> dict[str, float]:
    """Seconds of each way, by name, on prompts that no other round has."""
    words, streams = engine.model.config.vocab_size, given.streams
    first, second = (
        [prompt(words, given.prompt, (2 * number + way) * streams + i) for i in range(streams)]
        for way in (0, 1)
    )
    long = prompt(words, given.prefix, 10**7 + number)
    found = {
        "alone": seconds(lambda: answers(engine, first, 1, given.answer)),
        "together": seconds(lambda: answers(engine, second, streams, given.answer)),
    }
    found["cold"], found["shared"] = shared_prefix(engine, long)
    if theirs is not None:
        found["theirs"] = seconds(lambda: reference_answers(theirs, first, given.answer))
        found["their first"] = seconds(lambda: reference_answers(theirs, [long], 1))
    return found


def measure(given: argparse.Namespace, engine: Engine, theirs: Any) -> dict[str, float]:
    """The least seconds of each way, by name."""
    warm = prompt(engine.model.config.vocab_size, given.prompt, 10**6)
    answers(engine, [warm] * 2, 2, 4)
    best: dict[str, float] = {}
    for number in range(given.rounds):
        found = one_round(given, engine, theirs, number)
        best = {name: min(value, best.get(name, value)) for name, value in found.items()}
        print("# " + ", ".join(f"{name} {value:.2f} s" for name, value in found.items()), flush=True)
    return best


def show(best: dict[str, float], given: argparse.Namespace) -> None:
    """The table."""
    tokens = given.streams * given.answer
    name = f"{given.model or given.shape} {given.quantization or ''}".strip()
    print(
        f"{name}: {given.streams} streams of {given.prompt} + {given.answer} tokens, best of {given.rounds}"
    )
    print(f"one after another            {tokens / best['alone']:8.1f} tokens/s")
    together = tokens / best["together"]
    print(
        f"side by side                 {together:8.1f} tokens/s   {best['alone'] / best['together']:5.1f} x"
    )
    if "theirs" in best:
        ratio = best["theirs"] / best["together"]
        print(f"transformers, one by one     {tokens / best['theirs']:8.1f} tokens/s   we: {ratio:5.1f} x")
    cold, shared = best["cold"], best["shared"]
    print(f"first token, {given.prefix} tokens     {1000 * cold:8.1f} ms")
    print(f"first token, shared prefix   {1000 * shared:8.1f} ms         {cold / shared:5.1f} x sooner")
    if "their first" in best:
        theirs = best["their first"]
        print(f"transformers, first token    {1000 * theirs:8.1f} ms         {theirs / shared:5.1f} x later")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="tiny-moe", help="the random model, where no folder is given")
    parser.add_argument("--quantization", help="wint8, wint4 or mixed, for our engine")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.model or initialize(given.shape, Path(folder) / "model")
        options = EngineOptions(max_sequences=given.streams)
        precision = Precision(quantization=given.quantization)
        engine = Engine.load(path, max_length=given.prefix + 64, options=options, precision=precision)
        show(measure(given, engine, reference(path) if given.transformers else None), given)


if __name__ == "__main__":
    main()
