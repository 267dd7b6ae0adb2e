"""Record forms: recognised by their keys, and turned into conversations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ernietune.data.dialogues import ANSWER_KEYS, QUESTION_KEYS, from_alpaca, from_messages, from_sharegpt
from ernietune.data.erniekit import from_src_tgt, from_text_info
from ernietune.data.sources import Source
from ernietune.errors import DataError
from ernietune.text.fields import Field
from ernietune.text.messages import Conversation

Form = Literal["messages", "erniekit", "alpaca", "sharegpt", "preference"]
PROBED = 100  # records looked at to find a file's form: the first ones may be broken


def to_conversation(record: object, where: str, form: Form | None = None) -> Conversation:
    """Turn a parsed record into a conversation; without `form` the record's own keys decide.

    DataError names `where`, the field and what is wrong with it.
    """
    form = form or form_of(record) or "messages"
    return _CONVERSIONS[form](Field(where, "", record))


def form_of(record: object) -> Form | None:
    """The form whose characteristic keys a record has; None when there are none."""
    if not isinstance(record, dict):
        return None
    keys = set(record)
    if keys & {"text_info", "src"}:
        return "erniekit"
    if keys & {"chosen", "rejected"}:
        return "preference"
    if "conversations" in keys:
        return "sharegpt"
    if "messages" in keys:
        return "messages"
    return "alpaca" if keys & {*QUESTION_KEYS} and keys & {*ANSWER_KEYS} else None


def is_pair(record: object, form: Form) -> bool:
    """Whether a record of a file of this form is a preference pair."""
    is_ranked = form == "erniekit" and isinstance(record, dict) and "response" in record
    return form == "preference" or is_ranked


def form_of_source(source: Source) -> Form:
    """The form of a whole file: that of its first record which has one."""
    for index in range(min(len(source), PROBED)):
        try:
            form = form_of(source.read(index))
        except DataError:
            continue  # whoever reads the record says what is wrong with it
        if form is not None:
            return form
    return "messages"


def _from_erniekit(root: Field) -> Conversation:
    if not isinstance(root.value, dict):
        root.wrong_type("an object")
    if "response" in root.value:
        return _refuse_pair(root)
    return from_text_info(root) if "text_info" in root.value else from_src_tgt(root)


def _refuse_pair(root: Field) -> Conversation:
    root.fail("is a preference pair; train on it with a preference objective, or give conversations")


_CONVERSIONS: dict[Form, Callable[[Field], Conversation]] = {
    "messages": from_messages,
    "erniekit": _from_erniekit,
    "alpaca": from_alpaca,
    "sharegpt": from_sharegpt,
    "preference": _refuse_pair,
}
