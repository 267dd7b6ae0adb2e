"""OpenAI's chat completions: what comes in is checked, what goes out is built here."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ernietune.errors import RequestError
from ernietune.infer.request import FinishReason, SamplingParams

# Fields that would change the answer and are not supported, with the values that ask for nothing.
# Every other unknown field is harmless (user, store, service_tier, ...) and ignored.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (False,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "thinking_token_budget": (),
    "reasoning_max_tokens": (),
    "response_max_tokens": (),
    "include_stop_str_in_output": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "structural_tag": (),
    "logits_processors_args": ({},),
    "chat_template": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "echo": (False,),
    "prompt_token_ids": (),
    "return_token_ids": (False,),
}


class UnsupportedField(RequestError):
    """A request asks for something that this server cannot do; `field` names it."""

    def __init__(self, field: str, value: object) -> None:
        super().__init__(f"{field}={value!r} is not supported by this server; leave the field out")
        self.field = field


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions; the model's name is not checked."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise RequestError for a field that would be ignored although it changes the answer."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise UnsupportedField(name, value)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true")

    def record(self) -> dict[str, Any]:
        """The conversation in the form of the training data; tool_choice "none" leaves the tools out."""
        offered = self.tools and (self.model_extra or {}).get("tool_choice") != "none"
        return {"messages": self.messages, **({"tools": self.tools} if offered else {})}

    def sampling(self) -> SamplingParams:
        """The sampling settings, with OpenAI's defaults; SettingError names one that is out of range."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        newer = self.max_completion_tokens
        return SamplingParams(
            max_tokens=self.max_tokens if newer is None else newer,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def template_options(self) -> dict[str, Any]:
        """Options of the chat template; enable_thinking wins over chat_template_kwargs over metadata."""
        options = dict(self.chat_template_kwargs or {})
        in_metadata = (self.metadata or {}).get("enable_thinking")
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        elif in_metadata is not None:
            options.setdefault("enable_thinking", in_metadata)
        return options


@dataclass(frozen=True)
class Answer:
    """Builds the JSON of one response; all chunks of a stream share its id and time."""

    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, completion_tokens: int, finish_reason: FinishReason) -> dict[str, Any]:
        """The body of a response in one piece."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": self.usage(completion_tokens)}

    def chunk(self, delta: dict[str, str], finish_reason: FinishReason | None = None) -> dict[str, Any]:
        """One chunk of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream that was asked for usage: it has no choices."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Token counts of prompt and answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def model_card(name: str, max_length: int, created: int) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ernietune",
        "root": name,
        "parent": None,
        "max_model_len": max_length,
    }


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
