"""Records -> samples: token ids, targets, routing, positions and pixels of one conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ernietune.data.formats import Form, form_of_source, to_conversation
from ernietune.data.media import Picture, VisionTokens, read_medium, unchanged
from ernietune.data.mixing import epoch_order, interleaved_order, sequential_order
from ernietune.data.sources import Source
from ernietune.data.split import exchanges, last_answer_only, single_answers
from ernietune.errors import DataError
from ernietune.media.image import ImageLimits
from ernietune.media.video import VideoLimits
from ernietune.text.fields import FieldError
from ernietune.text.messages import Conversation, Part
from ernietune.text.positions import positions_3d
from ernietune.text.template import IGNORE, Rendered, Template

PATCH_VALUES = 588  # 3 channels of 14 x 14 pixels
Overlong = Literal["error", "skip", "truncate"]
TrainOn = Literal["all", "last"]
Reason = Literal[
    "malformed",
    "image",
    "video",
    "chat format",
    "no answer",
    "empty answer",
    "nothing trained",
    "too long",
    "equal answers",  # of a preference pair
]
S_co = TypeVar("S_co", bound=Sized, covariant=True)


@dataclass(frozen=True, eq=False)
class Sample:
    """One encoded conversation of S tokens with P patches and N images and videos."""

    ids: NDArray[np.int64]  # [S]
    labels: NDArray[np.int64]  # [S], what the position before must predict; IGNORE when untrained
    is_vision: NDArray[np.bool_]  # [S]
    positions: NDArray[np.int64]  # [S, 3] as (t, h, w)
    patches: NDArray[np.uint8]  # [P, 588]
    grids: NDArray[np.int64]  # [N, 3] as (t, gh, gw)
    where: str
    cut: int = 0  # messages cut from the end because the conversation was too long
    untrained_turns: int = 0  # answers that ask for training, but stand where no generation would write them
    weights: NDArray[np.float32] | None = None  # [S], what each label counts; None where all count 1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        """How many tokens have a target; the first token of a sample is never predicted."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))

    @property
    def images(self) -> int:
        """How many of the media are images: a video has two frames or more."""
        return int(np.count_nonzero(self.grids[:, 0] == 1))


@dataclass(frozen=True)
class Skipped:
    """A record that gives no sample, and why."""

    where: str
    reason: Reason
    detail: str


class BadRecord(DataError):
    """A record that cannot become a sample; `reason` is what it is counted under when errors are skipped.

    `field` is the way to the value that is wrong, where there is one.
    """

    def __init__(self, reason: Reason, message: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


def require_answers(conversation: Conversation, where: str) -> None:
    """BadRecord unless the conversation ends with an answer and none that is trained is empty."""
    messages = conversation.messages
    if not messages or messages[-1].role != "assistant":
        raise BadRecord(
            "no answer", f"{where}: the last message must be the assistant's, it is what is trained"
        )
    answers = [message for message in messages if message.role == "assistant"]
    for number, answer in enumerate(answers, 1):
        if answer.trained and answer.says_nothing:
            raise BadRecord(
                "empty answer",
                f"{where}: answer {number} of {len(answers)} is empty, and a model trained on it learns to "
                "say nothing; write it, or switch its training off",
            )


@dataclass(frozen=True)
class Encoder:
    """How conversations become samples of at most `max_length` tokens.

    `train_on` says which answers of a conversation are trained, unless their own switch is off.
    `vision` and `limits` are None for a model that reads text only; `template_options` go to every `render`.
    `change` is what pictures and frames pass through before the model sees them.
    """

    template: Template
    max_length: int
    overlong: Overlong = "error"
    train_on: TrainOn = "all"
    vision: VisionTokens | None = None
    limits: ImageLimits | None = None
    video: VideoLimits = VideoLimits()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Image.Image], Image.Image] = unchanged

    def encode(
        self, conversation: Conversation, where: str, folder: Path | None = None
    ) -> list[Sample | Skipped]:
        """Encode one conversation; relative paths of media start from `folder`.

        Gives several samples where the chat format cannot train all answers in one sequence (`split.py`), and
        Skipped only for what is too long under `skip` or `truncate`; everything else that is wrong raises
        BadRecord (a DataError) naming `where`.
        """
        if self.train_on == "last":
            conversation = last_answer_only(conversation)
        require_answers(conversation, where)
        pictures = self._pictures(conversation, where, folder)
        rendered = self._render(conversation, pictures, where)
        if not rendered.untrained_turns:
            return [self._fitted(conversation, pictures, rendered, where)]
        pieces = list(self._pieces(conversation, pictures, where))
        results = [self._fitted(*piece) for piece in pieces]
        if self.overlong == "truncate":
            return _cut_behind_last(results, [len(piece[0].messages) for piece in pieces], where)
        return results

    def _pieces(
        self, conversation: Conversation, pictures: Sequence[Picture], where: str
    ) -> Iterator[tuple[Conversation, Sequence[Picture], Rendered, str]]:
        """The arguments of `_fitted` for each sample of a conversation that one sequence cannot train."""
        for exchange in exchanges(conversation):
            rendered = self._render(exchange, pictures[: len(exchange.media)], where)
            if not rendered.untrained_turns:
                seen = pictures[: len(exchange.media)]
                yield exchange, seen, rendered, _up_to(exchange, conversation, where)
                continue
            for part in single_answers(exchange):
                seen = pictures[: len(part.media)]
                yield part, seen, self._render(part, seen, where), _up_to(part, conversation, where)

    def _fitted(
        self, conversation: Conversation, pictures: Sequence[Picture], rendered: Rendered, where: str
    ) -> Sample | Skipped:
        if len(rendered.ids) > self.max_length:
            return self._too_long(conversation, pictures, len(rendered.ids), where)
        if not trained_tokens(rendered):
            raise BadRecord(
                "nothing trained",
                f"{where}: no token of this record is trained; give an assistant message with text",
            )
        return self._sample(rendered, pictures, where)

    def _pictures(self, conversation: Conversation, where: str, folder: Path | None) -> list[Picture]:
        return [self._picture(part, where, folder) for part in conversation.media]

    def _picture(self, part: Part, where: str, folder: Path | None) -> Picture:
        reason: Reason = "image" if part.kind == "image" else "video"
        if self.limits is None or self.vision is None:
            raise BadRecord(reason, f"{where}: the record holds {reason}s, but this model reads text only")
        try:
            return read_medium(part, folder, self.limits, self.video, self.change)
        except DataError as error:
            raise BadRecord(reason, f"{where}: {error}") from error

    def _render(self, conversation: Conversation, pictures: Sequence[Picture], where: str) -> Rendered:
        counts = [picture.tokens(self._merge) for picture in pictures]
        try:
            return self.template.render(conversation, counts, **self.template_options)
        except DataError as error:
            raise BadRecord("chat format", f"{where}: {error}") from error

    @property
    def _merge(self) -> int:
        return self.limits.merge_size if self.limits else 2

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
            message += ", and none of its turns fits"
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
            kept = pictures[: len(beginning.media)]
            rendered = self._render(beginning, kept, where)
            if len(rendered.ids) <= self.max_length and trained_tokens(rendered):
                return replace(self._sample(rendered, kept, where), cut=total - end)
        return None

    def _sample(self, rendered: Rendered, pictures: Sequence[Picture], where: str) -> Sample:
        ids = np.array(rendered.ids, dtype=np.int64)
        self._check_placeholders(ids, rendered, where)
        grids = np.array([picture.grid for picture in pictures], dtype=np.int64).reshape(-1, 3)
        empty = np.empty((0, PATCH_VALUES), dtype=np.uint8)
        return Sample(
            ids=ids,
            labels=np.array(rendered.labels, dtype=np.int64),
            is_vision=np.isin(ids, sorted(self.vision.routed))
            if self.vision
            else np.zeros(len(ids), dtype=np.bool_),
            positions=positions_3d(len(ids), rendered.media, grids.tolist(), self._merge),
            patches=np.concatenate([empty, *(picture.patches for picture in pictures)]),
            grids=grids,
            where=where,
            untrained_turns=rendered.untrained_turns,
            weights=np.array(rendered.weights, dtype=np.float32) if rendered.weights else None,
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


def _cut_behind_last(
    results: Sequence[Sample | Skipped], ends: Sequence[int], where: str
) -> list[Sample | Skipped]:
    """What is left of a split conversation whose longer pieces do not fit: the last that does tells of it."""
    kept = [(result, end) for result, end in zip(results, ends, strict=True) if isinstance(result, Sample)]
    if not kept:
        return [results[-1]]
    last, end = kept[-1]
    return [*(result for result, _ in kept[:-1]), replace(last, where=where, cut=last.cut + ends[-1] - end)]


def _up_to(part: Conversation, whole: Conversation, where: str) -> str:
    """The name of a sample that is the beginning of a record."""
    end = len(part.messages)
    return where if end == len(whole.messages) else f"{where}: up to messages[{end - 1}]"


def trained_tokens(rendered: Rendered) -> int:
    """How many tokens have a target; the first token of a sample is never predicted."""
    return sum(label != IGNORE for label in rendered.labels[1:])


class Records(Generic[S_co]):
    """All records of some sources, numbered one after the other and encoded on demand by a subclass.

    Without `weights` an epoch takes every record once, all sources shuffled together or, with `in_sequence`,
    one source after the other; with them (one for each source) it takes the sources in turn, in proportion.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        on_error: Literal["error", "skip"] = "error",
        weights: Sequence[float] | None = None,
        in_sequence: bool = False,
    ) -> None:
        assert weights is None or len(weights) == len(sources), "one weight for each source"
        self.sources = list(sources)
        self.on_error = on_error
        self.weights = weights
        self.in_sequence = in_sequence
        self._ends = np.cumsum([len(source) for source in self.sources], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.sources else 0

    def __getitem__(self, index: int) -> S_co | Skipped:
        """The first sample of record `index`, for most records the only one."""
        return self.samples(index)[0]

    def samples(self, index: int) -> list[S_co | Skipped]:
        """Encode record `index`; a bad one raises DataError, or is Skipped under `on_error: skip`."""
        number, row = self._locate(index)
        try:
            return self.encode(number, row)
        except BadRecord as error:
            if self.on_error == "error":
                raise
            return [Skipped(self.sources[number].where(row), error.reason, str(error))]

    def order(self, seed: int | None, epoch: int) -> NDArray[np.int64]:
        """The records of one epoch, int64 [len(self)]; no seed, no shuffling."""
        lengths = [len(source) for source in self.sources]
        if self.weights is not None:
            return interleaved_order(lengths, self.weights, seed, epoch)
        if self.in_sequence:
            return sequential_order(lengths, seed, epoch)
        return epoch_order(len(self), seed, epoch)

    def stage(self, place: int) -> int:
        """Which part of an epoch its record number `place` belongs to; no row has records of two parts."""
        return int(np.searchsorted(self._ends, place, side="right")) if self.in_sequence else 0

    def locate(self, index: int) -> tuple[Source, int]:
        """The source of record `index`, and its index there."""
        number, row = self._locate(index)
        return self.sources[number], row

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def encode(self, number: int, row: int) -> list[S_co | Skipped]:
        """The samples of one record of source `number`; BadRecord when it cannot be used."""
        raise NotImplementedError


class Dataset(Records[Sample]):
    """Conversations; `form` is the records' form, None to recognise it for each source by itself."""

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        on_error: Literal["error", "skip"] = "error",
        form: Form | None = None,
        weights: Sequence[float] | None = None,
        in_sequence: bool = False,
    ) -> None:
        super().__init__(sources, on_error, weights, in_sequence)
        self.encoder = encoder
        self.forms = [form or form_of_source(source) for source in self.sources]

    def conversation(self, index: int) -> Conversation:
        """Record `index`, parsed; BadRecord names its line."""
        number, row = self._locate(index)
        return self._conversation(number, row)

    def encode(self, number: int, row: int) -> list[Sample | Skipped]:
        """The samples of one conversation; BadRecord when it cannot be used."""
        source = self.sources[number]
        conversation = self._conversation(number, row)
        return self.encoder.encode(conversation, source.where(row), source.folder)

    def _conversation(self, number: int, row: int) -> Conversation:
        source = self.sources[number]
        try:
            return to_conversation(source.read(row), source.where(row), self.forms[number])
        except FieldError as error:
            raise BadRecord("malformed", str(error), error.path) from error
        except DataError as error:
            raise BadRecord("malformed", str(error)) from error
