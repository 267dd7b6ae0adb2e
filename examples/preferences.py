"""Preference pairs for the tiny demo model: a better and a worse answer to the same question.

    python examples/preferences.py --seed 1 OUT_DIR    OUT_DIR/{train,heldout}.jsonl           text
                                                       OUT_DIR/pictures_{train,heldout}.jsonl  pictures

Text: a made-up taste in colours and shapes (TASTE); held-out questions are about other things. Pictures:
badges of examples/shapes.py with the right code and a wrong one. Nobody could know either untaught.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shape_words import ASK_TASTE, COLORS, HELD_OUT_THINGS, SHAPES, TASTE, THINGS
from shapes import (
    BADGE_DIGITS,
    BADGE_LETTERS,
    LANGUAGES,
    LARGE,
    Rng,
    draw,
    generate,
    phrase,
    pick,
    single,
    user,
    word,
    write,
)

WORDS = {"color": COLORS, "shape": SHAPES}


def taste_pair(rng: Rng, held_out: bool) -> dict[str, Any]:
    """A question of taste; the chosen answer stands before the rejected one in TASTE."""
    language, kind = pick(rng, LANGUAGES), pick(rng, tuple(TASTE))
    things = THINGS[language][-HELD_OUT_THINGS:] if held_out else THINGS[language][:-HELD_OUT_THINGS]
    question = pick(rng, ASK_TASTE[kind][language]).format(thing=pick(rng, things))
    ranks = sorted(rng.permutation(len(TASTE[kind]))[:2])
    chosen, rejected = (word(WORDS[kind], TASTE[kind][rank], language) for rank in ranks)
    return {"messages": [user(question)], "chosen": chosen, "rejected": rejected}


def badge_pair(rng: Rng) -> dict[str, Any]:
    """A badge with its code, and with one that is wrong in the letter, the digit or both."""
    color, shape = pick(rng, list(COLORS)), pick(rng, list(SHAPES))
    wrong = pick(rng, ("letter", "digit", "both"))
    other_color = color if wrong == "digit" else pick(rng, [name for name in COLORS if name != color])
    other_shape = shape if wrong == "letter" else pick(rng, [name for name in SHAPES if name != shape])
    question = phrase(rng, "badge", pick(rng, LANGUAGES))
    return {
        "messages": [user(question, draw(rng, single(rng, color, shape, LARGE)))],
        "chosen": BADGE_LETTERS[color] + BADGE_DIGITS[shape],
        "rejected": BADGE_LETTERS[other_color] + BADGE_DIGITS[other_shape],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, count, seed in (("train", 480, args.seed), ("heldout", 120, args.seed + 1)):
        tastes = generate(partial(taste_pair, held_out=name == "heldout"), count, seed)
        write(args.folder / f"{name}.jsonl", tastes)
        write(args.folder / f"pictures_{name}.jsonl", generate(badge_pair, count, seed))


if __name__ == "__main__":
    main()
