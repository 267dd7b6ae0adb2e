from __future__ import annotations

from typing import Any

import pytest

from ernietune.data.preference import to_pair
from ernietune.errors import DataError
from ernietune.text.messages import Part

USER = {"role": "user", "content": "Which one?"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_the_canonical_record() -> None:
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    prompt = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [image, {"type": "text", "text": "Q"}]},
    ]
    pair = to_pair(
        {"messages": prompt, "chosen": said("<think>\nr\n</think>\nyes"), "rejected": said("no")}, "f:1"
    )
    assert [message.role for message in pair.prompt.messages] == ["system", "user"]
    assert pair.prompt.images == ["a.png"]
    assert (pair.chosen.reasoning, pair.chosen.text, pair.rejected.parts) == (
        "r",
        "yes",
        (Part("text", "no"),),
    )


def pair_of(messages: list[Any], chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"messages": messages, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": [USER], "chosen": said("a")}, "f:7: has no 'rejected'"),
        (
            {"messages": [USER], "chosen": said("a"), "rejected": said("a")},
            "f:7: rejected is the same as chosen",
        ),
        ({"messages": [USER], "chosen": "a", "rejected": "b", "extra": 1}, "unknown key 'extra'"),
        (
            {"messages": [USER], "chosen": said("a"), "rejected": USER},
            "f:7: rejected is a message of role 'user'",
        ),
        (
            {"messages": [USER, said("x")], "chosen": said("a"), "rejected": said("b")},
            "f:7: the prompt must end",
        ),
        (pair_of([], said("a"), said("b")), "f:7: messages is empty"),
        (pair_of([USER], said("a"), {"role": "assistant"}), "f:7: rejected is an"),
    ],
)
def test_a_bad_pair_names_line_and_field(record: object, problem: str) -> None:
    with pytest.raises(DataError) as error:
        to_pair(record, "f:7")
    assert problem in str(error.value)
