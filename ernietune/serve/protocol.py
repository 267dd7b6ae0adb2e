"""Requests in OpenAI's form: checked, and mapped to the engine's settings, here and only here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ernietune.errors import RequestError, listed
from ernietune.infer.guide import Guide
from ernietune.infer.request import SamplingParams, SettingError
from ernietune.serve.guides import chat_guide, guide_of
from ernietune.serve.tool_choice import forces_call
from ernietune.serve.unsupported import check_extras
from ernietune.text.messages import parse_conversation

_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
# What the server itself gives to the chat template.
_RESERVED_OPTIONS = {
    "conversation",
    "open_picture",
    "open_clip",
    "media_tokens",
    "messages",
    "tools",
    "self",
    "train_all_turns",
}


_OBJECTS = {"type": "array", "items": {"type": "object"}}
_NULLABLE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
# `text.messages` checks messages, as it checks training data, and names what is wrong; this describes them.
_Message = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": {"enum": ["system", "user", "assistant", "tool"]},
                "content": {
                    "anyOf": [*_NULLABLE_TEXT["anyOf"], {"type": "array", "items": {"type": "object"}}]
                },
                "reasoning_content": _NULLABLE_TEXT,
                "tool_calls": _OBJECTS,
                "tool_call_id": {"type": "string"},
                "name": {"type": "string"},
            },
        }
    ),
]


class ModelNotFound(RequestError):
    """A strict server was asked for a model of another name."""

    def __init__(self, name: str, served: Sequence[str]) -> None:
        super().__init__(f"the model {name!r} is not served here; there is {listed(served)}")


class RequestBody(BaseModel):
    """What all request bodies have in common: a value of another type is refused, not read as its like."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        """JSON can spell halves of surrogate pairs, which are no text and could not be sent back."""
        if not isinstance(body, dict):
            return body  # refused next
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair; that is no text") from None
        except RecursionError:
            raise ValueError("the body is nested too deeply") from None
        return body


def _whole(value: object) -> object:
    """JSON has one type of numbers, and some languages write 8 as 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Switch = bool | None
"""Clients send null for what they leave open; it is the same as false."""


class StreamOptions(RequestBody):
    """What a stream carries besides text."""

    include_usage: Switch = False
    continuous_usage_stats: Switch = False


class SamplingFields(RequestBody):
    """How an answer is drawn and sent; the same for chats and completions."""

    model: str | None = None
    max_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: Switch = False
    n: Whole | None = None
    min_p: float | None = None
    min_tokens: Whole | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Whole] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[Whole] | None = None
    include_stop_str_in_output: Switch = False
    stream: Switch = False
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: Switch = False
    priority: Whole | None = None
    cache_salt: str | None = None
    request_id: str | None = Field(default=None, min_length=1, max_length=256)
    reasoning_max_tokens: Whole | None = None
    thinking_token_budget: Whole | None = None
    enable_in_reasoning: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    elsewhere: ClassVar[frozenset[str]] = frozenset()

    def check(self, served: Sequence[str] | None = None) -> list[str]:
        """Raise RequestError for a field that would be ignored although it changes the answer.

        `served` are the only model names that are accepted; None accepts any. Returns the names of fields
        that nobody knows.
        """
        unknown = check_extras(self.model_extra or {}, type(self).model_fields, self.elsewhere)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true")
        if served is not None and self.model is not None and self.model not in served:
            raise ModelNotFound(self.model, served)
        return unknown

    def sampling(
        self, seed: int | None = None, bad_words: tuple[tuple[int, ...], ...] = ()
    ) -> SamplingParams:
        """The sampling settings, with OpenAI's defaults; SettingError names one that is out of range.

        `seed` is for requests that bring none, `bad_words` are the tokens of the field of that name.
        """
        logprobs, prompt_logprobs = self.reports()
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "n": self.n,
            "min_p": self.min_p,
            "min_tokens": self.min_tokens,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return SamplingParams(
            max_tokens=self.token_limit(),
            seed=seed if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            bad_words=bad_words + tuple((token,) for token in self.bad_words_token_ids or ()),
            logit_bias=_biases(self.logit_bias or {}),
            allowed_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            include_stop=bool(self.include_stop_str_in_output),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            guide=self.guide(),
            reasoning_limit=self.reasoning_limit(),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def reports(self) -> tuple[int | None, int | None]:
        """How many alternatives to report beside each token of the answer and of the prompt."""
        return None, None

    def guide(self) -> Guide | None:
        """The form that the answer has to have, None for a free one; SettingError."""
        names = ("response_format", "structured_outputs", *_GUIDED)
        return guide_of({name: value for name, value in self if name in names})

    def reasoning_limit(self) -> int | None:
        """The most tokens of a thought; FastDeploy's name of the field wins over vLLM's."""
        fastdeploy, vllm = self.reasoning_max_tokens, self.thinking_token_budget
        return vllm if fastdeploy is None else fastdeploy

    def token_limit(self) -> int | None:
        """The most tokens to generate, None for as many as the context holds."""
        return self.max_tokens


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), bias) for token, bias in given.items())
    except ValueError as error:
        raise SettingError("logit_bias", f"has keys that are no token ids ({error})") from error


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    max_completion_tokens: Whole | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    elsewhere = frozenset(("prompt", "echo", "best_of"))

    @property
    def uses_tools(self) -> bool:
        """Whether the model may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def guide(self) -> Guide | None:
        """As for all requests; tools that have to be called are a form too, those that may be one more."""
        guide, tools = super().guide(), self.tools or [] if self.uses_tools else []
        if guide or forces_call(self.tool_choice):
            parse_conversation(self.record(), "request")  # names and parameters are relied on from here
        return chat_guide(guide, self.tool_choice, tools, self.parallel_tool_calls is not False)

    def check(self, served: Sequence[str] | None = None) -> list[str]:
        """As for all requests; and what depends on logprobs, or belongs to the server."""
        unknown = super().check(served)
        if self.top_logprobs and not self.logprobs:
            raise SettingError("top_logprobs", "needs logprobs=true")
        reserved = _RESERVED_OPTIONS & self.template_options().keys()
        if reserved:
            raise RequestError(f"chat_template_kwargs may not set {min(reserved)!r}")
        return unknown

    def reports(self) -> tuple[int | None, int | None]:
        """`top_logprobs` of the answer, when logprobs are wanted."""
        return (self.top_logprobs or 0 if self.logprobs else None), None

    def record(self) -> dict[str, Any]:
        """The conversation in the form of the training data; tool_choice "none" leaves the tools out."""
        return {"messages": self.messages, **({"tools": self.tools} if self.uses_tools else {})}

    def token_limit(self) -> int | None:
        """`max_completion_tokens` wins over its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def template_options(self) -> dict[str, Any]:
        """Options of the chat template; enable_thinking wins over chat_template_kwargs over metadata."""
        options = dict(self.chat_template_kwargs or {})
        in_metadata = (self.metadata or {}).get("enable_thinking")
        if options.pop("add_generation_prompt", True) is not True:
            raise RequestError("chat_template_kwargs: add_generation_prompt is always true here")
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        elif in_metadata is not None:
            options.setdefault("enable_thinking", in_metadata)
        return options


TokenIds = list[Annotated[int, Field(strict=True, ge=0, lt=2**63)]]


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions: one prompt or several, as text or as token ids."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Whole | None = 16
    logprobs: Whole | None = None
    echo: Switch = False
    best_of: Whole | None = None

    elsewhere = frozenset(
        (
            "messages",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "top_logprobs",
            "max_completion_tokens",
            "enable_thinking",
            "chat_template_kwargs",
        )
    )

    def check(self, served: Sequence[str] | None = None) -> list[str]:
        """As for all requests; a stream cannot take back the tries that were not the best."""
        unknown = super().check(served)
        if self.best_of is None:
            return unknown
        if self.best_of < (self.n or 1):
            raise SettingError("best_of", f"is {self.best_of}; it must be at least n ({self.n or 1})")
        if self.stream and self.best_of != (self.n or 1):
            raise SettingError("best_of", "above n needs stream=false: only the end shows which are the best")
        return unknown

    def sampling(
        self, seed: int | None = None, bad_words: tuple[tuple[int, ...], ...] = ()
    ) -> SamplingParams:
        """As for all requests; `best_of` choices are drawn, with the log-probabilities to compare them by."""
        params = super().sampling(seed, bad_words)
        if self.best_of in (None, params.n):
            return params
        return replace(params, n=self.best_of, logprobs=params.logprobs or 0)

    def reports(self) -> tuple[int | None, int | None]:
        """With `echo` the prompt's are reported too, or only read when no token is to be made."""
        scored = self.echo and (self.logprobs is not None or self.max_tokens == 0)
        return self.logprobs, (self.logprobs or 0) if scored else None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_form(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError("expected a string, token ids, or a list of either") from None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one; RequestError when there are none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt is empty; at least one token is needed")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(RequestBody):
    """The body of POST /tokenize: a text, or a chat with its generation prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[_Message] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    def chat(self) -> ChatRequest | None:
        """The chat, None for a text; RequestError unless there is exactly one of them."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either 'prompt' or 'messages'")
        if self.messages is None:
            return None
        if not self.messages:
            raise RequestError("messages is empty; at least one message is needed")
        chat = ChatRequest(
            model=self.model,
            messages=self.messages,
            tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        chat.check()
        return chat


class DetokenizeRequest(RequestBody):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
