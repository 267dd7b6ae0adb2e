"""Requests in words and the function calls they ask for: data for tool calling with the tiny demo model.

    python examples/tool_requests.py OUT_DIR    OUT_DIR/{train,heldout,test}.jsonl

A record offers two of three tools and holds a request for one of them or for both, or one that needs no tool.
The argument values stand in the request: colours and shapes, which are the words that the model can tell
apart (its embeddings of "left" and "right" are nearly one vector). No held-out request is trained on: a
checksum of its words keeps every fourth one, wording and values together, for held-out records. A training
picks its best checkpoint by `heldout`; `test`, drawn the same way, is for measuring it.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shape_words import COLORS, SHAPES, TEXT_PAIRS
from shapes import Rng, generate, pick, write

HELD_OUT = 4  # one of so many requests
Message = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function: the values of its two arguments, and wordings that ask for it."""

    name: str
    values: dict[str, tuple[str, ...]]
    requests: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        """The tool as the OpenAI API has it."""
        properties = {name: {"type": "string"} for name in self.values}
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}

    def request(self, rng: Rng, held_out: bool) -> tuple[str, dict[str, str]]:
        """A wording of the wanted part, and the arguments in it."""
        while True:
            arguments = {name: pick(rng, values) for name, values in self.values.items()}
            text = pick(rng, self.requests).format(**arguments)
            # Not by a count over wordings and values: with the rest of a request the held-out value would be
            # the one that training never shows, and the better a model learnt, the surer it would be wrong.
            if (zlib.crc32(text.encode()) % HELD_OUT == 0) is held_out:
                return text, arguments


VALUES = {"color": tuple(COLORS), "shape": tuple(SHAPES)}
TOOLS = (
    Tool(
        "draw",
        VALUES,
        (
            "Draw a {color} {shape}.",
            "I want a {color} {shape}.",
            "Draw the {shape}, in {color}.",
            "A {shape}, please. The color is {color}.",
        ),
    ),
    Tool(
        "count",
        VALUES,
        (
            "Count the {color} {shape} objects.",
            "How many are {color}, of shape {shape}?",
            "The {shape} objects: how many are {color}?",
            "Count all that is {color} and a {shape}.",
        ),
    ),
    Tool(
        "remove",
        VALUES,
        (
            "Remove the {color} {shape}.",
            "There must be no {color} {shape}.",
            "The {shape} that is {color}: remove it.",
            "Is there a {shape}, a {color} one? Remove it.",
        ),
    ),
)


def tool_record(rng: Rng, held_out: bool) -> dict[str, Any]:
    """Two tools and a request: for one of them, for both, or for none."""
    left_out = pick(rng, TOOLS)
    offered = [tool for tool in TOOLS if tool is not left_out]
    tools = [tool.schema() for tool in offered]
    kind = rng.random()
    if kind < 0.15:
        question, told = pick(rng, TEXT_PAIRS["en"])
        return {"messages": [_user(question), _assistant(told)], "tools": tools}
    used = offered if kind < 0.3 else [pick(rng, offered)]
    asked = [tool.request(rng, held_out) for tool in used]
    functions = [{"name": tool.name, "arguments": own} for tool, (_, own) in zip(used, asked, strict=True)]
    calls = [{"type": "function", "function": function} for function in functions]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    return {"messages": [_user(" ".join(words for words, _ in asked)), answer], "tools": tools}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5000, help="records to train on")
    args = parser.parse_args()
    for place, (name, count) in enumerate({"train": args.count, "heldout": 70, "test": 200}.items()):
        sample = partial(tool_record, held_out=name != "train")
        write(args.folder / f"{name}.jsonl", generate(sample, count, args.seed + place))


if __name__ == "__main__":
    main()
