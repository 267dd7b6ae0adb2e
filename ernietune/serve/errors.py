"""Every error leaves in OpenAI's shape; what the client can repair is a 4xx, never a 500."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ernietune.errors import CheckpointError, DataError, RequestError
from ernietune.infer.adapters import AdapterConflict, UnknownAdapter
from ernietune.infer.request import ContextLengthError, SettingError
from ernietune.serve.protocol import ModelNotFound
from ernietune.serve.unsupported import UnsupportedField

# The engine's names of settings that requests call otherwise, by route.
_FIELDS = {
    ("", "stop_ids"): "stop_token_ids",
    ("", "allowed_ids"): "allowed_token_ids",
    ("", "include_stop"): "include_stop_str_in_output",
    ("", "prompt_logprobs"): "logprobs",
    ("/v1/chat/completions", "logprobs"): "top_logprobs",
}
# How the OpenAPI document describes them, for routes whose other answers are no JSON.
IN_DOCUMENT: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "The request cannot be served.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorOut"}}},
    }
}
_CODES = {401: "invalid_api_key", 404: "not_found"}


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def add_error_handlers(app: FastAPI) -> None:
    """Answer our errors, FastAPI's own and those that are defects."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            place, reason = first["loc"][-1], first["ctx"]["error"]
            return _failed(400, f"the body is not valid JSON: {reason} at character {place}")
        param = ".".join(str(part) for part in first["loc"][1:])
        problem = first["msg"].removeprefix("Value error, ")
        return _failed(400, f"{param or 'request body'}: {problem}", param=param or None)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return _refused(error, request.url.path)

    @app.exception_handler(DataError)
    async def unreadable(_: Request, error: DataError) -> JSONResponse:
        return _failed(400, str(error), param="messages", code="invalid_value")

    @app.exception_handler(CheckpointError)
    async def damaged(_: Request, error: CheckpointError) -> JSONResponse:
        return _failed(500, str(error), "server_error")

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        answer = _failed(error.status_code, message, code=_CODES.get(error.status_code))
        answer.headers.update(error.headers or {})  # a 405 says what is allowed
        return answer

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return _failed(500, f"internal error: {type(error).__name__}; see the server's log", "server_error")


def _refused(error: RequestError, route: str) -> JSONResponse:
    if isinstance(error, ModelNotFound):
        return _failed(404, str(error), param="model", code="model_not_found")
    if isinstance(error, UnknownAdapter):
        return _failed(404, str(error), param="lora_name", code="model_not_found")
    if isinstance(error, AdapterConflict):
        return _failed(400, str(error), param="lora_name", code="invalid_value")
    if isinstance(error, ContextLengthError):
        prompt = "prompt" if route == "/v1/completions" else "messages"
        return _failed(400, str(error), param=prompt, code="context_length_exceeded")
    if isinstance(error, SettingError):
        field = _FIELDS.get((route, error.field)) or _FIELDS.get(("", error.field), error.field)
        return _failed(400, f"{field} {error.problem}", param=field, code="invalid_value")
    if isinstance(error, UnsupportedField):
        return _failed(400, str(error), param=error.field, code="invalid_value")
    return _failed(400, str(error))


def _failed(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(message, kind, param, code), status)
