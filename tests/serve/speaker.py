"""A stand-in for the engine: says what it is told to, a character per token, and remembers the questions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import uvicorn

from ernietune.errors import RequestError
from ernietune.infer.core import Stats
from ernietune.infer.request import ContextLengthError, Delta, Request, TokenLogprob
from ernietune.media.image import ImageLimits, open_image
from ernietune.media.video import VideoLimits, open_video
from ernietune.serve.api import create_app, listen
from ernietune.serve.options import Settings

OPEN, CLOSED = "Assistant: <think>\n", "Assistant: <think>\n\n</think>\n\n"


class CharTokenizer:
    """A token is a code point."""

    vocab_size = 0x110000
    named_tokens = {"eos_token": "</s>", "bos_token": "<s>"}
    chat_template = None

    def encode(self, text):
        return [ord(char) for char in text]

    def decode(self, ids, skip_special=True):
        return "".join(chr(id) for id in ids)

    def bytes_of(self, token):
        return chr(token).encode()


class NoAdapters:
    """What an engine without adapters says of them."""

    most = 0

    def __contains__(self, name):
        return False

    def served(self):
        return []


class Speaker:
    """`script` is the next answer; `thinks` says how its chat format ends a prompt."""

    def __init__(self, script="Hello!", thinks=True, reads_pictures=False, max_length=2000):
        self.script, self.thinks = script, thinks
        self.reads_pictures, self.max_length = reads_pictures, max_length
        self.tokenizer, self.limits, self.video = CharTokenizer(), ImageLimits(), VideoLimits()
        self.adapters = NoAdapters()
        self.template = SimpleNamespace(kind="vl_thinking")
        self.model = SimpleNamespace(
            config=SimpleNamespace(vision_token_ids=(5, 6, 7), vocab_size=CharTokenizer.vocab_size)
        )
        self.conversation, self.options, self.params = None, None, []
        self.streamed = None
        self.cancelled, self.pause = 0, 0.0

    def prepare(self, conversation, open_picture=open_image, open_clip=open_video, adapter=None, **options):
        self.conversation, self.options = conversation, options
        for url in conversation.images:
            open_picture(url)
        for part in conversation.videos:
            list(open_clip(part.video, self.video, part.sampling))
        opened = self.thinks and options.get("enable_thinking") is not False
        text = "".join(message.text for message in conversation.messages) + (OPEN if opened else CLOSED)
        if len(text) >= self.max_length:
            raise ContextLengthError(f"the prompt has {len(text)} tokens; that is too long")
        return Request(np.array(self.tokenizer.encode(text)), np.zeros((len(text), 3), np.int64))

    def prepare_ids(self, ids, adapter=None):
        if not ids or max(ids) >= self.tokenizer.vocab_size:
            raise RequestError("a prompt needs at least one token id of the vocabulary")
        if len(ids) >= self.max_length:
            raise ContextLengthError(f"the prompt has {len(ids)} tokens")
        if self.reads_pictures and 5 in ids:
            raise RequestError("the prompt has picture placeholders")
        return Request(np.array(ids), np.zeros((len(ids), 3), np.int64))

    def bad_words(self, words):
        return tuple(tuple(self.tokenizer.encode(word)) for word in words)

    def stats(self):
        return Stats(0, 0, 10, 5, 0, 0, 0, 3, 8, 4, drafted_tokens=9, accepted_tokens=6)

    def check_guide(self, params):
        pass

    def run(self, request, params, deliver, priority=0):
        return SpokenRun(self.stream(request, params, priority), deliver)

    def stream(self, request, params, priority=0):
        room = self.max_length - len(request.ids)
        if (params.max_tokens or room) > room:
            raise ContextLengthError(f"at most {room} tokens can be generated")
        self.params.append(params)
        self.streamed = (request, priority)
        budget = room if params.max_tokens is None else params.max_tokens
        return self._choices(request, params, budget)

    def _choices(self, request, params, budget):
        scored = None if params.prompt_logprobs is None else self._scored(request.ids, params.prompt_logprobs)
        for index in range(params.n):
            first = {"prompt_logprobs": scored, "cached_tokens": 1} if index == 0 else {}
            for delta in self._speak(budget):
                logprobs = () if params.logprobs is None else self._scored(delta.ids, params.logprobs)
                yield replace(delta, index=index, logprobs=logprobs, **first)
                first = {}

    def _scored(self, ids, top):
        """The probability of a token is 1 / its id."""
        return tuple(
            TokenLogprob(int(id), -float(id), ((int(id), -float(id)), (63, -1e4))[:top]) for id in ids
        )

    def _speak(self, budget):
        if budget == 0:
            yield Delta("", (), "length")
            return
        done = False
        try:
            for count, char in enumerate(self.script, 1):
                time.sleep(self.pause)
                if count == budget:
                    done = True
                    yield Delta(char, (ord(char),), "length")
                    return
                yield Delta(char, (ord(char),))
            done = True
            yield Delta("", (2,), "stop")
        finally:
            self.cancelled += not done


class SpokenRun:
    """An answer that a thread of its own delivers until it is cancelled."""

    def __init__(self, deltas, deliver):
        self._deltas, self._deliver, self._over = deltas, deliver, threading.Event()

    def start(self):
        threading.Thread(target=self._speak, daemon=True).start()

    def cancel(self):
        self._over.set()

    def _speak(self):
        with closing(self._deltas):
            for delta in self._deltas:
                if self._over.is_set():
                    return
                self._deliver(delta)


@contextmanager
def served(speaker: Speaker, settings: Settings) -> Iterator[str]:
    """A real server on a free port; gives its address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(speaker, settings), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
