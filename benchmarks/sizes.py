"""Real widths on this machine: make a random checkpoint, train LoRA steps, export, answer once.

    python benchmarks/sizes.py dense     the 0.3B shape: 5 steps of 512 tokens
    python benchmarks/sizes.py vl        two layers of VL-28B-A3B and its vision tower: 1 step, 1 picture

Prints seconds and peak memory of each command. `vl` needs 24 GB of disk and of memory.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the train to the north leaves at ten buy the ticket before you get on please".split()


def run(label: str, *arguments: object) -> None:
    """Run one ernietune command; print its seconds and peak memory, and its output when it fails."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "ernietune", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(f"{label} failed:\n{text}")
    seconds = time.perf_counter() - started
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{label:28} {seconds:7.1f} s  {cpu:7.1f} CPU-s  peak {usage.ru_maxrss / 2**20:6.2f} GiB", flush=True
    )
    for line in text.splitlines():
        if line.startswith("step ") or "merged" in line:
            print("    " + line)


def picture() -> str:
    """A 448 x 448 picture of noise as a data: URI (256 tokens)."""
    pixels = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def records(vision: bool) -> list[dict[str, Any]]:
    """Conversations of random words, with a picture for a vision-language model."""
    random = np.random.default_rng(1)
    content: list[dict[str, Any]] = [{"type": "text", "text": " ".join(random.choice(WORDS, 40))}]
    if vision:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture()}})
    answers = [" ".join(random.choice(WORDS, 100)) for _ in range(20)]
    return [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


def main() -> None:
    """Run one of the two cases."""
    vision = sys.argv[1:] == ["vl"]
    if sys.argv[1:] not in (["vl"], ["dense"]):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data.jsonl"
        data.write_text("\n".join(json.dumps(r) for r in records(vision)) + "\n", encoding="utf-8")
        config = folder / "config.yaml"
        config.write_text(
            f"model: {{path: {folder / 'base'}}}\n"
            f"lora: {{targets: [attention, {'experts' if vision else 'mlp'}]}}\n"
            f"data: {{train: [{data}], max_length: 512}}\n"
            f"train: {{output: {folder / 'run'}, steps: {1 if vision else 5}}}\n"
        )
        shape = ["--shape", "vl-28b-a3b", "--layers", 2] if vision else ["--shape", "0.3b"]
        run("init", "init", folder / "base", *shape)
        run("train", "train", config)
        run("export", "export", folder / "run", "--output", folder / "merged")
        one = folder / "one.jsonl"
        one.write_text(json.dumps(records(vision)[0]) + "\n", encoding="utf-8")
        run("answer (16 tokens)", "eval", folder / "merged", "--data", one, "--max-tokens", 16)


if __name__ == "__main__":
    main()
