"""The whole way in one script: measure, fine-tune, measure again, export, serve, ask.

    python examples/demo.py          (or: make demo)

The embedded model knows coloured shapes but not the badge codes of data/badges. LoRA on attention and experts
teaches them; with the pictures greyed out the accuracy falls to chance, so they are really read.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BASE, HELD_OUT = ROOT / "data/tiny", ROOT / "data/badges/heldout.jsonl"
RUN, MERGED = ROOT / "runs/demo", ROOT / "runs/demo-merged"
ERNIETUNE = [sys.executable, "-m", "ernietune"]


def command(*arguments: object) -> float:
    """Run one ernietune command as a user would; return its seconds."""
    started = time.perf_counter()
    print("\n$ ernietune " + " ".join(str(a) for a in arguments), flush=True)
    subprocess.run([*ERNIETUNE, *map(str, arguments)], cwd=ROOT, check=True)
    return time.perf_counter() - started


def accuracy(model: Path, *options: str) -> float:
    """Share of held-out badges that `model` names."""
    report = RUN.with_suffix(".json")
    command("eval", model, "--data", HELD_OUT, "--output", report, *options)
    return float(json.loads(report.read_text(encoding="utf-8"))["accuracy"])


@contextmanager
def server(model: Path) -> Iterator[str]:
    """Serve `model` on a free port while the block runs; gives the base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(f"\n$ ernietune serve {model} --port {port}", flush=True)
    process = subprocess.Popen([*ERNIETUNE, "serve", str(model), "--port", str(port)], cwd=ROOT)
    try:
        for _ in range(300):
            if process.poll() is not None:
                sys.exit(f"the server stopped with code {process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(url: str, messages: list[dict[str, Any]]) -> str:
    """One question through the openai client."""
    client = OpenAI(base_url=url, api_key="none")
    answer = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=8)  # type: ignore[arg-type]
    return answer.choices[0].message.content or ""


def main() -> None:
    """Run everything and print one table."""
    started = time.perf_counter()
    for folder in (RUN, MERGED):
        shutil.rmtree(folder, ignore_errors=True)
    RUN.parent.mkdir(exist_ok=True)
    before = accuracy(BASE)
    seconds = command("train", "configs/tiny/sft_lora.yaml", f"train.output={RUN}")
    after, blank = accuracy(RUN), accuracy(RUN, "--blank-images")
    command("export", RUN, "--output", MERGED)
    merged = accuracy(MERGED)
    *question, expected = json.loads(HELD_OUT.read_text(encoding="utf-8").splitlines()[0])["messages"]
    with server(MERGED) as url:
        answer = ask(url, question)
    table = Table("what", "result", title="ernietune demo: badge codes")
    table.add_row("held-out accuracy before", f"{before:.1%}")
    table.add_row("held-out accuracy after LoRA", f"{after:.1%}")
    table.add_row("... with the pictures greyed out", f"{blank:.1%}")
    table.add_row("... of the merged export", f"{merged:.1%}")
    table.add_row("question through the API", question[-1]["content"][-1]["text"])
    table.add_row("answer / expected", f"{answer} / {expected['content']}")
    table.add_row("seconds of training", f"{seconds:.0f}")
    table.add_row("seconds in all", f"{time.perf_counter() - started:.0f}")
    Console().print(table)
    if before > 0.2 or after < 0.9 or blank > 0.2 or answer != expected["content"]:
        sys.exit("the demo did not reach what it shows on our machines; please open an issue")


if __name__ == "__main__":
    main()
