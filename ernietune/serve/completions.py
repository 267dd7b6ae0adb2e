"""POST /v1/completions and the tokenizer's routes: prompts without a chat format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ernietune.infer.request import Delta, PromptLogprobs, TokenLogprob
from ernietune.infer.request import Request as Prompt
from ernietune.serve.answer import Step, TextAnswer, answer_id, text_choice
from ernietune.serve.chats import SSE
from ernietune.serve.logprobs import TextLogprobs, TokenNames
from ernietune.serve.protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest
from ernietune.serve.schemas import Detokenized, TextCompletion, TokenizerInfo, Tokens
from ernietune.serve.service import Service
from ernietune.serve.stream import event_stream, together, unless_gone

_Deltas = AsyncGenerator[tuple[int, Delta], None]
_Steps = AsyncGenerator[tuple[dict[str, Any], Step], None]


def completion_routes(service: Service) -> APIRouter:
    """The route over one service."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None, responses={200: {"model": TextCompletion, **SSE}})
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue prompts given as text or token ids, several of them at once."""
        params = service.settle(body)
        requests = await run_in_threadpool(
            lambda: [service.prepare_text(prompt, body) for prompt in body.prompts()]
        )
        asked = await run_in_threadpool(lambda: [service.direct(body, params, r) for r in requests])
        deltas = together(
            [service.generate(*each, body.priority or 0) for each in zip(requests, asked, strict=True)]
        )
        name = requests[0].adapter or service.settings.model_name
        tokens = sum(len(request.ids) for request in requests)
        answer = TextAnswer(name, tokens, answer_id("cmpl", body.request_id))
        choices = [_Choice(service, body, request) for request in requests for _ in range(params.n)]
        steps = _steps(deltas, choices, params.n)
        if body.stream:
            return event_stream(_chunks(answer, steps, body))
        return await unless_gone(http, _whole(answer, steps, choices, params.n, body.n or 1))

    return routes


class _Choice:
    """What one answer sends along with its text: the prompt when it is echoed, log-probabilities."""

    def __init__(self, service: Service, body: CompletionRequest, request: Prompt) -> None:
        self._tokenizer = service.engine.tokenizer
        self._prompt = request.ids.tolist() if body.echo else []
        names = TokenNames(self._tokenizer, bool(body.return_tokens_as_token_ids))
        self._logprobs = None if body.logprobs is None else TextLogprobs(names)
        self._begun = False
        self._sum, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        """The mean log-probability of a token, as far as it is known."""
        return self._sum / max(1, self._count)

    def read(self, delta: Delta, scores: PromptLogprobs | None) -> tuple[str, dict[str, Any] | None]:
        """(text, logprobs) of a delta; the first one begins with the prompt, which has these `scores`."""
        text = delta.text
        if not self._begun:
            self._begun = True
            text = self._tokenizer.decode(self._prompt, skip_special=False) + text
            self._add(self._prompt, scores or [None] * len(self._prompt))
        self._add(delta.ids, delta.logprobs)
        self._sum += sum(entry.logprob for entry in delta.logprobs)
        self._count += len(delta.logprobs)
        return text, None if self._logprobs is None else self._logprobs.take()

    def _add(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> None:
        if self._logprobs is not None:
            for token, entry in zip(ids, entries, strict=True):
                self._logprobs.add(token, entry)


async def _steps(
    deltas: _Deltas, choices: list[_Choice], count: int
) -> AsyncGenerator[tuple[dict[str, Any], Step], None]:
    """(choice of a chunk, tokens so far) for each delta."""
    tokens = cached = 0
    scores: dict[int, PromptLogprobs] = {}  # come with the first choice of a prompt, for all of them
    async with aclosing(deltas):
        async for prompt, delta in deltas:
            tokens, index = tokens + len(delta.ids), prompt * count + delta.index
            cached += delta.cached_tokens
            if delta.prompt_logprobs is not None:
                scores[prompt] = delta.prompt_logprobs
            text, logprobs = choices[index].read(delta, scores.get(prompt))
            counts = Step(tokens=tokens, cached_tokens=cached)
            yield text_choice(index, text, delta.finish_reason, logprobs), counts


async def _whole(
    answer: TextAnswer, steps: _Steps, choices: list[_Choice], tries: int, kept: int
) -> Response:
    whole = [text_choice(index, "", None) for index in range(len(choices))]
    last = Step()
    async with aclosing(steps):
        async for step in steps:
            new, last = step
            choice = whole[new["index"]]
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            if choice["logprobs"] is None:
                choice["logprobs"] = new["logprobs"]
            else:
                for name, values in new["logprobs"].items():
                    choice["logprobs"][name] += values
    return JSONResponse(answer.completion(_best(whole, choices, tries, kept), last))


def _best(whole: list[dict[str, Any]], choices: list[_Choice], tries: int, kept: int) -> list[dict[str, Any]]:
    """Of the tries for each prompt those with the most probable tokens, the best first where some go."""
    if kept == tries:
        return whole
    found = []
    for start in range(0, len(whole), tries):
        ranked = sorted(range(start, start + tries), key=lambda index: -choices[index].mean)
        found += [whole[index] for index in ranked[:kept]]
    return [choice | {"index": index} for index, choice in enumerate(found)]


async def _chunks(
    answer: TextAnswer, steps: _Steps, body: CompletionRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """Text and finish reasons by prompt as they come, the usage at the end."""
    options = body.stream_options
    running = options is not None and options.continuous_usage_stats
    last = Step()
    async with aclosing(steps):
        async for new, last in steps:
            if new["text"] or new["logprobs"] or new["finish_reason"]:
                yield answer.chunk([new]) | ({"usage": answer.usage(last)} if running else {})
    if options is not None and options.include_usage:
        yield answer.completion([], last)


def tokenizer_routes(service: Service) -> APIRouter:
    """What evaluation clients ask for when they have no tokenizer of their own."""
    routes = APIRouter()
    tokenizer = service.engine.tokenizer

    @routes.post("/tokenize", response_model_exclude_unset=True)
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """The token ids of a text, or of a chat with its generation prompt."""
        ids = await run_in_threadpool(_tokenize, service, body)
        limit = service.engine.max_length
        if body.return_token_strs:
            names = [tokenizer.decode([token], skip_special=False) for token in ids]
            return Tokens(count=len(ids), max_model_len=limit, tokens=ids, token_strs=names)
        return Tokens(count=len(ids), max_model_len=limit, tokens=ids)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids, special tokens by their names."""
        service.check_ids(body.tokens)
        return Detokenized(prompt=tokenizer.decode(body.tokens, skip_special=False))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Special tokens by role and the checkpoint's chat template (null for a built-in format)."""
        return TokenizerInfo(
            tokenizer_class="ernietune",
            vocab_size=tokenizer.vocab_size,
            model_max_length=service.engine.max_length,
            chat_template=tokenizer.chat_template,
            **tokenizer.named_tokens,
        )

    return routes


def _tokenize(service: Service, body: TokenizeRequest) -> list[int]:
    chat = body.chat()
    if chat is None:
        assert body.prompt is not None
        return service.engine.tokenizer.encode(body.prompt)
    request, _ = service.prepare_chat(chat)
    return [int(token) for token in request.ids]
