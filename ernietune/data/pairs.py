"""Preference pairs as rows: the prompt once, then both answers, neither of which sees the other.

    [prompt P] [chosen without its last token C-1] [the prompt's last token again] [rejected likewise R-1]

A token of an answer is scored at the position before it. The prompt's last token therefore stands twice:
its original scores the first chosen token and is visible to the chosen answer alone, its copy (same position,
same routing) scores the first rejected token. The positions of the rejected answer continue from the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ernietune.data.collate import Batch
from ernietune.data.dataset import BadRecord, Encoder, Records, Sample, Skipped, trained_tokens
from ernietune.data.media import Picture
from ernietune.data.preference import EqualAnswers, PreferencePair, to_pair
from ernietune.data.sources import Source
from ernietune.errors import DataError
from ernietune.text.fields import FieldError
from ernietune.text.messages import Conversation, Message
from ernietune.text.template import IGNORE, Rendered


@dataclass(frozen=True, eq=False)
class Pair:
    """A prompt with either answer, as two whole samples that share their first `prompt` tokens and pixels."""

    chosen: Sample
    rejected: Sample
    prompt: int
    score_gap: float | None = None
    weight: float = 1.0  # what it counts in the loss
    record: int = 0  # its number in the data set
    reference: tuple[float, float] | None = None  # log-probabilities under the reference, chosen first

    def __len__(self) -> int:
        """Tokens of the pair in a row."""
        return len(self.chosen) - 1 + len(self.rejected) - self.prompt

    @property
    def trained(self) -> int:
        """How many tokens have a target, in both answers."""
        return self.chosen.trained + self.rejected.trained

    @property
    def where(self) -> str:
        """The record's `file:line`."""
        return self.chosen.where

    @property
    def digest(self) -> int:
        """A fingerprint (int64) of all that decides the log-probabilities, pixels included."""
        parts: list[NDArray[Any]] = [
            *(self.chosen.ids, self.chosen.labels, self.chosen.positions, self.chosen.grids),
            *(self.rejected.ids, self.rejected.labels, self.chosen.patches),
        ]
        whole = hashlib.blake2b(digest_size=8)
        for part in parts:
            whole.update(part.tobytes())
        return int.from_bytes(whole.digest(), "little", signed=True)


@dataclass(frozen=True)
class PairEncoder(Encoder):
    """How preference pairs become rows; a pair longer than `max_length` is never cut."""

    ignore_eos: bool = False  # leave the end of the turn out of the log-probabilities
    needs_score_gap: bool = False

    def encode_pair(self, pair: PreferencePair, where: str, folder: Path | None = None) -> Pair | Skipped:
        """Encode one pair; Skipped when it is too long and may be skipped, BadRecord for everything wrong."""
        if self.needs_score_gap and pair.score_gap is None:
            raise BadRecord("malformed", f"{where}: has no 'score_gap', which dpo.offset_alpha needs")
        pictures = self._pictures(pair.prompt, where, folder)
        chosen = self._answered(pair.prompt, pair.chosen, pictures, f"{where}: chosen")
        rejected = self._answered(pair.prompt, pair.rejected, pictures, f"{where}: rejected")
        prompt = _common_prompt(chosen, rejected, where)
        if chosen.ids == rejected.ids:
            raise BadRecord("equal answers", f"{where}: chosen and rejected are the same tokens")
        if self.vision and chosen.ids[prompt - 1] == self.vision.placeholder:
            raise BadRecord("image", f"{where}: the chat format ends the prompt inside a picture")
        better, worse = (self._scored(rendered, pictures, where) for rendered in (chosen, rejected))
        worse = replace(worse, patches=better.patches)
        return self._fitting(Pair(better, worse, prompt, pair.score_gap, pair.weight))

    def _answered(
        self, prompt: Conversation, answer: Message, pictures: Sequence[Picture], where: str
    ) -> Rendered:
        """The prompt with one answer, which alone has labels; what the format writes after it is left out."""
        if answer.weight != 1:
            raise BadRecord("malformed", f"{where} has a weight of its own; give the weight to the record")
        if not answer.trained:
            raise BadRecord("malformed", f"{where} asks not to be trained, but both answers of a pair are")
        if answer.says_nothing:
            raise BadRecord("empty answer", f"{where} is an empty answer")
        asked = (replace(m, trained=False) if m.role == "assistant" else m for m in prompt.messages)
        rendered = self._render(Conversation((*asked, answer), prompt.tools), pictures, where)
        if not trained_tokens(rendered):
            raise BadRecord("nothing trained", f"{where} has no token that the chat format trains")
        end = 1 + max(i for i, label in enumerate(rendered.labels) if label != IGNORE)
        return Rendered(rendered.ids[:end], rendered.labels[:end], rendered.media)

    def _scored(self, rendered: Rendered, pictures: Sequence[Picture], where: str) -> Sample:
        sample = self._sample(rendered, pictures, where)
        if self.ignore_eos:
            sample.labels[-1] = IGNORE
        return sample

    def _fitting(self, pair: Pair) -> Pair | Skipped:
        if len(pair) <= self.max_length:
            return pair
        message = f"{pair.where}: the pair's {len(pair)} tokens are more than max_length {self.max_length}"
        if self.overlong == "skip":
            return Skipped(pair.where, "too long", message)
        raise BadRecord("too long", f"{message}; raise data.max_length, or set data.overlong: skip")


def _common_prompt(chosen: Rendered, rejected: Rendered, where: str) -> int:
    """Tokens before the answers; BadRecord when the chat format does not begin both answers alike."""
    first, other = (_first_label(rendered) for rendered in (chosen, rejected))
    if chosen.ids[:first] != rejected.ids[:other]:
        raise BadRecord(
            "chat format",
            f"{where}: the chat format writes different prompts for chosen and rejected; "
            "give both answers reasoning, or neither",
        )
    return first


def _first_label(rendered: Rendered) -> int:
    return next(i for i, label in enumerate(rendered.labels) if i > 0 and label != IGNORE)


@dataclass(frozen=True, eq=False)
class Reference:
    """Log-probabilities of a data set's pairs under a reference, worked out before the training.

    logps fp32 [records, 2] (chosen, rejected); digests int64 [records], 0 where a record gives no pair.
    """

    logps: NDArray[np.float32]
    digests: NDArray[np.int64]

    def of(self, pair: Pair) -> tuple[float, float]:
        """The two of one pair; DataError when the pair is not what it was then."""
        if self.digests[pair.record] != pair.digest:
            raise DataError(
                f"{pair.where}: the record, its pictures or how they are encoded have changed since the "
                "reference log-probabilities were computed; restore them or choose another train.output"
            )
        chosen, rejected = self.logps[pair.record]
        return float(chosen), float(rejected)


class PairDataset(Records[Pair]):
    """Preference pairs; with a `reference`, each carries its log-probabilities."""

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: PairEncoder,
        on_error: Literal["error", "skip"] = "error",
        weights: Sequence[float] | None = None,
        in_sequence: bool = False,
    ) -> None:
        super().__init__(sources, on_error, weights, in_sequence)
        self.encoder = encoder
        self.reference: Reference | None = None

    def samples(self, index: int) -> list[Pair | Skipped]:
        """Encode record `index`; a bad one raises DataError, or is Skipped under `on_error: skip`."""
        found = super().samples(index)
        return [entry if isinstance(entry, Skipped) else self._numbered(entry, index) for entry in found]

    def _numbered(self, pair: Pair, record: int) -> Pair:
        pair = replace(pair, record=record)
        return pair if self.reference is None else replace(pair, reference=self.reference.of(pair))

    def encode(self, number: int, row: int) -> list[Pair | Skipped]:
        """The pair of one record; BadRecord when it cannot be used."""
        source = self.sources[number]
        where = source.where(row)
        try:
            pair = to_pair(source.read(row), where)
        except EqualAnswers as error:
            raise BadRecord("equal answers", str(error)) from error
        except FieldError as error:
            raise BadRecord("malformed", str(error), error.path) from error
        except DataError as error:
            raise BadRecord("malformed", str(error)) from error
        return [self.encoder.encode_pair(pair, where, source.folder)]


@dataclass(frozen=True, eq=False)
class PairBatch(Batch):
    """One micro-batch of pairs; the labels are those of chosen, rejected, chosen, ..., `lengths` of each."""

    lengths: NDArray[np.int64]  # [pairs, 2], labels of either answer
    records: NDArray[np.int64]  # [pairs]
    score_gaps: NDArray[np.float32]  # [pairs], 1 where not given
    reference: NDArray[np.float32] | None  # [pairs, 2], log-probabilities when they are known beforehand
    pair_weights: NDArray[np.float32] | None = None  # [pairs], what each counts; None where all count 1

    @property
    def counts(self) -> dict[str, float]:
        """What the terms of a loss are means over, by name; weighted pairs count as much as they weigh."""
        chosen = self.lengths[:, 0]
        if self.pair_weights is None:
            return {"pairs": self.samples, "chosen_tokens": int(chosen.sum())}
        weights = self.pair_weights.astype(np.float64)
        return {"pairs": float(weights.sum()), "chosen_tokens": float(weights @ chosen)}


def collate_pairs(rows: Sequence[Sequence[Pair]]) -> PairBatch:
    """Concatenate the pairs of all rows."""
    pairs = [pair for row in rows for pair in row]
    assert pairs, "a batch needs a pair"
    starts = np.cumsum([0, *(len(pair) for pair in pairs)])
    answers = [(pair.chosen.labels, pair.rejected.labels) for pair in pairs]
    weights = [pair.weight for pair in pairs]
    references = [pair.reference for pair in pairs if pair.reference is not None]
    assert len(references) in (0, len(pairs)), "the reference is known for some pairs only"
    return PairBatch(
        ids=_rows(pairs, lambda sample: sample.ids),
        labels=np.concatenate([np.append(p.chosen.labels[1:], p.rejected.labels[p.prompt :]) for p in pairs]),
        is_vision=_rows(pairs, lambda sample: sample.is_vision),
        positions=_rows(pairs, lambda sample: sample.positions),
        visible_until=np.concatenate(
            [start + _visible_until(p) for start, p in zip(starts[:-1], pairs, strict=True)]
        ),
        patches=np.concatenate([pair.chosen.patches for pair in pairs]),
        grids=np.concatenate([pair.chosen.grids for pair in pairs]),
        samples=len(pairs),
        lengths=np.array([[np.count_nonzero(labels != IGNORE) for labels in both] for both in answers]),
        records=np.array([pair.record for pair in pairs]),
        score_gaps=np.array([pair.score_gap or 1.0 for pair in pairs], dtype=np.float32),
        reference=np.array(references, dtype=np.float32) if references else None,
        pair_weights=None if all(weight == 1 for weight in weights) else np.array(weights, dtype=np.float32),
    )


def _rows(pairs: Sequence[Pair], of: Callable[[Sample], NDArray[Any]]) -> NDArray[Any]:
    """What samples hold per token -> the same per position of the rows."""
    halves = ((of(p.chosen)[:-1], of(p.rejected)[p.prompt - 1 : -1]) for p in pairs)
    return np.concatenate([half for both in halves for half in both])


def _visible_until(pair: Pair) -> NDArray[np.int64]:
    """The prompt is seen by both answers, except for its last token: the rejected answer has its own copy."""
    until = np.full(len(pair), len(pair), dtype=np.int64)
    until[pair.prompt - 1 : len(pair.chosen) - 1] = len(pair.chosen) - 1
    return until
