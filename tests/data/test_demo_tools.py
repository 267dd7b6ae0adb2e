"""The generated function-call records are what they claim to be, and pass the whole data path."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ernietune.data.dataset import Encoder, Sample
from ernietune.data.sources import read_records
from ernietune.text.messages import parse_conversation
from ernietune.text.template import Template
from ernietune.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
COUNTS = {"train": 440, "heldout": 70, "test": 200}
Records = dict[str, list[Any]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("tools")
    script = [sys.executable, ROOT / "examples" / "tool_requests.py", "--count", str(COUNTS["train"]), folder]
    subprocess.run(script, check=True, capture_output=True)
    return {name: [record for record, _ in read_records(folder / f"{name}.jsonl")] for name in COUNTS}


def asked(records: list[Any]) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """(request, functions called, parameters of the offered tools by name) of every answer to a user."""
    for record in records:
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in record["tools"]}
        for before, message in zip(record["messages"], record["messages"][1:], strict=False):
            if before["role"] == "user":
                calls = [call["function"] for call in message.get("tool_calls") or []]
                yield before["content"], calls, offered


@pytest.mark.parametrize("name", COUNTS)
def test_every_value_stands_in_the_request_and_every_tool_is_offered(records: Records, name: str) -> None:
    for request, calls, offered in asked(records[name]):
        for call in calls:
            assert list(call["arguments"]) == list(offered[call["name"]]["properties"])
            assert all(str(value) in request for value in call["arguments"].values())


@pytest.mark.parametrize("name", ["heldout", "test"])
def test_held_out_requests_are_new_and_their_calls_known_from_other_wordings(
    records: Records, name: str
) -> None:
    seen, new = (
        {
            (request, json.dumps(call))
            for request, calls, _ in asked(records[part])
            for call in calls
            if len(calls) == 1
        }
        for part in ("train", name)
    )
    assert len(new) > 30
    assert not {request for request, _ in seen} & {request for request, _ in new}
    unknown = {call for _, call in new} - {call for _, call in seen}
    assert len(unknown) < 0.1 * len({call for _, call in new})


def test_all_sorts_of_requests_occur(records: Records) -> None:
    for name, count in COUNTS.items():
        assert len(records[name]) == count
        counts = [len(calls) for _, calls, _ in asked(records[name])]
        assert {0, 1, 2} == set(counts)
        assert counts.count(1) > len(counts) / 2


def test_every_record_can_be_trained(records: Records) -> None:
    tokenizer = Tokenizer.load(ROOT / "data" / "tiny")
    encoder = Encoder(
        Template.for_checkpoint(tokenizer, "ernie4_5_moe_vl"),
        640,
        template_options={"train_all_turns": True},
    )
    for name in COUNTS:
        for number, record in enumerate(records[name]):
            (sample,) = encoder.encode(parse_conversation(record, f"{name}:{number}"), "here")
            assert isinstance(sample, Sample)
            assert sample.untrained_turns == 0
