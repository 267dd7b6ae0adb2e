"""Generations that run in threads, as asynchronous streams and server-sent events."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from typing import Any

from fastapi.responses import StreamingResponse

from ernietune.errors import ErnietuneError
from ernietune.infer.request import Delta
from ernietune.serve.errors import error_body

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def in_thread(
    deltas: Generator[Delta, None, None], workers: ThreadPoolExecutor
) -> AsyncGenerator[Delta, None]:
    """Run a generation in a worker thread; leaving the loop early cancels it at the next token."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Delta | None] = asyncio.Queue()
    cancelled = threading.Event()

    def work() -> None:
        try:
            with closing(deltas):
                for delta in deltas:
                    if cancelled.is_set():
                        return
                    loop.call_soon_threadsafe(arrived.put_nowait, delta)
        finally:
            loop.call_soon_threadsafe(arrived.put_nowait, None)

    done = loop.run_in_executor(workers, work)
    try:
        while (delta := await arrived.get()) is not None:
            yield delta
        await done  # raises what went wrong in the thread
    finally:
        cancelled.set()


async def together(
    streams: Sequence[AsyncGenerator[Delta, None]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Run several generations at once; yields (which one, its next delta) as they come."""
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
