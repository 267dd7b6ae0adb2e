"""The HTTP server: OpenAI's chat completions over one engine.

Pictures come as `data:` or `http(s)://` urls. Paths and `file://` urls name files of the *server*, so a
client could read whatever the server can; they are refused unless a media folder is opened for it, and then
only below that folder.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException

from ernietune.errors import CheckpointError, ConfigError, DataError, ErnietuneError, RequestError
from ernietune.infer.engine import Engine
from ernietune.infer.request import ContextLengthError, Delta, SettingError
from ernietune.infer.request import Request as EngineRequest
from ernietune.media.image import open_image
from ernietune.serve.protocol import Answer, ChatRequest, UnsupportedField, error_body, model_card
from ernietune.text.messages import parse_conversation

_WAITING_REQUESTS = 64  # threads that wait for their turn or generate
_CLIENT_CLOSED = 499  # nobody reads it; the usual code for a client that went away
_SHUTDOWN_SECONDS = 5


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    adapter: str | Path | None = None,
    max_length: int | None = None,
    model_name: str | None = None,
    media_folder: str | Path | None = None,
) -> None:
    """Load a model folder and serve it until interrupted; ConfigError when the port is taken."""
    listener = listen(host, port)  # before the model: a taken port should not cost a minute of loading
    print(f"loading {path}", flush=True)
    started = time.perf_counter()
    engine = Engine.load(path, adapter, max_length)
    name = model_name or Path(path).resolve().name
    app = create_app(engine, name, Path(media_folder) if media_folder else None)
    print(f"loaded in {time.perf_counter() - started:.1f} s; context {engine.max_length} tokens", flush=True)
    print(f"ready: http://{host}:{listener.getsockname()[1]}/v1 (model {name})", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """An open socket; port 0 takes a free one."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
        ) from error


def create_app(engine: Engine, model_name: str, media_folder: Path | None = None) -> FastAPI:
    """The routes over one engine; clients may name pictures below `media_folder` by path."""
    app = FastAPI(title="ernietune", docs_url=None, redoc_url=None)
    workers = ThreadPoolExecutor(_WAITING_REQUESTS, thread_name_prefix="generate")
    card = model_card(model_name, engine.max_length, int(time.time()))
    _add_error_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise HTTPException(404, f"the model {name!r} is not served here; there is {model_name!r}")
        return card

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        body.check()
        params = body.sampling()
        request = await run_in_threadpool(_prepare, engine, body, media_folder)
        deltas = in_thread(engine.stream(request, params), workers)
        answer = Answer(model_name, len(request.ids))
        if not body.stream:
            return await _whole(answer, deltas, http)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            _events(answer, deltas, body), media_type="text/event-stream", headers=headers
        )

    return app


def _prepare(engine: Engine, body: ChatRequest, media_folder: Path | None) -> EngineRequest:
    conversation = parse_conversation(body.record(), "request")
    return engine.prepare(conversation, picture_opener(media_folder), **body.template_options())


def picture_opener(media_folder: Path | None) -> Callable[[str], Image.Image]:
    """A function that opens the pictures a client may name; RequestError for all others."""

    def open_allowed(url: str) -> Image.Image:
        if urlsplit(url).scheme in ("data", "http", "https"):
            return open_image(url)
        return open_image(str(_local_file(url, media_folder)))

    return open_allowed


def _local_file(url: str, media_folder: Path | None) -> Path:
    if media_folder is None:
        raise RequestError(
            "this server does not open local files; send the picture as a data: url (base64) or an http(s) "
            "url, or start the server with --allow-local-files FOLDER"
        )
    path = Path(unquote(urlsplit(url).path) if url.startswith("file://") else url)
    resolved = (media_folder / path).resolve()
    if not resolved.is_relative_to(media_folder.resolve()):
        raise RequestError(f"the picture {url} is outside of the media folder of this server")
    return resolved


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


async def _whole(answer: Answer, deltas: AsyncGenerator[Delta, None], http: Request) -> Response:
    """The response in one piece; a client that hangs up ends the generation."""
    text, tokens = "", 0
    async with aclosing(deltas):
        async for delta in deltas:
            text, tokens = text + delta.text, tokens + len(delta.ids)
            if delta.finish_reason is not None:
                return JSONResponse(answer.completion(text, tokens, delta.finish_reason))
            if await http.is_disconnected():
                break
    return Response(status_code=_CLIENT_CLOSED)


async def _events(
    answer: Answer, deltas: AsyncGenerator[Delta, None], body: ChatRequest
) -> AsyncIterator[str]:
    """Server-sent events: the role, the text as it comes, the finish reason, the usage, [DONE]."""
    options = body.stream_options
    running = options is not None and options.continuous_usage_stats
    tokens = 0

    def event(chunk: dict[str, Any]) -> str:
        return _event(chunk | {"usage": answer.usage(tokens)} if running else chunk)

    yield event(answer.chunk({"role": "assistant", "content": ""}))
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                tokens += len(delta.ids)
                if delta.text:
                    yield event(answer.chunk({"content": delta.text}))
                if delta.finish_reason is not None:
                    yield event(answer.chunk({}, delta.finish_reason))
    except ErnietuneError as error:  # the status line is long gone; clients look for an error object
        yield _event(error_body(str(error), "server_error"))
        return
    if options is not None and options.include_usage:
        yield _event(answer.usage_chunk(tokens))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape; what the client can repair is a 400."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return _failed(400, f"{param or 'request body'}: {first['msg']}", param=param or None)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        if isinstance(error, ContextLengthError):
            return _failed(400, str(error), param="messages", code="context_length_exceeded")
        if isinstance(error, SettingError | UnsupportedField):
            return _failed(400, str(error), param=error.field, code="invalid_value")
        return _failed(400, str(error))

    @app.exception_handler(DataError)
    async def unreadable(_: Request, error: DataError) -> JSONResponse:
        return _failed(400, str(error), param="messages", code="invalid_value")

    @app.exception_handler(CheckpointError)
    async def damaged(_: Request, error: CheckpointError) -> JSONResponse:
        return _failed(500, str(error), "server_error")

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _failed(error.status_code, message, code="not_found" if error.status_code == 404 else None)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return _failed(500, f"internal error: {type(error).__name__}; see the server's log", "server_error")


def _failed(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(message, kind, param, code), status)
