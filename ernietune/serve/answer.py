"""The JSON of answers: chats with reasoning and tool calls, completions, models."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from ernietune.infer.request import Delta
from ernietune.text.parse import Call, Event, OutputParser, Parsed

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Step:
    """One step of a parsed generation: its events, and the tokens so far."""

    events: list[Event]
    tokens: int
    reasoning_tokens: int
    finish_reason: FinishReason | None = None


async def parsed(
    deltas: AsyncGenerator[Delta, None], parser: OutputParser, one_call: bool = False
) -> AsyncGenerator[Step, None]:
    """Take a generation apart as it runs; with `one_call` it ends behind its first tool call."""
    tokens = reasoning_tokens = 0
    called = False
    async with aclosing(deltas):
        async for delta in deltas:
            reasoning_tokens += len(delta.ids) if parser.thinking else 0
            tokens += len(delta.ids)
            events = parser.feed(delta.text)
            if delta.finish_reason is not None:
                events += parser.finish()
            ends = [index for index, event in enumerate(events) if event.kind == "call_end"]
            called = called or bool(ends)
            if one_call and ends:
                yield Step(events[: ends[0] + 1], tokens, reasoning_tokens, "tool_calls")
                return
            stopped_to_call = called and delta.finish_reason == "stop"
            yield Step(
                events, tokens, reasoning_tokens, "tool_calls" if stopped_to_call else delta.finish_reason
            )


@dataclass(frozen=True)
class _Answer:
    """What all objects of one response share."""

    model: str
    prompt_tokens: int
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, tokens: int, reasoning_tokens: int = 0) -> dict[str, Any]:
        """Token counts of prompt and answer."""
        details = {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            **(details if reasoning_tokens else {}),
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True)
class ChatAnswer(_Answer):
    """Builds the JSON of one chat answer; all chunks of a stream share its id and time."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    def completion(self, parsed: Parsed, last: Step) -> dict[str, Any]:
        """The body of a response in one piece."""
        choice = {
            "index": 0,
            "message": message(parsed),
            "logprobs": None,
            "finish_reason": last.finish_reason,
        }
        usage = self.usage(last.tokens, last.reasoning_tokens)
        return self._object("chat.completion", [choice]) | {"usage": usage}

    def chunk(self, delta: dict[str, Any], finish_reason: FinishReason | None = None) -> dict[str, Any]:
        """One chunk of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, last: Step) -> dict[str, Any]:
        """The last chunk of a stream that was asked for usage: it has no choices."""
        usage = self.usage(last.tokens, last.reasoning_tokens)
        return self._object("chat.completion.chunk", []) | {"usage": usage}


@dataclass(frozen=True)
class TextAnswer(_Answer):
    """Builds the JSON of the answers to the prompts of one completion request."""

    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")

    def completion(self, choices: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """The body of a response in one piece."""
        return self.chunk(choices) | {"usage": self.usage(tokens)}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One chunk of a stream; without choices it only carries the usage."""
        return self._object("text_completion", choices)


def text_choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    """One choice of a completion or of a chunk of it."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def message(parsed: Parsed) -> dict[str, Any]:
    """The assistant's message; fields that say nothing are left out, `content` only may be null."""
    silent = None if parsed.reasoning or parsed.calls else ""
    result: dict[str, Any] = {"role": "assistant", "content": parsed.content or silent}
    if parsed.reasoning is not None:
        result["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        result["tool_calls"] = [_tool_call(call) for call in parsed.calls]
    return result


def stream_deltas(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """The `delta` of each chunk. What was sent cannot be taken back: `no_call` and `no_thought` give none.

    The text of a broken call follows as content all the same, so that the content of a stream is that of
    the answer in one piece.
    """
    for event in events:
        if event.kind == "reasoning":
            yield {"reasoning_content": event.text}
        elif event.kind == "content":
            yield {"content": event.text}
        elif event.kind == "call":
            yield {"tool_calls": [{"index": event.index, **_tool_call(Call(event.text, ""))}]}
        elif event.kind == "arguments":
            yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def _tool_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex}", "type": "function", "function": function}


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
        "permission": [],
    }
