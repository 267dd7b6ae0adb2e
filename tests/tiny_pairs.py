"""Preference pairs for tests: random ids with and without pictures, and a small file of them."""

from __future__ import annotations

import json

import numpy as np
import small_run
import tiny

from ernietune.data.dataset import Sample
from ernietune.data.pairs import Pair
from ernietune.text.template import IGNORE


def pair_of(layout, chosen, rejected, grids=(), seed=0):
    """A pair with random ids: a prompt as in `tiny.document`, ending in text, with two answers."""
    generator = np.random.default_rng([seed, 1])
    prompt, _ = tiny.document(layout, grids, seed)
    patches = [generator.integers(0, 256, (np.prod(grid), 588), dtype=np.uint8) for grid in grids]

    def answered(count):
        answer = generator.integers(10, 200, count)
        _, positions = tiny.document([*layout, count], grids, seed)
        ids = np.concatenate([prompt, answer])
        return Sample(
            ids=ids,
            # The label of the turn end differs from its token.
            labels=np.concatenate([np.full(len(prompt), IGNORE), answer[:-1], [2]]),
            is_vision=np.isin(ids, list(tiny.TOKENS.values())),
            positions=positions,
            patches=np.concatenate([np.empty((0, 588), np.uint8), *patches]),
            grids=np.array(grids, dtype=np.int64).reshape(-1, 3),
            where=f"pair {seed}",
        )

    return Pair(answered(chosen), answered(rejected), len(prompt))


TEXT = [pair_of([7], 5, 6, seed=1), pair_of([3], 1, 4, seed=2), pair_of([140], 30, 20, seed=3)]
PICTURES = [
    pair_of([2, "image", 3], 4, 6, [(1, 4, 6)], seed=4),
    pair_of([5], 3, 2, seed=5),
    pair_of(["image", 2, "image", 1], 2, 5, [(1, 4, 4), (1, 2, 6)], seed=6),
]


def write(folder, count=6, pictures=True):
    """A JSONL file of some pairs, every second one with a picture: short answers are chosen."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        picture = pictures and number % 2 == 0
        prompt, answer = small_run.conversation(folder, number, picture=picture)["messages"]
        short = answer["content"].split()[0]
        records.append({"messages": [prompt], "chosen": short, "rejected": answer["content"] + " fence"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
