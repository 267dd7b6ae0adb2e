"""Records -> samples: token ids, targets, routing, positions and pixels of one conversation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ernietune.data.formats import Source, to_conversation
from ernietune.errors import DataError
from ernietune.media.image import ImageLimits, image_to_patches, open_image
from ernietune.text.messages import Conversation
from ernietune.text.positions import media_tokens, positions_3d
from ernietune.text.template import IGNORE, Rendered, Template

PATCH_VALUES = 588  # 3 channels of 14 x 14 pixels
Overlong = Literal["error", "skip", "truncate"]
Reason = Literal[
    "malformed",
    "image",
    "chat format",
    "no answer",
    "nothing trained",
    "too long",
    "equal answers",  # of a preference pair
    "empty answer",
]
S_co = TypeVar("S_co", bound=Sized, covariant=True)


@dataclass(frozen=True, eq=False)
class Sample:
    """One encoded conversation of S tokens with P patches and N images."""

    ids: NDArray[np.int64]  # [S]
    labels: NDArray[np.int64]  # [S], what the position before must predict; IGNORE when untrained
    is_vision: NDArray[np.bool_]  # [S]
    positions: NDArray[np.int64]  # [S, 3] as (t, h, w)
    patches: NDArray[np.uint8]  # [P, 588]
    grids: NDArray[np.int64]  # [N, 3] as (t, gh, gw)
    where: str
    cut: int = 0  # messages cut from the end because the conversation was too long
    untrained_turns: int = 0  # answers that ask for training, but stand where no generation would write them

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Skipped:
    """A record that gives no sample, and why."""

    where: str
    reason: Reason
    detail: str


class BadRecord(DataError):
    """A record that cannot become a sample; `reason` is what it is counted under when errors are skipped."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class VisionTokens:
    """The token ids of pictures: the placeholder, and all ids (with start and end) of the vision experts."""

    placeholder: int
    routed: frozenset[int]


@dataclass(frozen=True)
class Encoder:
    """How conversations become samples of at most `max_length` tokens.

    `vision` and `limits` are None for a model that reads text only; `template_options` go to every `render`.
    """

    template: Template
    max_length: int
    overlong: Overlong = "error"
    vision: VisionTokens | None = None
    limits: ImageLimits | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, conversation: Conversation, where: str, folder: Path | None = None) -> Sample | Skipped:
        """Encode one conversation; relative image paths start from `folder`.

        Returns Skipped only for a conversation that is too long under `skip` or `truncate`; everything else
        that is wrong with it raises BadRecord (a DataError) naming `where`.
        """
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            raise BadRecord(
                "no answer", f"{where}: the last message must be the assistant's, it is what is trained"
            )
        pictures = self._pictures(conversation, where, folder)
        rendered = self._render(conversation, pictures, where)
        if len(rendered.ids) > self.max_length:
            return self._too_long(conversation, pictures, len(rendered.ids), where)
        if not trained_tokens(rendered):
            raise BadRecord(
                "nothing trained",
                f"{where}: no token of this record is trained; give an assistant message with text",
            )
        return self._sample(rendered, pictures, where)

    def _pictures(self, conversation: Conversation, where: str, folder: Path | None) -> list[Picture]:
        if not conversation.images:
            return []
        if self.limits is None or self.vision is None:
            raise BadRecord("image", f"{where}: the record holds images, but this model reads text only")
        try:
            return [
                Picture(*image_to_patches(open_image(url, folder), self.limits))
                for url in conversation.images
            ]
        except DataError as error:
            raise BadRecord("image", f"{where}: {error}") from error

    def _render(self, conversation: Conversation, pictures: Sequence[Picture], where: str) -> Rendered:
        counts = [self._tokens(picture) for picture in pictures]
        try:
            return self.template.render(conversation, counts, **self.template_options)
        except DataError as error:
            raise BadRecord("chat format", f"{where}: {error}") from error

    def _tokens(self, picture: Picture) -> int:
        assert self.limits is not None
        return media_tokens(picture.grid, self.limits.merge_size)

    def _too_long(
        self, conversation: Conversation, pictures: Sequence[Picture], length: int, where: str
    ) -> Sample | Skipped:
        message = f"{where}: {length} tokens are more than max_length {self.max_length}"
        if self.overlong == "error":
            raise BadRecord("too long", f"{message}; raise it, or set overlong to skip or truncate")
        if self.overlong == "truncate":
            sample = self._truncated(conversation, pictures, where)
            if sample is not None:
                return sample
            message += ", and so is its first turn"
        return Skipped(where, "too long", message)

    def _truncated(
        self, conversation: Conversation, pictures: Sequence[Picture], where: str
    ) -> Sample | None:
        """The longest beginning that ends with an assistant message and fits; None when none does."""
        total = len(conversation.messages)
        for end in range(total - 1, 0, -1):
            if conversation.messages[end - 1].role != "assistant":
                continue
            beginning = replace(conversation, messages=conversation.messages[:end])
            kept = pictures[: len(beginning.images)]
            rendered = self._render(beginning, kept, where)
            if len(rendered.ids) <= self.max_length and trained_tokens(rendered):
                return replace(self._sample(rendered, kept, where), cut=total - end)
        return None

    def _sample(self, rendered: Rendered, pictures: Sequence[Picture], where: str) -> Sample:
        ids = np.array(rendered.ids, dtype=np.int64)
        self._check_placeholders(ids, rendered, where)
        grids = np.array([picture.grid for picture in pictures], dtype=np.int64).reshape(-1, 3)
        merge = self.limits.merge_size if self.limits else 2
        empty = np.empty((0, PATCH_VALUES), dtype=np.uint8)
        return Sample(
            ids=ids,
            labels=np.array(rendered.labels, dtype=np.int64),
            is_vision=np.isin(ids, sorted(self.vision.routed))
            if self.vision
            else np.zeros(len(ids), dtype=np.bool_),
            positions=positions_3d(len(ids), rendered.media, grids.tolist(), merge),
            patches=np.concatenate([empty, *(picture.patches for picture in pictures)]),
            grids=grids,
            where=where,
            untrained_turns=rendered.untrained_turns,
        )

    def _check_placeholders(self, ids: NDArray[np.int64], rendered: Rendered, where: str) -> None:
        """The model puts pixels wherever the placeholder stands: that must be the media slots, no more."""
        if self.vision is None:
            return
        expected = np.zeros(len(ids), dtype=np.bool_)
        for first, count in rendered.media:
            expected[first : first + count] = True
        found = ids == self.vision.placeholder
        if not np.array_equal(found, expected):
            raise BadRecord(
                "image",
                f"{where}: {int(found.sum())} image placeholders for pictures of {int(expected.sum())}; "
                "the text or the chat template writes placeholders of its own",
            )


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image: patches uint8 [P, 588] and its patch grid (t, gh, gw)."""

    patches: NDArray[np.uint8]
    grid: tuple[int, int, int]


def trained_tokens(rendered: Rendered) -> int:
    """How many tokens have a target; the first token of a sample is never predicted."""
    return sum(label != IGNORE for label in rendered.labels[1:])


class Records(Generic[S_co]):
    """All records of some sources, one after the other, encoded on demand by `encode` of a subclass."""

    def __init__(self, sources: Sequence[Source], on_error: Literal["error", "skip"] = "error") -> None:
        self.sources = list(sources)
        self.on_error = on_error
        self._ends = np.cumsum([len(source) for source in self.sources], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.sources else 0

    def __getitem__(self, index: int) -> S_co | Skipped:
        """Encode record `index`; a bad one raises DataError, or is Skipped under `on_error: skip`."""
        source, row = self.locate(index)
        try:
            return self.encode(source, row)
        except BadRecord as error:
            if self.on_error == "error":
                raise
            return Skipped(source.where(row), error.reason, str(error))

    def locate(self, index: int) -> tuple[Source, int]:
        """The source of record `index`, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return self.sources[number], index - first

    def encode(self, source: Source, row: int) -> S_co | Skipped:
        """One record of a source; BadRecord when it cannot be used."""
        raise NotImplementedError


class Dataset(Records[Sample]):
    """Conversations."""

    def __init__(
        self, sources: Sequence[Source], encoder: Encoder, on_error: Literal["error", "skip"] = "error"
    ) -> None:
        super().__init__(sources, on_error)
        self.encoder = encoder

    def encode(self, source: Source, row: int) -> Sample | Skipped:
        """One conversation; BadRecord when it cannot be used."""
        where = source.where(row)
        try:
            conversation = to_conversation(source.read(row), where)
        except DataError as error:
            raise BadRecord("malformed", str(error)) from error
        return self.encoder.encode(conversation, where, source.folder)


@dataclass
class DropLog:
    """What is not trained: whole records, the ends of conversations that were cut, single answers."""

    dropped: dict[str, Skipped] = field(default_factory=dict)  # by file:line, so a second epoch adds nothing
    cut: dict[str, int] = field(default_factory=dict)  # file:line -> messages cut
    untrained: dict[str, int] = field(default_factory=dict)  # file:line -> answers that are not trained

    @property
    def counts(self) -> dict[str, int]:
        """Records dropped, by reason."""
        return dict(Counter(entry.reason for entry in self.dropped.values()))

    def note(self, result: object) -> None:
        """Remember a skipped record, a cut one, and one that is trained in part only."""
        if isinstance(result, Skipped):
            self.dropped[result.where] = result
        if not isinstance(result, Sample):
            return
        if result.cut:
            self.cut[result.where] = result.cut
        if result.untrained_turns:
            self.untrained[result.where] = result.untrained_turns

    def write(self, path: str | Path) -> None:
        """Write one JSON line for each record that was dropped, cut or trained in part only."""
        lines: list[dict[str, Any]] = [asdict(entry) for entry in self.dropped.values()]
        lines += [{"where": where, "reason": "cut", "messages": count} for where, count in self.cut.items()]
        lines += [
            {"where": where, "reason": "untrained turns", "turns": count}
            for where, count in self.untrained.items()
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(path).write_text(text, encoding="utf-8")
