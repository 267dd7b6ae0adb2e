"""Preference pairs: one prompt and two answers to it, one better than the other.

The canonical record is our messages form with the two answers beside the prompt:

    {"messages": [..., {"role": "user", ...}], "tools"?: [...],
     "chosen": {"role": "assistant", ...}, "rejected": {"role": "assistant", ...}}
"""

from __future__ import annotations

from dataclasses import dataclass

from ernietune.text.fields import Field
from ernietune.text.messages import Conversation, Message, conversation_of


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with a user or tool message, and two assistant messages that could follow it."""

    prompt: Conversation
    chosen: Message
    rejected: Message


def to_pair(record: object, where: str) -> PreferencePair:
    """A parsed record -> a pair; DataError names `where` and the field."""
    root = Field(where, "", record)
    entries = root.entries(("messages", "tools", "chosen", "rejected"))
    messages = root.required(entries, "messages").items()
    tools = entries["tools"].items() if "tools" in entries else []
    answers = {key: root.required(entries, key) for key in ("chosen", "rejected")}
    dialogues = [conversation_of([*messages, answer], tools) for answer in answers.values()]
    prompt = Conversation(dialogues[0].messages[:-1], dialogues[0].tools)
    pair = PreferencePair(prompt, *(dialogue.messages[-1] for dialogue in dialogues))
    return _checked(pair, entries["messages"], answers)


def _checked(pair: PreferencePair, messages: Field, answers: dict[str, Field]) -> PreferencePair:
    if not pair.prompt.messages or pair.prompt.messages[-1].role not in ("user", "tool"):
        messages.fail("must end with a user message, which the two answers reply to")
    for key, message in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if message.role != "assistant":
            answers[key].fail(f"is a message of role {message.role!r}; expected an assistant message")
    if pair.chosen == pair.rejected:
        answers["rejected"].fail("is the same as chosen; a pair needs two different answers")
    return pair
