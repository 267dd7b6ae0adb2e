"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ernietune.serve.answer import ChatAnswer, Step, parsed, stream_deltas
from ernietune.serve.protocol import ChatRequest
from ernietune.serve.schemas import ChatCompletion
from ernietune.serve.service import Service
from ernietune.serve.stream import event_stream
from ernietune.text.parse import Event, collect

CLIENT_CLOSED = 499  # nobody reads it; the usual code for a client that went away
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
        request, parser = await run_in_threadpool(service.prepare_chat, body)
        deltas = service.generate(request, params)
        steps = parsed(deltas, parser, one_call=body.parallel_tool_calls is False)
        answer = ChatAnswer(service.settings.model_name, len(request.ids))
        if body.stream:
            return event_stream(_chunks(answer, steps, body))
        return await _whole(answer, steps, http)

    return routes


async def _whole(answer: ChatAnswer, steps: AsyncGenerator[Step, None], http: Request) -> Response:
    """The response in one piece; a client that hangs up ends the generation."""
    events: list[Event] = []
    async with aclosing(steps):
        async for step in steps:
            events += step.events
            if step.finish_reason is not None:
                return JSONResponse(answer.completion(collect(events), step))
            if await http.is_disconnected():
                break
    return Response(status_code=CLIENT_CLOSED)


async def _chunks(
    answer: ChatAnswer, steps: AsyncGenerator[Step, None], body: ChatRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """The role, the answer as it comes, the finish reason, the usage."""
    options = body.stream_options
    running = options is not None and options.continuous_usage_stats
    last = Step([], 0, 0)

    def counted(chunk: dict[str, Any]) -> dict[str, Any]:
        return chunk | {"usage": answer.usage(last.tokens, last.reasoning_tokens)} if running else chunk

    yield counted(answer.chunk({"role": "assistant", "content": ""}))
    async with aclosing(steps):
        async for last in steps:
            for delta in stream_deltas(last.events):
                yield counted(answer.chunk(delta))
            if last.finish_reason is not None:
                yield counted(answer.chunk({}, last.finish_reason))
    if options is not None and options.include_usage:
        yield answer.usage_chunk(last)
