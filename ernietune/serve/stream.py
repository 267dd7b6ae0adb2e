"""Generations of the engine's thread as asynchronous streams, and these as responses."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeAlias

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from ernietune.errors import ErnietuneError
from ernietune.infer.loop import Run
from ernietune.infer.request import Delta
from ernietune.serve.errors import error_body

Arrived: TypeAlias = "asyncio.Queue[Delta | BaseException]"
_CLIENT_CLOSED = 499  # nobody reads it; the usual code for a client that went away
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Mailbox:
    """Brings what the engine's thread delivers into an event loop, which is woken once for many deltas.

    What a step of the engine has for all its requests arrives together.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._letters: deque[tuple[Arrived, Delta | BaseException]] = deque()
        self._called = False

    def to(self, arrived: Arrived) -> Callable[[Delta | BaseException], None]:
        """What puts a delta into a queue of the event loop, for another thread to call."""

        def deliver(item: Delta | BaseException) -> None:
            self._letters.append((arrived, item))
            if not self._called:
                self._called = True
                with suppress(RuntimeError):  # the event loop was closed: nobody listens any more
                    self.loop.call_soon_threadsafe(self._hand_out)

        return deliver

    def _hand_out(self) -> None:
        self._called = False  # first: what comes during the loop below is found by it, or calls again
        while self._letters:
            arrived, item = self._letters.popleft()
            arrived.put_nowait(item)


async def follow(run: Run, arrived: Arrived, choices: int) -> AsyncGenerator[Delta, None]:
    """Start a run that delivers into `arrived`; its deltas until all choices are complete.

    Leaving the loop early cancels it.
    """
    run.start()
    try:
        while choices:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            choices -= item.finish_reason is not None
            yield item
    finally:
        run.cancel()


async def together(
    streams: Sequence[AsyncGenerator[Delta, None]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Run several generations at once; yields (which one, its next delta) as they come."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()

    async def forward(index: int, deltas: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    arrived.put_nowait((index, delta))
        finally:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(forward(index, deltas)) for index, deltas in enumerate(streams)]
    try:
        for _ in tasks:
            while (item := await arrived.get()) is not None:
                yield item
            for task in tasks:
                if task.done():
                    task.result()  # raises what went wrong in it
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(http: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """The response to a client, which is given up when the client hangs up before it is there."""
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=_CLIENT_CLOSED)
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(http: Request) -> None:
    """Wait until the client has hung up."""
    while (await http.receive())["type"] != "http.disconnect":
        continue


def event_stream(chunks: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    """The chunks as server-sent events, then [DONE]; an error in the middle becomes an error object."""
    return StreamingResponse(_events(chunks), media_type="text/event-stream", headers=_HEADERS)


async def _events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[str]:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk)
    except ErnietuneError as error:  # the status line is long gone; clients look for an error object
        yield _event(error_body(str(error), "server_error"))
        return
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
