"""One loaded model that answers one request at a time: token ids in, text out as it comes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from PIL import Image

from ernietune.errors import RequestError
from ernietune.infer.cache import KVCache
from ernietune.infer.request import Completion, ContextLengthError, Delta, Request, SamplingParams
from ernietune.infer.sampler import Sampler
from ernietune.infer.source import Source
from ernietune.infer.text_stream import TextStream
from ernietune.media.image import ImageLimits, image_to_patches, image_tokens, normalize, open_image
from ernietune.models.decoder import CausalLM, Inputs
from ernietune.text.messages import Conversation
from ernietune.text.positions import positions_3d
from ernietune.text.template import Template
from ernietune.text.tokenizer import Tokenizer

_POLL_SECONDS = 0.1  # how often a waiting request looks whether it was cancelled


class Engine:
    """Renders conversations, runs the model with a key/value cache and decodes its tokens.

    Thread-safe: requests queue and are served one after the other, first come first served.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        template: Template,
        limits: ImageLimits | None = None,
        max_length: int | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`limits` are the picture sizes; `max_length` bounds prompt and answer together, in tokens.

        `template_options` hold for every prompt, unless `prepare` is told otherwise.
        """
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.limits = limits or ImageLimits()
        self.max_length = max_length or model.config.max_position_embeddings
        self._template_options = dict(template_options or {})
        self._turns = Turns()

    @classmethod
    def load(
        cls, path: str | Path, adapter: str | Path | None = None, max_length: int | None = None
    ) -> Engine:
        """Load a model folder, a hub id, an adapter, a run or one of its checkpoints.

        Adapters are not merged. A run brings the chat format and picture sizes it was trained with.
        """
        source = Source.find(path, adapter)
        processor = source.processor()
        _check_length(max_length, processor.config.max_position_embeddings)
        return cls(
            source.model(processor),
            processor.tokenizer,
            processor.template,
            processor.limits,
            max_length,
            source.template_options(),
        )

    @property
    def reads_pictures(self) -> bool:
        """True for a vision-language model."""
        return self.model.config.is_vl

    def prepare(
        self,
        conversation: Conversation,
        open_picture: Callable[[str], Image.Image] = open_image,
        **options: Any,
    ) -> Request:
        """Open the pictures, render the prompt and check its length.

        `open_picture` turns a url into a picture; `options` go to the template (enable_thinking, ...). Raises
        DataError for a picture that cannot be read, RequestError for one that the model cannot see and
        ContextLengthError for a prompt that leaves no room for an answer.
        """
        if conversation.images and not self.reads_pictures:
            raise RequestError(
                f"the prompt has {len(conversation.images)} picture(s) but this model reads text only; "
                "use a vision-language checkpoint"
            )
        pictures = [image_to_patches(open_picture(url), self.limits) for url in conversation.images]
        grids = tuple(grid for _, grid in pictures)
        counts = [image_tokens(grid, self.limits.merge_size) for grid in grids]
        options = self._template_options | options
        rendered = self.template.render(conversation, counts, add_generation_prompt=True, **options)
        if len(rendered.ids) >= self.max_length:
            raise ContextLengthError(
                f"the prompt has {len(rendered.ids)} tokens but the context holds {self.max_length}, "
                "the answer included; shorten the prompt or serve with a larger maximum length"
            )
        ids = np.array(rendered.ids, np.int64)
        self._check_placeholders(ids, sum(counts))
        return Request(
            ids=ids,
            positions=positions_3d(len(ids), rendered.media, grids),
            is_vision=self._is_vision(ids),
            patches=normalize(np.concatenate([patches for patches, _ in pictures])) if pictures else None,
            grids=grids,
        )

    def stream(self, request: Request, params: SamplingParams) -> Generator[Delta, None, None]:
        """Generate step by step; the last delta has the finish reason. Closing the iterator cancels.

        Raises ContextLengthError at once when prompt and max_tokens exceed the context. While others are
        served it yields empty deltas, so that a waiting request can be closed too. A started iterator
        has to be exhausted or closed: it holds the model.
        """
        room = self.max_length - len(request.ids)
        budget = params.max_tokens or room
        if budget > room:
            raise ContextLengthError(
                f"max_tokens is {budget} but the prompt has {len(request.ids)} tokens and the context holds "
                f"{self.max_length}: at most {room} can be generated"
            )
        return self._take_turn(request, params, budget)

    def generate(self, request: Request, params: SamplingParams) -> Completion:
        """The whole answer at once."""
        with closing(self.stream(request, params)) as deltas:
            return complete(deltas, len(request.ids))

    def _take_turn(
        self, request: Request, params: SamplingParams, budget: int
    ) -> Generator[Delta, None, None]:
        ticket = self._turns.join()
        try:
            while not self._turns.wait(ticket, _POLL_SECONDS):
                yield Delta()
            yield from self._decode(request, params, budget)
        finally:
            self._turns.leave(ticket)

    def _decode(self, request: Request, params: SamplingParams, budget: int) -> Generator[Delta, None, None]:
        text, sampler, cache = TextStream(self.tokenizer, params.stop), Sampler(params), KVCache()
        ends = set(params.stop_ids) | (set() if params.ignore_eos else set(self.template.stop_ids))
        logits = self._forward(request, cache)
        for count in range(1, budget + 1):
            token = sampler.pick(logits)
            if token in ends:
                yield Delta(text.finish(), (token,), "stop")
                return
            piece = text.push(token)
            if text.stopped:
                yield Delta(piece, (token,), "stop")
                return
            if count == budget:
                yield Delta(piece + text.finish(), (token,), "length")
                return
            yield Delta(piece, (token,))
            logits = self._forward(self._one_token(token, request.next_position + count - 1), cache)

    def _one_token(self, token: int, position: int) -> Request:
        ids = np.array([token], np.int64)
        return Request(ids, np.full((1, 3), position, np.int64), self._is_vision(ids))

    def _is_vision(self, ids: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        return np.isin(ids, self.model.config.vision_token_ids) if self.reads_pictures else None

    def _check_placeholders(self, ids: NDArray[np.int64], expected: int) -> None:
        """The model puts pixels wherever the placeholder stands: a text must not bring some of its own."""
        found = int((ids == self.model.config.image_token_id).sum()) if self.reads_pictures else 0
        if found != expected:
            raise RequestError(
                f"the prompt has {found} picture placeholders for pictures of {expected} tokens; "
                "remove the placeholder from the text and attach the picture"
            )

    def _forward(self, request: Request, cache: KVCache) -> NDArray[np.float32]:
        """Read the request's tokens into the cache; the logits [V] that follow its last token."""
        inputs = Inputs(
            ids=paddle.to_tensor(request.ids),
            positions=paddle.to_tensor(request.positions),
            is_vision=None if request.is_vision is None else paddle.to_tensor(request.is_vision),
            patches=None if request.patches is None else paddle.to_tensor(request.patches),
            grids=request.grids,
        )
        with paddle.no_grad():  # not around the yields: it would stay switched on in the caller's thread
            hidden = self.model(inputs, cache)
            logits: NDArray[np.float32] = self.model.logits(hidden[-1:])[0].numpy()
        return logits


def complete(deltas: Iterator[Delta], prompt_tokens: int) -> Completion:
    """Join the deltas of one whole generation."""
    text: list[str] = []
    ids: list[int] = []
    for delta in deltas:
        text.append(delta.text)
        ids.extend(delta.ids)
        if delta.finish_reason is not None:
            return Completion("".join(text), tuple(ids), delta.finish_reason, prompt_tokens)
    raise AssertionError("a generation ended without a finish reason")


def _check_length(max_length: int | None, supported: int) -> None:
    if max_length is not None and not 2 <= max_length <= supported:
        raise RequestError(
            f"a maximum length of {max_length} tokens is impossible; this model takes 2 to {supported}"
        )


class Turns:
    """A fair queue: whoever joined first is served first, and anyone may leave at any time."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    def join(self) -> object:
        """Queue up; the ticket stands for the place in the line."""
        ticket = object()
        with self._moved:
            self._line.append(ticket)
        return ticket

    def wait(self, ticket: object, seconds: float) -> bool:
        """True as soon as the ticket is first in line, False when that takes longer than `seconds`."""
        with self._moved:
            return self._moved.wait_for(lambda: self._line[0] is ticket, seconds)

    def leave(self, ticket: object) -> None:
        """Give up the place, whether served or not."""
        with self._moved:
            self._line.remove(ticket)
            self._moved.notify_all()
