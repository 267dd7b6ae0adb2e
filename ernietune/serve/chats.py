"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ernietune.serve.answer import ChatAnswer, Step, answer_id, choice, message, parsed, stream_deltas
from ernietune.serve.logprobs import TokenNames, chat_logprobs
from ernietune.serve.protocol import ChatRequest
from ernietune.serve.schemas import ChatCompletion
from ernietune.serve.service import Service
from ernietune.serve.stream import event_stream, unless_gone
from ernietune.text.parse import Event, collect

SSE: dict[str, Any] = {"content": {"text/event-stream": {}}}


def chat_routes(service: Service) -> APIRouter:
    """The route over one service."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletion, **SSE}}
    )
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """Answer a conversation, with reasoning and tool calls taken out of the text."""
        params = service.settle(body)
        request, open_parser = await run_in_threadpool(service.prepare_chat, body)
        params = await run_in_threadpool(service.direct, body, params, request)
        deltas = service.generate(request, params, body.priority or 0)
        parsers = [open_parser() for _ in range(params.n)]
        steps = parsed(deltas, parsers, one_call=body.parallel_tool_calls is False)
        name = request.adapter or service.settings.model_name
        answer = ChatAnswer(name, len(request.ids), answer_id("chatcmpl", body.request_id))
        names = TokenNames(service.engine.tokenizer, bool(body.return_tokens_as_token_ids))
        reporter = Reporter(names, params.logprobs is not None)
        if body.stream:
            return event_stream(_chunks(answer, steps, body, reporter, params.n))
        return await unless_gone(http, _whole(answer, steps, reporter, params.n))

    return routes


@dataclass
class Reporter:
    """Keeps the log-probabilities of every choice until they are sent."""

    names: TokenNames
    wanted: bool
    waiting: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        """Keep those of a step."""
        if self.wanted:
            self.waiting.setdefault(step.index, []).extend(chat_logprobs(step.logprobs, self.names))

    def take(self, index: int) -> list[dict[str, Any]] | None:
        """All that wait for one choice, None when nobody asked for them."""
        return self.waiting.pop(index, []) if self.wanted else None


async def _whole(
    answer: ChatAnswer, steps: AsyncGenerator[Step, None], reporter: Reporter, count: int
) -> Response:
    """The response in one piece."""
    events: list[list[Event]] = [[] for _ in range(count)]
    reasons: list[str | None] = [None] * count
    last = Step()
    async with aclosing(steps):
        async for last in steps:
            events[last.index] += last.events
            reasons[last.index] = last.finish_reason
            reporter.add(last)
    choices = [
        choice(index, {"message": message(collect(said))}, reasons[index], reporter.take(index))
        for index, said in enumerate(events)
    ]
    return JSONResponse(answer.completion(choices, last))


async def _chunks(
    answer: ChatAnswer,
    steps: AsyncGenerator[Step, None],
    body: ChatRequest,
    reporter: Reporter,
    count: int,
) -> AsyncGenerator[dict[str, Any], None]:
    """The roles, the answers as they come, the finish reasons, the usage."""
    options = body.stream_options
    running = options is not None and options.continuous_usage_stats
    last = Step()

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choices = [choice(index, {"delta": delta}, reason, reporter.take(index))]
        return answer.chunk(choices) | ({"usage": answer.usage(last)} if running else {})

    for index in range(count):
        yield chunk(index, {"role": "assistant", "content": ""})
    async with aclosing(steps):
        async for last in steps:
            reporter.add(last)
            for delta in stream_deltas(last.events):
                yield chunk(last.index, delta)
            if last.finish_reason is not None:
                yield chunk(last.index, {}, last.finish_reason)
    if options is not None and options.include_usage:
        yield answer.chunk([]) | {"usage": answer.usage(last)}
