"""How long a user waits: the help, the answer to a misspelt key, and the first step of the tiny run.

python benchmarks/startup.py          prints one line each: best of three, and the lines logged before step 1
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERNIETUNE = [sys.executable, "-m", "ernietune"]


def seconds(*arguments: str, code: int = 0) -> tuple[float, str]:
    """Best wall time of three runs of a command, and what it printed."""
    best, text = float("inf"), ""
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([*ERNIETUNE, *arguments], cwd=ROOT, capture_output=True, text=True)
        best = min(best, time.perf_counter() - started)
        assert result.returncode == code, (result.returncode, result.stderr)
        text = result.stdout + result.stderr
    return best, text


def first_step(folder: Path) -> tuple[float, int]:
    """Seconds from the command to the line of step 1 of the tiny LoRA run, and the lines before it."""
    command = [*ERNIETUNE, "train", "configs/tiny/sft_lora.yaml", "train.epochs=null", "train.steps=1"]
    command += ["train.warmup_steps=0", f"train.output={folder}"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines, waited = 0, float("nan")
    for line in process.stdout:
        if line.startswith("step 1 "):
            waited = time.perf_counter() - started
            break
        lines += 1
    process.communicate()
    return waited, lines


def main() -> None:
    """Print the table."""
    print(f"ernietune --help                      {seconds('--help')[0]:6.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text("model:\n  path: data/tiny\nlora:\n  rnk: 8\n")
        waited, text = seconds("train", str(wrong), code=2)
        print(f"misspelt key                          {waited:6.2f} s   {text.strip()}")
        runs = [first_step(Path(folder) / str(i)) for i in range(3)]
    waited, lines = min(runs)
    print(f"tiny run, command to end of step 1    {waited:6.2f} s   {lines} lines before it")


if __name__ == "__main__":
    main()
