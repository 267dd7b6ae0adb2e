"""One loaded model that answers many requests at once: token ids in, text out as it comes."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernietune.errors import RequestError
from ernietune.infer.adapters import Adapters, ServedAdapter
from ernietune.infer.core import Core, Stats
from ernietune.infer.following import Arrived, collect, complete, follow
from ernietune.infer.generation import Generation
from ernietune.infer.guided import Guides
from ernietune.infer.loop import Loop, Run
from ernietune.infer.media import MediaReader, OpenImage, OpenVideo
from ernietune.infer.memory import MemoryPlan
from ernietune.infer.options import EngineOptions, token_bytes
from ernietune.infer.precision import Precision
from ernietune.infer.request import (
    Completion,
    ContextLengthError,
    Delta,
    Request,
    SamplingParams,
    SettingError,
)
from ernietune.infer.sequence import Sequence, Ticket, media_of, next_arrival
from ernietune.infer.source import Source
from ernietune.infer.thought import Thought
from ernietune.media.image import ImageLimits, normalize, open_image
from ernietune.media.video import VideoLimits, open_video
from ernietune.models.config import ModelConfig
from ernietune.models.decoder import CausalLM
from ernietune.models.packed import stored_bytes
from ernietune.text.messages import Conversation
from ernietune.text.parse import THINK_CLOSE
from ernietune.text.positions import media_tokens, positions_3d
from ernietune.text.template import Template
from ernietune.text.tokenizer import Tokenizer


class Engine:
    """Renders conversations, runs the model on all requests together and decodes their tokens.

    Thread-safe. Requests are served first come first served; their answers grow side by side.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        template: Template,
        limits: ImageLimits | None = None,
        max_length: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        options: EngineOptions | None = None,
        video: VideoLimits | None = None,
    ) -> None:
        """`limits` are picture sizes, `video` those of videos; `max_length` bounds prompt and answer in all.

        Without `max_length` the context is the model's, or what the cache holds where that is less.
        RequestError when the cache cannot hold one sequence of `max_length`. `template_options` hold for
        every prompt, unless `prepare` is told otherwise.
        """
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.limits, self.video = limits or ImageLimits(), video or VideoLimits()
        self._options = options = options or EngineOptions()
        longest = max_length or model.config.max_position_embeddings
        blocks = options.blocks(model.config, model.dtype, longest)
        self.max_length = _context(model.config, max_length, blocks * options.block_size)
        self._template_options = dict(template_options or {})
        self.adapters = Adapters(model, template.kind, options.max_adapters)
        self._guides = Guides(tokenizer, model.config.vocab_size, tuple(template.stop_ids))
        self._loop = Loop(Core(model, options, blocks))

    @classmethod
    def load(
        cls,
        path: str | Path,
        adapter: str | Path | None = None,
        max_length: int | None = None,
        options: EngineOptions | None = None,
        precision: Precision | None = None,
        chat_template: Path | None = None,
    ) -> Engine:
        """Load a model folder, a hub id, an adapter, a run or one of its checkpoints.

        Adapters are not merged. A run brings the chat format and picture sizes it was trained with; the
        jinja file `chat_template` is used instead of any other format.
        """
        source = Source.find(path, adapter)
        processor = source.processor(chat_template)
        _check_length(max_length, processor.config.max_position_embeddings)
        return cls(
            source.model(processor, precision or Precision()),
            processor.tokenizer,
            processor.template,
            processor.limits,
            max_length,
            source.template_options(),
            options,
            processor.video,
        )

    def memory_plan(self) -> MemoryPlan:
        """What the weights and the cache take, and the largest request."""
        config, size = self.model.config, self._options.block_size
        blocks = self._loop.core.pool.count
        each = token_bytes(config, self.model.dtype)
        return MemoryPlan(stored_bytes(self.model), blocks, size, each, self.max_length)

    @property
    def reads_pictures(self) -> bool:
        """True for a vision-language model."""
        return self.model.config.is_vl

    def prepare(
        self,
        conversation: Conversation,
        open_picture: OpenImage = open_image,
        open_clip: OpenVideo = open_video,
        adapter: str | None = None,
        **options: Any,
    ) -> Request:
        """Open the pictures and videos, render the prompt and check its length.

        `open_picture` turns a url into a picture, `open_clip` a video into its frames; `adapter` is the name
        of the one that shall answer; `options` go to the template (enable_thinking, ...). Raises DataError
        for a medium that cannot be read, RequestError for one that the model cannot see and
        ContextLengthError for a prompt that leaves no room for an answer.
        """
        media = conversation.media
        if media and not self.reads_pictures:
            kind = "picture" if conversation.images else "video"
            raise RequestError(
                f"the prompt has {len(media)} {kind}(s) but this model reads text only; "
                "use a vision-language checkpoint"
            )
        answering = self.adapters.find(adapter)
        reader = MediaReader(open_picture, open_clip, *self._sizes(answering))
        pictures = [reader.read(part) for part in media]
        grids = tuple(grid for _, grid in pictures)
        counts = [media_tokens(grid, self.limits.merge_size) for grid in grids]
        trained = {} if answering is None else answering.template_options
        options = self._template_options | trained | options
        rendered = self.template.render(conversation, counts, add_generation_prompt=True, **options)
        self._check_room(len(rendered.ids))
        ids = np.array(rendered.ids, np.int64)
        self._check_placeholders(ids, sum(counts))
        return Request(
            ids=ids,
            positions=positions_3d(len(ids), rendered.media, grids),
            is_vision=self._is_vision(ids),
            patches=normalize(np.concatenate([patches for patches, _ in pictures])) if pictures else None,
            grids=grids,
            adapter=adapter,
        )

    def _sizes(self, answering: ServedAdapter | None) -> tuple[ImageLimits, VideoLimits]:
        """Those of pictures and of videos, as the adapter was trained with them."""
        if answering is None:
            return self.limits, self.video
        return answering.limits(self.limits), answering.video(self.video)

    def prepare_ids(self, ids: Iterable[int], adapter: str | None = None) -> Request:
        """A prompt of text that is token ids already. RequestError for an id that the model does not have."""
        prompt = np.array(list(ids), np.int64)
        vocabulary = self.model.config.vocab_size
        if not prompt.size or prompt.min() < 0 or prompt.max() >= vocabulary:
            raise RequestError(f"a prompt needs at least one token id, all between 0 and {vocabulary - 1}")
        self._check_placeholders(prompt, 0)
        positions = positions_3d(len(prompt), [], [])
        return Request(prompt, positions, self._is_vision(prompt), adapter=adapter)

    @property
    def template_options(self) -> dict[str, Any]:
        """The options of the chat format that hold for every prompt."""
        return dict(self._template_options)

    def bad_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences of words for `SamplingParams.bad_words`, with and without a space before."""
        found = (
            tuple(self.tokenizer.encode_plain(text)) for word in words for text in (word, f" {word.lstrip()}")
        )
        return tuple(dict.fromkeys(ids for ids in found if ids))

    def check_guide(self, params: SamplingParams) -> None:
        """Raise SettingError for a grammar that cannot be followed; a good one is remembered."""
        if params.guide is not None:
            self._guides.start(params.guide)

    def stats(self) -> Stats:
        """What runs, what waits, and the totals since the start."""
        return self._loop.core.stats()

    def close(self) -> None:
        """End what runs, with RequestError for who waits for it; a later request starts the engine again."""
        self._loop.close()

    def run(
        self,
        request: Request,
        params: SamplingParams,
        deliver: Callable[[Delta | BaseException], None],
        priority: int = 0,
    ) -> Run:
        """A request that is checked and waits to be started.

        `deliver` is called from the engine's thread, and must neither block nor raise, with the deltas of
        every choice until each had its finish reason, or with the error that ended the request. A request of
        a smaller `priority` number goes first. Raises ContextLengthError when prompt and max_tokens exceed
        the context, SettingError.
        """
        return Run(self._loop, self._ticket(request, params, deliver, priority))

    def stream(
        self, request: Request, params: SamplingParams, priority: int = 0
    ) -> Generator[Delta, None, None]:
        """Generate step by step; the last delta of a choice has the finish reason. Closing cancels.

        Raises what `run` raises at once, but starts with the first `next`. While nothing arrives it yields
        empty deltas, so that a waiting request can be closed too.
        """
        arrived: Arrived = queue.SimpleQueue()
        return follow(self.run(request, params, arrived.put, priority), arrived, params.n)

    def generate(self, request: Request, params: SamplingParams, priority: int = 0) -> Completion:
        """The whole answer at once; SettingError when more than one choice is asked for."""
        if params.n != 1:
            raise SettingError("n", f"is {params.n}; use generate_all for more than one choice")
        return self.generate_all(request, params, priority)[0]

    def generate_all(
        self, request: Request, params: SamplingParams, priority: int = 0
    ) -> tuple[Completion, ...]:
        """All choices of a request, whole, in order."""
        with closing(self.stream(request, params, priority)) as stream:
            deltas = list(stream)
        return tuple(
            complete((delta for delta in deltas if delta.index == index), len(request.ids))
            for index in range(params.n)
        )

    def generate_batch(self, requests: list[Request], params: list[SamplingParams]) -> list[Completion]:
        """One answer to each request, in order; they run together from the same step on.

        On an engine that does nothing else the answers are always the same, whatever the timing.
        """
        arrived: queue.SimpleQueue[tuple[int, Delta | BaseException]] = queue.SimpleQueue()
        tickets = [
            self._ticket(request, settings, partial(_put, arrived, number), 0)
            for number, (request, settings) in enumerate(zip(requests, params, strict=True))
        ]
        self._loop.submit(*tickets)
        try:
            deltas = collect(arrived, len(tickets))
        finally:
            for ticket in tickets:
                self._loop.cancel(ticket)
        return [complete(part, len(request.ids)) for part, request in zip(deltas, requests, strict=True)]

    def _ticket(
        self,
        request: Request,
        params: SamplingParams,
        deliver: Callable[[Delta | BaseException], None],
        priority: int,
    ) -> Ticket:
        config = self.model.config
        params.check_ids(config.vocab_size)
        budget = self._budget(request, params)
        media = media_of(request, config.image_token_id, self.limits.merge_size)
        arrival, answering = next_arrival(), self.adapters.find(request.adapter)
        weights = None if answering is None else answering.weights
        generations = (self._generation(request, params, budget, index) for index in range(params.n))
        return Ticket(
            tuple(Sequence(request, media, said, priority, arrival, weights) for said in generations),
            deliver,
        )

    def _generation(self, request: Request, params: SamplingParams, budget: int, index: int) -> Generation:
        guide = None if params.guide is None else self._guides.start(params.guide)
        ends, thought = tuple(self.template.stop_ids), self._thought(params)
        return Generation(params, request.ids, budget, ends, self.tokenizer, index, guide, thought)

    def _thought(self, params: SamplingParams) -> Thought | None:
        if params.reasoning_limit is None or not params.thinking:
            return None
        return Thought(self.tokenizer, self.tokenizer.encode(THINK_CLOSE), params.reasoning_limit)

    def _budget(self, request: Request, params: SamplingParams) -> int:
        """How many tokens may be generated."""
        room = self.max_length - len(request.ids)
        if params.max_tokens != 0:
            self._check_room(len(request.ids))
        budget = room if params.max_tokens is None else params.max_tokens
        if budget > room:
            raise ContextLengthError(
                f"max_tokens is {budget} but the prompt has {len(request.ids)} tokens and the context holds "
                f"{self.max_length}: at most {max(0, room)} can be generated"
            )
        if params.min_tokens > budget:
            raise SettingError("min_tokens", f"is {params.min_tokens}; there is room for {budget} tokens")
        return budget

    def _check_room(self, tokens: int) -> None:
        if tokens >= self.max_length:
            raise ContextLengthError(
                f"the prompt has {tokens} tokens but the context holds {self.max_length}, "
                "the answer included; shorten the prompt or serve with a larger maximum length"
            )

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


def _put(arrived: queue.SimpleQueue[tuple[int, Any]], number: int, item: Delta | BaseException) -> None:
    arrived.put((number, item))


def _context(config: ModelConfig, max_length: int | None, capacity: int) -> int:
    """Prompt and answer together, in tokens: what was asked for, or what model and cache allow."""
    if max_length is not None and max_length > capacity:
        raise RequestError(
            f"a maximum length of {max_length} tokens does not fit into a cache of {capacity}; "
            "choose a smaller one, or a larger cache_tokens if there is memory"
        )
    if capacity < 2:
        raise RequestError(f"the key/value cache holds {capacity} tokens; make cache_tokens larger")
    return max_length or min(config.max_position_embeddings, capacity)


def _check_length(max_length: int | None, supported: int) -> None:
    if max_length is not None and not 2 <= max_length <= supported:
        raise RequestError(
            f"a maximum length of {max_length} tokens is impossible; this model takes 2 to {supported}"
        )
