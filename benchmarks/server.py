"""What the HTTP server costs over the engine: the same streams through the API and without it.

python benchmarks/server.py                                      a random tiny MoE: next to no work a step
python benchmarks/server.py --shape 0.3b --quantization wint8    a step that takes a realistic time

Both ways run in this process, over one engine, in turn; a process of its own plays the clients, which read
server-sent events over connections of their own. CPU-seconds are this process's, so those of the server and
the engine; the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

PROMPT = 16


@dataclass(frozen=True)
class Work:
    """So many prompts of PROMPT tokens and their answers."""

    streams: int
    answer: int
    words: int

    def prompts(self) -> list[list[int]]:
        """The same ordinary tokens on every call."""
        generator = np.random.default_rng(0)
        return generator.integers(300, self.words, (self.streams, PROMPT)).tolist()


@dataclass(frozen=True)
class Cost:
    """Seconds of one way."""

    wall: float
    cpu: float

    def least(self, other: Cost) -> Cost:
        """The better of two in each respect."""
        return Cost(min(self.wall, other.wall), min(self.cpu, other.cpu))


# The clients: a process that asks whenever a line with an address comes in.


def clients(work: Work) -> None:
    """For each address on the standard input: ask everything at once, answer with the number of tokens."""
    for line in sys.stdin:
        parts = urlsplit(line.strip())
        assert parts.hostname is not None
        with ThreadPoolExecutor(work.streams) as pool:
            tasks = [
                pool.submit(read, parts.hostname, parts.port, ids, work.answer) for ids in work.prompts()
            ]
            print(sum(task.result() for task in tasks), flush=True)


def read(host: str, port: int | None, ids: list[int], answer: int) -> int:
    """Tokens of one streamed answer."""
    connection = http.client.HTTPConnection(host, port)
    body = {"prompt": ids, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    events = [line[6:] for line in response if line.startswith(b"data: {")]
    connection.close()
    return int(json.loads(events[-1])["usage"]["completion_tokens"])


# The server and the engine.


def measured(run: Callable[[], int], expected: int) -> Cost:
    """What one call of `run` takes; it has to give so many tokens."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    cost = Cost(time.perf_counter() - wall, time.process_time() - cpu)
    assert tokens == expected, (tokens, expected)
    return cost


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; otherwise one is made")
    parser.add_argument("--shape", default="tiny-moe", help="the random model, where no folder is given")
    parser.add_argument("--quantization", help="wint8, wint4 or mixed")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.words:
        clients(Work(given.streams, given.answer, given.words))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if given.model is None:
            from ernietune.initialize import initialize

            given.model = initialize(given.shape, Path(scratch) / given.shape)
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Both ways in turn, and the table."""
    import uvicorn

    from ernietune.infer.engine import Engine
    from ernietune.infer.options import EngineOptions
    from ernietune.infer.precision import Precision
    from ernietune.infer.request import SamplingParams
    from ernietune.serve.api import create_app
    from ernietune.serve.options import Settings
    from ernietune.serve.sockets import address, listen

    options = EngineOptions(max_sequences=given.streams, prefix_cache=False)
    engine = Engine.load(
        given.model, max_length=512, options=options, precision=Precision(quantization=given.quantization)
    )
    work = Work(given.streams, given.answer, min(1000, engine.model.config.vocab_size))
    params = SamplingParams(temperature=0.0, max_tokens=work.answer, ignore_eos=True)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(engine, Settings("m")), log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    asking = [sys.executable, __file__, "--words", str(work.words)]
    asking += ["--streams", str(work.streams), "--answer", str(work.answer)]
    process = subprocess.Popen(asking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def over_http() -> int:
        assert process.stdin is not None
        assert process.stdout is not None
        print(address("127.0.0.1", listener), file=process.stdin, flush=True)
        return int(process.stdout.readline())

    def direct() -> int:
        with ThreadPoolExecutor(work.streams) as pool:
            requests = [engine.prepare_ids(ids) for ids in work.prompts()]
            return sum(len(a.ids) for a in pool.map(lambda r: engine.generate(r, params), requests))

    tokens = work.streams * work.answer
    best: dict[str, Cost] = {}
    for number in range(given.rounds + 1):
        for name, run in (("engine", direct), ("server", over_http)):
            cost = measured(run, tokens)
            if number:  # the first round warms up
                best[name] = cost.least(best.get(name, cost))
                print(f"# {name}: {cost.cpu:.2f} s of CPU, {cost.wall:.2f} s", flush=True)
    process.communicate()
    server.should_exit = True
    thread.join()
    engine.close()
    show(best, given, tokens)


def show(best: dict[str, Cost], given: argparse.Namespace, tokens: int) -> None:
    """The table."""
    name = f"{given.model.name} {given.quantization or ''}".strip()
    print(f"{name}: {given.streams} streams of {PROMPT} + {given.answer} tokens, best of {given.rounds}")
    for way, cost in best.items():
        print(f"{way:8s}{cost.cpu:8.2f} s of CPU {cost.wall:8.2f} s {tokens / cost.wall:8.1f} tokens/s")
    engine, server = best["engine"], best["server"]
    print(f"server over engine: CPU {server.cpu / engine.cpu:.3f} x, wall {server.wall / engine.wall:.3f} x")


if __name__ == "__main__":
    main()
