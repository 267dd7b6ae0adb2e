"""Real widths on this machine: make a random checkpoint, train LoRA steps, export, answer once.

    python benchmarks/sizes.py dense     the 0.3B shape: 5 steps of 512 tokens
    python benchmarks/sizes.py vl        two layers of VL-28B-A3B and its vision tower: 1 step, 1 picture
    python benchmarks/sizes.py quantized-vl [FORM]    four layers of VL-28B-A3B, base in wint8: 2 steps
    python benchmarks/sizes.py quantized-300b [FORM]  dense and expert layer of 300B-A47B, in mixed: 2 steps
    python benchmarks/sizes.py load      a 20 GB checkpoint, 13 layers of 21B-A3B, into a wint4 base

Prints seconds and peak memory of each command; of the quantized ones how far the process grows, at most,
while it loads and trains, beside what `ernietune estimate` says. `vl` needs 24 GB of disk and memory,
quantized-300b 17 GB of disk and 10 of memory; the checkpoint of `load` is of zeros, in sparse files that take
no disk.
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
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=_environment()
        )
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
        if (
            line.startswith(("step ", "memory before", "(base", "the frozen base", "estimate"))
            or "merged" in line
        ):
            print("    " + line)


def _environment() -> dict[str, str]:
    """This checkout's packages, and lines that are not broken."""
    return os.environ | {"COLUMNS": "200", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


# Freed memory goes back to the system; a training otherwise keeps it (ernietune/environment.py). So what is
# resident is what is in use. The other variables are those that `import ernietune` sets.
_GIVING_BACK = {
    "ERNIETUNE_KEEP_ENV": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "FLAGS_use_stride_kernel": "0",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
    "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS", str(os.cpu_count())),
}


def picture() -> str:
    """A 448 x 448 picture of noise as a data: URI (256 tokens)."""
    pixels = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def records(vision: bool, words: int = 100) -> list[dict[str, Any]]:
    """Conversations, answers of `words` random words, with a picture for a vision-language model."""
    random = np.random.default_rng(1)
    content: list[dict[str, Any]] = [{"type": "text", "text": " ".join(random.choice(WORDS, 40))}]
    if vision:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture()}})
    answers = [" ".join(random.choice(WORDS, words)) for _ in range(20)]
    return [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


ROW = 512  # tokens; half of it is the picture
# Case -> the shape, its layers, where its experts begin, and the form of the base.
QUANTIZED = {
    "quantized-vl": ("vl-28b-a3b", 4, [1, 1], "wint8"),
    "quantized-300b": ("300b-a47b", 2, 1, "mixed"),
}


def quantized(case: str, form: str) -> None:
    """Write a checkpoint and train two steps of a full row over it: the peak beside the estimate's."""
    from ernietune.initialize import initialize
    from ernietune.models.config import SHAPES

    shape, layers, first, _ = QUANTIZED[case]
    SHAPES[case] = SHAPES[shape] | {"moe_layer_start_index": first}  # 300B has three dense layers before them
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        initialize(case, folder / "base", layers, max_shard_bytes=5 << 30)
        written = sum(file.stat().st_size for file in folder.glob("base/*.safetensors"))
        print(f"{written / 1e9:.1f} GB written in {time.perf_counter() - started:.0f} s", flush=True)
        data, config = folder / "data.jsonl", folder / "config.yaml"
        one = records(vision := case == "quantized-vl", 118 if vision else 285)[0]  # nearly a row
        data.write_text(json.dumps(one) + "\n", encoding="utf-8")
        config.write_text(
            f"model: {{path: {folder / 'base'}, quantization: {form}}}\n"
            f"data: {{train: [{data}], max_length: {ROW}, workers: 0}}\n"
            f"train: {{output: {folder / 'run'}, steps: 2}}\n"
        )
        command = [sys.executable, __file__, "--measured", config]
        subprocess.run(command, cwd=ROOT, env=_environment() | _GIVING_BACK, check=True)


def measured(config_file: str) -> None:
    """Train in this process: what its memory grew by, at most, beside the estimate of the configuration.

    The estimate is of a step that is not the first. Linux counts a process's fullest moment since its start.
    """
    from ernietune import config as configuration
    from ernietune.estimate.report import estimate
    from ernietune.models.config import ModelConfig
    from ernietune.train import memory, run

    config = configuration.load(config_file)
    predicted = estimate(memory.settled(config, ModelConfig.from_folder(config.model.path)))
    before, started = _resident("VmRSS"), time.process_time()
    run.main(config)
    grown = _resident("VmHWM") - before
    log = (Path(config.train.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    print(f"a row of {json.loads(log[0])['tokens']} tokens of {ROW}")
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in predicted.peak.parts.items() if size)
    print(f"two steps with loading {time.process_time() - started:.1f} CPU-s; predicted: {parts}")
    print(
        f"predicted {predicted.needed / 2**30:.2f} GiB, measured {grown / 2**30:.2f} GiB beside "
        f"{before / 2**30:.2f} of Python: {predicted.needed / grown:.3f}"
    )


def _resident(kind: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def sparse_checkpoint(folder: Path, layers: int) -> int:
    """Shards of zeros that take no disk; the bytes that they stand for."""
    from ernietune.checkpoint.names import layout_named, table
    from ernietune.checkpoint.safetensors import TensorInfo, write_json
    from ernietune.initialize import shape_config
    from ernietune.models.config import ModelConfig

    raw = shape_config("21b-a3b", layers)
    write_json(folder / "config.json", raw)
    entries = table(ModelConfig.from_dict(raw, "21b"), layout_named("pt")).values()
    infos = [TensorInfo(e.name, "F32" if e.keep_fp32 else "BF16", e.shape) for e in entries if not e.optional]
    total, places = 0, {}
    for shard, first in enumerate(range(0, len(infos), 400)):
        header, end = {}, 0
        for info in infos[first : first + 400]:
            offsets = [end, end := end + info.nbytes]
            header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
            places[info.name] = f"model-{shard}.safetensors"
        text = json.dumps(header).encode()
        with open(folder / f"model-{shard}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return total


_LOAD = """
import resource, sys
from ernietune.checkpoint.packed import load_packed
from ernietune.checkpoint.safetensors import Reader
from ernietune.models.config import ModelConfig
from ernietune.models.forms import TRAINING
from ernietune.models.packed import stored_bytes
from ernietune_kernels.cpu.library import kernels

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

kernels()
before, folder = peak(), sys.argv[1]
model, _ = load_packed(folder, TRAINING["wint4"], ModelConfig.from_folder(folder))
held, largest = stored_bytes(model), max(info.nbytes for info in Reader(folder).infos)
extra = peak() - before - held
print(f"held {held / 1e9:.2f} GB, peak beyond that {extra / 1e9:.2f} GB: "
      f"{extra / largest:.2f} x the largest tensor ({largest / 1e9:.2f} GB)")
"""


def load() -> None:
    """Load a large checkpoint into codes: memory beyond what stays."""
    with tempfile.TemporaryDirectory() as name:
        total = sparse_checkpoint(Path(name), 13)
        shards = len(list(Path(name).glob("*.safetensors")))
        print(f"{total / 1e9:.1f} GB in {shards} shards", flush=True)
        subprocess.run([sys.executable, "-c", _LOAD, name], env=_environment(), check=True)


def main() -> None:
    """Run one of the cases."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    case, *form = sys.argv[1:] or [""]
    if case == "--measured":
        measured(*form)
    elif case in QUANTIZED:
        quantized(case, *form or [QUANTIZED[case][3]])
    elif case == "load":
        load()
    else:
        plain()


def plain() -> None:
    """Run one of the two cases without codes."""
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
