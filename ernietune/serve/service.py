"""One engine and everything its routes share: settings, media, metrics."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ernietune.errors import RequestError
from ernietune.infer.adapters import AdapterConflict
from ernietune.infer.engine import Engine
from ernietune.infer.request import Delta, Request, SamplingParams, SettingError
from ernietune.serve.answer import model_card
from ernietune.serve.fetch import Fetcher
from ernietune.serve.metrics import Metrics
from ernietune.serve.options import Settings
from ernietune.serve.pictures import MediaOpener
from ernietune.serve.protocol import ChatRequest, CompletionRequest, SamplingFields
from ernietune.serve.stream import Arrived, Mailbox, follow
from ernietune.serve.tool_choice import forces_call
from ernietune.serve.unsupported import UnsupportedField
from ernietune.text.messages import parse_conversation
from ernietune.text.parse import OutputParser, ParserChoice, tail_of

_log = logging.getLogger(__name__)
_MOST_UNKNOWN = 100  # names that are remembered, so that nobody fills the memory with them


class Service:
    """What the routes work with."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(settings.model_name, engine.adapters.most)
        self._started = int(time.time())
        self._opener = MediaOpener(settings.media_folder, Fetcher(settings.media_domains))
        self._mail: Mailbox | None = None
        self._unknown: set[str] = set()  # fields that the log has named
        self._seeds = None if settings.seed is None else random.Random(settings.seed)

    @property
    def names(self) -> list[str]:
        """What a request may name as its model."""
        return [self.settings.model_name, *(adapter.name for adapter in self.engine.adapters.served())]

    def cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: the model, then its adapters."""
        base, length = self.settings.model_name, self.engine.max_length
        reads = ("text", "image", "video") if self.engine.reads_pictures else ("text",)
        adapters = [
            model_card(adapter.name, length, adapter.loaded, reads, root=str(adapter.path), parent=base)
            for adapter in self.engine.adapters.served()
        ]
        return [model_card(base, length, self._started, reads), *adapters]

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request's model name chooses; every other name stands for the model alone."""
        return model if model in self.engine.adapters else None

    def load_adapter(self, name: str, path: Path) -> None:
        """Serve an adapter under `name`, which must not be the model's own; errors as of `Adapters.load`."""
        if name == self.settings.model_name:
            raise AdapterConflict(f"{name!r} is the name of the model itself; choose another one")
        self.engine.adapters.load(name, path)

    def settle(self, body: SamplingFields) -> SamplingParams:
        """Check a request and read its sampling settings; RequestError for what cannot be done."""
        for name in body.check(self.names if self.settings.strict_model_name else None):
            if name not in self._unknown and len(self._unknown) < _MOST_UNKNOWN:
                self._unknown.add(name)
                _log.warning("requests bring the field %r, which has no effect here", name)
        most = self.engine.model.config.vocab_size - 1
        if "" in (body.bad_words or ()):
            raise SettingError("bad_words", "holds an empty string, which is no word; leave it out")
        for token in body.bad_words_token_ids or ():
            if not 0 <= token <= most:
                problem = f"is {token}; it must be made of token ids between 0 and {most}"
                raise SettingError("bad_words_token_ids", problem)
        seed = None if self._seeds is None else self._seeds.getrandbits(62)
        return body.sampling(seed, self.engine.bad_words(body.bad_words or ()))

    def prepare_chat(self, body: ChatRequest) -> tuple[Request, Callable[[], OutputParser]]:
        """The prompt of a chat and what makes the parsers of its answers; opens media, so it may block."""
        conversation = parse_conversation(body.record(), "request")
        if forces_call(body.tool_choice) and self.settings.parsers.tools is None:
            raise UnsupportedField("tool_choice", body.tool_choice, "this chat format has no tool calls")
        self.settings.media.check(conversation)
        adapter, opener = self.adapter_of(body.model), self._opener
        request = self.engine.prepare(
            conversation, opener.picture, opener.video, adapter, **body.template_options()
        )
        tail = tail_of(request.ids.tolist(), self.engine.tokenizer)
        request = replace(request, cache_salt=body.cache_salt)
        return request, lambda: self.settings.parsers.open(tail, with_tools=body.uses_tools)

    def prepare_text(self, prompt: str | list[int], body: CompletionRequest) -> Request:
        """A prompt without a chat format; RequestError for one that is empty or no text."""
        ids = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        request = self.engine.prepare_ids(ids, self.adapter_of(body.model))
        return replace(request, cache_salt=body.cache_salt)

    def direct(self, body: SamplingFields, params: SamplingParams, request: Request) -> SamplingParams:
        """The settings for a prompt, which may leave a thought open.

        Works out the grammar, so it may take a while; SettingError for one that cannot be followed.
        """
        tail = tail_of(request.ids.tolist(), self.engine.tokenizer)
        # What a named parser takes for granted of a chat is not known of a text.
        parsers = self.settings.parsers if isinstance(body, ChatRequest) else ParserChoice()
        thinking = parsers.in_thought(tail)
        guide = params.guide
        if guide is not None and thinking and not body.enable_in_reasoning:
            guide = guide.behind_thought()
        params = replace(params, thinking=thinking, guide=guide)
        self.engine.check_guide(params)
        return params

    def check_ids(self, ids: list[int]) -> None:
        """RequestError for token ids that the vocabulary does not have."""
        size = self.engine.tokenizer.vocab_size
        if max(ids, default=0) >= size:
            raise RequestError(f"the token id {max(ids)} is not in the vocabulary of {size} tokens")

    def generate(
        self, request: Request, params: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[Delta, None]:
        """Check a request now; begin with it when the first delta is asked for; leaving the loop cancels."""
        arrived: Arrived = asyncio.Queue()
        run = self.engine.run(request, params, self._mailbox().to(arrived), priority)
        deltas = follow(run, arrived, params.n)
        return self.metrics.watch(deltas, len(request.ids), params.max_tokens, request.adapter)

    def _mailbox(self) -> Mailbox:
        """That of the running event loop, which is the same one as long as the server lives."""
        loop = asyncio.get_running_loop()
        if self._mail is None or self._mail.loop is not loop:
            self._mail = Mailbox(loop)
        return self._mail
