"""One record of any form, conversation or preference pair, to the samples it gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ernietune.data.dataset import BadRecord, Encoder, Sample, require_answers
from ernietune.data.formats import Form, is_pair, to_conversation
from ernietune.data.media import try_medium
from ernietune.data.preference import PreferencePair, to_pair
from ernietune.data.sources import Source
from ernietune.errors import DataError
from ernietune.text.messages import Conversation


def encode_record(source: Source, row: int, encoder: Encoder | None, form: Form) -> Iterator[Sample]:
    """The samples of a record, none without an encoder; DataError for whatever is wrong with it.

    A preference pair gives the prompt with either answer, chosen first.
    """
    where = source.where(row)
    record = source.read(row)
    if is_pair(record, form):
        conversations = _sides(to_pair(record, where), where)
        encoder = encoder and replace(encoder, train_on="last")
    else:
        conversations = {where: to_conversation(record, where, form)}
    for name, conversation in conversations.items():
        if encoder is None:
            _check_without_model(conversation, name, source.folder)
            continue
        for result in encoder.encode(conversation, name, source.folder):
            if not isinstance(result, Sample):
                raise BadRecord(result.reason, result.detail)
            yield result


def _sides(pair: PreferencePair, where: str) -> dict[str, Conversation]:
    """The two dialogues that a pair stands for, by name."""
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {
        f"{where}: {side}": Conversation((*pair.prompt.messages, answer), pair.prompt.tools)
        for side, answer in answers.items()
    }


def _check_without_model(conversation: Conversation, where: str, folder: Path) -> None:
    """What needs no chat format: an answer at the end that is trained, and media that open."""
    require_answers(conversation, where)
    if not any(message.role == "assistant" and message.trained for message in conversation.messages):
        raise BadRecord("nothing trained", f"{where}: no answer of this record is trained")
    for part in conversation.media:
        try:
            try_medium(part, folder)
        except DataError as error:
            raise BadRecord("image" if part.kind == "image" else "video", f"{where}: {error}") from error
