"""POST /v1/completions and the tokenizer's routes: prompts without a chat format."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ernietune.infer.request import Delta
from ernietune.serve.answer import TextAnswer, text_choice
from ernietune.serve.chats import CLIENT_CLOSED, SSE
from ernietune.serve.protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest
from ernietune.serve.schemas import Detokenized, TextCompletion, TokenizerInfo, Tokens
from ernietune.serve.service import Service
from ernietune.serve.stream import event_stream, together

_Deltas = AsyncGenerator[tuple[int, Delta], None]


def completion_routes(service: Service) -> APIRouter:
    """The route over one service."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None, responses={200: {"model": TextCompletion, **SSE}})
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue prompts given as text or token ids, several of them at once."""
        params = service.settle(body)
        requests = await run_in_threadpool(lambda: [service.prepare_text(p) for p in body.prompts()])
        deltas = together([service.generate(request, params) for request in requests])
        answer = TextAnswer(service.settings.model_name, sum(len(request.ids) for request in requests))
        if body.stream:
            return event_stream(_chunks(answer, deltas, body))
        return await _whole(answer, deltas, len(requests), http)

    return routes


async def _whole(answer: TextAnswer, deltas: _Deltas, count: int, http: Request) -> Response:
    texts, reasons, tokens = [""] * count, [""] * count, 0
    async with aclosing(deltas):
        async for index, delta in deltas:
            texts[index] += delta.text
            reasons[index] = delta.finish_reason or ""
            tokens += len(delta.ids)
            if await http.is_disconnected():
                return Response(status_code=CLIENT_CLOSED)
    choices = [text_choice(i, *pair) for i, pair in enumerate(zip(texts, reasons, strict=True))]
    return JSONResponse(answer.completion(choices, tokens))


async def _chunks(
    answer: TextAnswer, deltas: _Deltas, body: CompletionRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """Text and finish reasons by prompt as they come, the usage at the end."""
    options = body.stream_options
    running = options is not None and options.continuous_usage_stats
    tokens = 0
    async with aclosing(deltas):
        async for index, delta in deltas:
            tokens += len(delta.ids)
            if delta.text or delta.finish_reason is not None:
                chunk = answer.chunk([text_choice(index, delta.text, delta.finish_reason)])
                yield chunk | {"usage": answer.usage(tokens)} if running else chunk
    if options is not None and options.include_usage:
        yield answer.completion([], tokens)


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
