"""Preference pairs: one prompt and two answers to it, one better than the other.

The canonical record is our messages form with the two answers beside the prompt:

    {"messages": [..., {"role": "user", ...}], "tools"?: [...],
     "chosen": {"role": "assistant", ...}, "rejected": {"role": "assistant", ...}, "score_gap"?: 1.5}

An answer that is nothing but text may be given as a string.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernietune.errors import DataError
from ernietune.text.fields import Field
from ernietune.text.messages import Conversation, Message, conversation_of


class EqualAnswers(DataError):
    """A pair with the same answer twice: it says nothing about what is better."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with a user or tool message, and two assistant messages that could follow it.

    `score_gap` is by how much the chosen answer was rated better, None when that is not known.
    """

    prompt: Conversation
    chosen: Message
    rejected: Message
    score_gap: float | None = None


def to_pair(record: object, where: str) -> PreferencePair:
    """A parsed record -> a pair; DataError names `where` and the field."""
    root = Field(where, "", record)
    entries = root.entries(("messages", "tools", "chosen", "rejected", "score_gap"))
    messages = root.required(entries, "messages").items()
    tools = entries["tools"].items() if "tools" in entries else []
    answers = {key: _as_message(root.required(entries, key)) for key in ("chosen", "rejected")}
    dialogues = [conversation_of([*messages, answer], tools) for answer in answers.values()]
    prompt = Conversation(dialogues[0].messages[:-1], dialogues[0].tools)
    chosen, rejected = (dialogue.messages[-1] for dialogue in dialogues)
    pair = PreferencePair(prompt, chosen, rejected, _gap(entries))
    return _checked(pair, entries["messages"], answers)


def _as_message(answer: Field) -> Field:
    if not isinstance(answer.value, str):
        return answer
    return Field(answer.where, answer.path, {"role": "assistant", "content": answer.value})


def _gap(entries: dict[str, Field]) -> float | None:
    if "score_gap" not in entries:
        return None
    field = entries["score_gap"]
    value = field.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        field.wrong_type("a number")
    if not 0 < value < float("inf"):
        field.fail(f"is {value}; the chosen answer must be rated better, by a finite number above 0")
    return float(value)


def _checked(pair: PreferencePair, messages: Field, answers: dict[str, Field]) -> PreferencePair:
    if not pair.prompt.messages or pair.prompt.messages[-1].role not in ("user", "tool"):
        messages.fail("must end with a user message, which the two answers reply to")
    for key, message in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if message.role != "assistant":
            answers[key].fail(f"is a message of role {message.role!r}; expected an assistant message")
    if pair.chosen == pair.rejected:
        where = answers["rejected"].where
        raise EqualAnswers(f"{where}: rejected is the same as chosen; a pair needs two different answers")
    return pair
