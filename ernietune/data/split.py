"""Which answers of a conversation are trained together.

A chat format may write an earlier answer otherwise than a generation does, mostly without its thought. Such
a conversation becomes several: each ends where the next user message begins, and trains what was said since
the last one, so that every answer is trained once and as inference conditions it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ernietune.text.messages import Conversation, Message


def last_answer_only(conversation: Conversation) -> Conversation:
    """The conversation with training switched off for all messages but the last."""
    last = len(conversation.messages) - 1
    return _training(conversation, range(last, last + 1))


def exchanges(conversation: Conversation) -> Iterator[Conversation]:
    """One beginning of the conversation for each user message whose answers are trained."""
    users = [index for index, message in enumerate(conversation.messages) if message.role == "user"]
    starts = [0, *users]
    for start, end in zip(starts, [*users, len(conversation.messages)], strict=True):
        answers = [index for index in range(start, end) if _is_trained(conversation.messages[index])]
        if answers:
            yield _beginning(conversation, answers)


def single_answers(conversation: Conversation) -> Iterator[Conversation]:
    """One beginning of the conversation for each trained answer."""
    for index, message in enumerate(conversation.messages):
        if _is_trained(message):
            yield _beginning(conversation, [index])


def _beginning(conversation: Conversation, answers: Sequence[int]) -> Conversation:
    """Up to the last of `answers`, training these only."""
    beginning = replace(conversation, messages=conversation.messages[: answers[-1] + 1])
    return _training(beginning, answers)


def _training(conversation: Conversation, answers: Sequence[int]) -> Conversation:
    messages = [
        message if index in answers else replace(message, trained=False)
        for index, message in enumerate(conversation.messages)
    ]
    return replace(conversation, messages=tuple(messages))


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" and message.trained
