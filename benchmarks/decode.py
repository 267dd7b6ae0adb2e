"""Speed of one stream on a CPU beside transformers and llama.cpp: decode at batch 1, prefill of 256 tokens.

python benchmarks/decode.py                                    the 0.3B shape, random weights
python benchmarks/decode.py --shape 21b-a3b --layers 4         a mixture of experts
python benchmarks/decode.py --llama VENV/bin/python    with llama.cpp (pip install llama-cpp-python gguf)
python benchmarks/decode.py --threads 2                prefill and decode on two threads

Parts that take less than ten minutes each on a quiet machine: `--shape 0.3b` and `--shape 21b-a3b --layers
4`, each with --threads 1 and --threads 2. Where llama.cpp's AMX products crash, give a build without them.

Every engine runs in a process of its own. A round measures each of them once; the best of the rounds counts.
Decode is set in proportion to the memory rate: bytes of weights read per second over what a loop that only
reads reaches on the same threads. With --threads 1 all times are CPU-seconds, which others on the machine
stretch less than those of the wall clock; with more threads they are wall-clock seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, ANSWER = 256, 32
OURS = ("float32", "bfloat16", "wint8", "wint4")
TRANSFORMERS = ("bfloat16", "float32")
LLAMA = ("f16", "q8_0", "q4_0")
RIVAL = {"bfloat16": "f16", "wint8": "q8_0", "wint4": "q4_0"}


def prompt_ids() -> list[int]:
    """The same ordinary tokens for everybody."""
    return np.random.default_rng(0).integers(300, 600, PROMPT).tolist()


# Workers: one JSON line in (a form), one out.


def clock() -> float:
    """Seconds of CPU where there is one thread, of the wall clock otherwise."""
    return time.process_time() if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter()


def work(kind: str, folder: Path) -> None:
    """Answer requests until the input ends."""
    measure = {"ernietune": ernietune, "transformers": transformers, "llama": llama}[kind]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not disturb the protocol
    for line in sys.stdin:
        print(json.dumps(measure(folder, line.strip())), file=answers, flush=True)


def ernietune(folder: Path, form: str) -> dict[str, float]:
    """Seconds of prefill and of one decode step, and what a step reads."""
    from ernietune.infer.engine import Engine
    from ernietune.infer.options import EngineOptions
    from ernietune.infer.precision import Precision
    from ernietune.infer.request import SamplingParams

    if form == "memory":
        return {"rate": memory_rate()}
    precision = Precision(quantization=form) if form.startswith("wint") else Precision(form)
    started = clock()
    engine = Engine.load(
        folder, max_length=512, options=EngineOptions(prefix_cache=False), precision=precision
    )
    loaded = clock() - started
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER + 1, ignore_eos=True)
    best = {"load": loaded, "prefill": np.inf, "step": np.inf, "bytes": read_per_token(engine)}
    for _ in range(2):
        started = clock()
        times = [clock() for d in engine.stream(engine.prepare_ids(prompt_ids()), params) if d.ids]
        best["prefill"] = min(best["prefill"], times[0] - started)
        best["step"] = min(best["step"], (times[-1] - times[0]) / ANSWER)
    engine.close()
    return best


def read_per_token(engine: Any) -> float:
    """Bytes of weights behind one token: all but the embedding table and the experts not chosen."""
    from ernietune.models.packed import PackedEmbedding, PackedExperts, packed_layers

    model = engine.model
    packed = [layer for _, layer in packed_layers(model)]
    share = model.config.moe_k / model.config.pools[0].count if model.config.pools else 1
    if packed:
        total = sum(
            layer.stored.nbytes * (share if isinstance(layer, PackedExperts) else 1) for layer in packed
        )
        return total - sum(layer.stored.nbytes for layer in packed if isinstance(layer, PackedEmbedding))
    sizes = ((p, 4 * p.size * (share if p.ndim == 3 else 1)) for p in model.parameters())
    return sum(size for _, size in sizes)


def memory_rate() -> float:
    """Bytes per second of a loop that reads 1 GB on all threads."""
    from ernietune_kernels.cpu.library import kernels

    library = kernels()
    if library is None:
        sys.exit("the C kernels are needed to measure the memory rate")
    numbers = np.ones(1 << 28, np.float32)
    seconds = []
    for _ in range(3):
        started = clock()
        library.c.ernie_read(numbers.ctypes.data, numbers.size)
        seconds.append(clock() - started)
    return numbers.nbytes / min(seconds)


def transformers(folder: Path, form: str) -> dict[str, float]:
    """The same of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, form)).eval()
    best = {"prefill": np.inf, "step": np.inf}
    for _ in range(2):
        with torch.inference_mode():
            started = clock()
            out = model(torch.tensor([prompt_ids()]), use_cache=True, logits_to_keep=1)
            first = clock()
            for _ in range(ANSWER):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            ended = clock()
        best["prefill"] = min(best["prefill"], first - started)
        best["step"] = min(best["step"], (ended - first) / ANSWER)
    return best


def llama(folder: Path, form: str) -> dict[str, float]:
    """The same of llama.cpp; tokens are given, not drawn."""
    import llama_cpp as c
    from gguf_files import gguf_file

    path = gguf_file(folder, form)
    threads = int(os.environ["OMP_NUM_THREADS"])
    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    settings = c.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 512, 512, 512
    settings.n_threads = settings.n_threads_batch = threads
    context = c.llama_init_from_model(model, settings)
    best = {"prefill": np.inf, "step": np.inf}
    ids = (c.llama_token * PROMPT)(*prompt_ids())
    for _ in range(2):
        c.llama_memory_clear(c.llama_get_memory(context), True)
        started = clock()
        assert c.llama_decode(context, c.llama_batch_get_one(ids, PROMPT)) == 0
        c.llama_synchronize(context)
        first = clock()
        for i in range(ANSWER):
            one = (c.llama_token * 1)(400 + i)
            assert c.llama_decode(context, c.llama_batch_get_one(one, 1)) == 0
            c.llama_synchronize(context)
        ended = clock()
        best["prefill"] = min(best["prefill"], first - started)
        best["step"] = min(best["step"], (ended - first) / ANSWER)
    c.llama_free(context)
    c.llama_model_free(model)
    return best


# The run.


class Worker:
    """A process that measures one engine."""

    def __init__(self, python: str, kind: str, folder: Path, threads: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [python, __file__, "--worker", kind, "--model", str(folder)]
        self.errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up and stop it
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def measure(self, form: str) -> dict[str, float]:
        """One measurement; ends the run when the process fails."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        print(form, file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(f"{form}: {self.errors.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def measured(python: str, kind: str, folder: Path, threads: int, form: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    worker = Worker(python, kind, folder, threads)
    found = worker.measure(form)
    worker.close()
    return found


def run(given: argparse.Namespace, folder: Path) -> None:
    """Measure everything in turn and print the table."""
    plan = [("ernietune", sys.executable, [f for f in OURS if f not in given.skip])]
    if not given.no_transformers:
        plan.append(("transformers", sys.executable, [f for f in TRANSFORMERS if f not in given.skip]))
    if given.llama:
        plan.append(("llama", given.llama, [f for f in LLAMA if f not in given.skip]))
    else:
        print(
            "llama.cpp is left out: give --llama the python of an environment with llama-cpp-python and gguf"
        )
    best: dict[tuple[str, str], dict[str, float]] = {}
    rate = 0.0
    for _ in range(given.rounds):
        for kind, python, forms in plan:
            if kind == "ernietune":
                rate = max(rate, measured(python, kind, folder, given.threads, "memory")["rate"])
            for form in forms:
                found = measured(python, kind, folder, given.threads, form)
                held = best.setdefault((kind, form), found)
                best[kind, form] = {key: min(value, held[key]) for key, value in found.items()}
                step, prefill = 1e3 * found["step"], 1e3 * found["prefill"]
                print(f"# {kind} {form}: {step:.1f} ms a token, prefill {prefill:.0f} ms", flush=True)
    show(best, rate, given, folder)


def show(
    best: dict[tuple[str, str], dict[str, float]], rate: float, given: argparse.Namespace, folder: Path
) -> None:
    """The table, and our figures over the rivals'."""
    print(
        f"{folder.name}, {given.threads} threads, best of {given.rounds}; memory rate {rate / 1e9:.1f} GB/s"
    )
    print(
        f"{'engine':14s}{'weights':10s}{'decode tok/s':>13s}{'of memory rate':>16s}"
        f"{'prefill tok/s':>15s}{'ready s':>9s}"
    )
    for (kind, form), found in best.items():
        share = f"{found['bytes'] / found['step'] / rate:.2f}" if "bytes" in found else ""
        load = f"{found['load']:.1f}" if "load" in found else ""
        decode, prefill = 1 / found["step"], PROMPT / found["prefill"]
        print(f"{kind:14s}{form:10s}{decode:13.1f}{share:>16s}{prefill:15.0f}{load:>9s}")
    rivals = [(f, "llama", r) for f, r in RIVAL.items()] + [(f, "transformers", f) for f in TRANSFORMERS]
    for form, kind, other in rivals:
        ours, theirs = best.get(("ernietune", form)), best.get((kind, other))
        if ours and theirs:
            decode, prefill = theirs["step"] / ours["step"], theirs["prefill"] / ours["prefill"]
            print(f"{form} over {kind} {other}: decode {decode:.2f} x, prefill {prefill:.2f} x")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; otherwise one is made")
    parser.add_argument("--shape", default="0.3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--llama", help="python with llama-cpp-python and gguf")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--skip", nargs="*", default=[], help="forms to leave out, such as float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.model)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if given.model is None:
            from ernietune.initialize import initialize

            given.model = initialize(given.shape, Path(scratch) / given.shape, given.layers)
        run(given, given.model)


if __name__ == "__main__":
    main()
