"""Damaged records of every form: each is used or refused with its line, whatever stands in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ernietune.data.dataset import Encoder, VisionTokens
from ernietune.data.formats import form_of
from ernietune.data.preference import to_pair
from ernietune.data.records import encode_record
from ernietune.data.sources import open_source, read_records
from ernietune.errors import DataError
from ernietune.media.image import ImageLimits
from ernietune.text.messages import parse_conversation
from ernietune.text.template import KINDS, Template
from ernietune.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import write_tokenizer

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
JUNK: list[Any] = [
    *(None, 0, 1, -1, 2.5, True, 10**400, float("nan"), b"x"),
    *("", " ", "x", "<image>", "\ud800", "[1", "{}", "[]"),
    *([], {}, [[]], [{}], ["x"], [None], {"a": 1}, {"type": "text", "text": "q"}),
]
KEYS = "messages src tgt label system images tools role content chosen text_info order".split()


@dataclass(frozen=True)
class One:
    """A source of a single record."""

    record: object
    folder: Path = SAMPLES

    def __len__(self) -> int:
        return 1

    def where(self, index: int) -> str:
        return f"f:{index + 1}"

    def read(self, index: int) -> object:
        return self.record


def places(value: object, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to everything inside of a record."""
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in members:
        yield (*way, key)
        yield from places(item, (*way, key))


def damage(record: Any, random: Random) -> None:
    """Replace, remove or add one thing."""
    ways = list(places(record))
    if not ways:
        return
    *way, last = random.choice(ways)
    owner = record
    for key in way:
        owner = owner[key]
    action = random.random()
    if action < 0.6:
        owner[last] = copy.deepcopy(random.choice(JUNK))
    elif action < 0.8:
        del owner[last]
    elif isinstance(owner, dict):
        owner[random.choice(KEYS)] = copy.deepcopy(random.choice(JUNK))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Encoder | None]:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tiny")))
    ids = [tokenizer.id_of(f"<|IMAGE_{name}|>") for name in ("PLACEHOLDER", "START", "END")]
    vision = VisionTokens(ids[0], frozenset(ids))
    templates = [Template.for_checkpoint(tokenizer, "", kind) for kind in KINDS]
    return [None, *(Encoder(t, 4096, vision=vision, limits=ImageLimits()) for t in templates)]


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.json*")), ids=lambda path: path.name)
def test_nothing_but_data_errors(path: Path, encoders: list[Encoder | None]) -> None:
    random = Random(path.name)
    records = [record for record, _ in read_records(open_source(path).path)]
    complaints = []
    for _ in range(100):
        record = copy.deepcopy(random.choice(records))
        for _ in range(random.randint(1, 2)):
            damage(record, random)
        try:
            list(encode_record(One(record), 0, random.choice(encoders), form_of(record) or "messages"))
        except DataError as error:
            complaints.append(str(error))
    assert len(complaints) > 50
    assert all(text.startswith("f:1: ") for text in complaints)


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": "\\ud800"}', {"a": b"x"}])
def test_arguments_that_are_no_json(arguments: object) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "tool_calls": [call]}
    with pytest.raises(DataError, match=r"r: messages\[0\]\.tool_calls\[0\]\.function\.arguments cannot be"):
        parse_conversation({"messages": [message]}, "r")


def test_a_gap_beyond_all_numbers() -> None:
    record = json.loads('{"prompt": "q", "chosen": "a", "rejected": "b", "score_gap": 1e999}')
    for gap in (record["score_gap"], 10**400, float("nan")):
        with pytest.raises(DataError, match="f:1: score_gap is .* finite number"):
            to_pair({**record, "score_gap": gap}, "f:1")
