"""A training run of seconds: a tiny random checkpoint, a few conversations, some with pictures, a Config."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from ernietune.checkpoint.safetensors import Reader
from ernietune.checkpoint.state import TENSORS, checkpoint_in
from ernietune.config import Config, DataSection, LoraSection, ModelSection, TrainSection
from ernietune.initialize import initialize

WORDS = "red green blue circle square left right two dogs sleep in the sun foxes jump over a fence".split()
TARGETS = ["attention", "mlp", "shared_experts", "experts", "vision", "resampler"]


def base(folder, shape="tiny-vl"):
    """A random fp32 checkpoint."""
    return initialize(shape, folder, dtype="float32")


def conversation(folder, number, picture):
    """One record with a random question and answer; its picture, 56 or 84 pixels a side, is written too."""
    random = np.random.default_rng(number)
    question = " ".join(random.choice(WORDS, random.integers(3, 8)))
    answer = " ".join(random.choice(WORDS, random.integers(2, 6)))
    parts = [{"type": "text", "text": question}]
    if picture:
        pixels = random.integers(0, 256, (*random.choice([56, 84], 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"{number}.png"}})
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def write_data(folder, count, pictures=True):
    """A JSONL file of `count` conversations, every second one with a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [conversation(folder, i, pictures and i % 2 == 0) for i in range(count)]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(model, data, output, **changes):
    """A Config of 30 steps on every kind of adapter; `changes` are named section_key."""
    made = Config(
        ModelSection(path=str(model)),
        LoraSection(rank=4, targets=list(TARGETS)),
        DataSection(train=[str(data)], max_length=256, packing=False, workers=0),
        TrainSection(output=str(output), steps=30, learning_rate=1e-3, warmup_steps=3),
    )
    for key, value in changes.items():
        section, _, name = key.partition("_")
        assert name in vars(vars(made)[section]), key
        setattr(vars(made)[section], name, value)
    return made


def log(run, kind="train"):
    """The records of log.jsonl of one kind, as {step: record}; a repeated step must say the same."""
    found = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == kind:
            again = found.setdefault(record["step"], record)
            assert again["loss"] == record["loss"], f"step {record['step']} was not repeated exactly"
    return found


def losses(run):
    """The loss of every step."""
    return np.array([record["loss"] for _, record in sorted(log(run).items())])


def tensors(run):
    """Weights and optimizer state of the newest checkpoint."""
    reader = Reader(checkpoint_in(run, "last") / TENSORS)
    return {info.name: np.array(reader.array(info.name)) for info in reader.infos}
