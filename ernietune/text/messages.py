"""The messages schema: one JSON record -> a Conversation, with every complaint naming the field.

Training data (`{"messages": [...], "tools"?: [...]}`, one per line) and server requests pass the same parser.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from typing import Any, Literal

from ernietune.text.fields import Field

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

_COMMON_KEYS = ("role", "content")
_ASSISTANT_KEYS = ("reasoning_content", "reasoning", "tool_calls", "weight", "trained")
# OpenAI clients send these back as they got them; the prompt has no place for them.
_IGNORED_KEYS = ("name", "tool_call_id", "id")
_NULL_KEYS = ("refusal", "audio", "annotations", "function_call")
_PART_KINDS = ("text", "image_url", "video_url")
_PART_KINDS_AND_TYPE = ("type", *_PART_KINDS)
_SAMPLING = ("fps", "min_frames", "max_frames", "target_frames")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One piece of content: a text, or an image or a video by path, file://, http(s):// or data: URL.

    A video may also be a list of its `frames`; `sampling` is what it asks for itself of fps, min_frames,
    max_frames and target_frames.
    """

    kind: Literal["text", "image", "video"]
    text: str = ""
    url: str = ""
    frames: tuple[str, ...] = ()
    sampling: dict[str, float] = default(default_factory=dict)

    @property
    def video(self) -> str | tuple[str, ...]:
        """Where a video comes from: its url, or those of its frames."""
        return self.frames or self.url


@dataclass(frozen=True)
class ToolCall:
    """One function call of an assistant, its arguments as an object."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn; `reasoning`, `tool_calls`, `trained` and `weight` belong to the assistant.

    `weight` is what each token of a trained answer counts in the loss.
    """

    role: Role
    parts: tuple[Part, ...]
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    trained: bool = True
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The text parts, joined; images and videos leave nothing behind."""
        return "".join(part.text for part in self.parts)

    @property
    def says_nothing(self) -> bool:
        """True without text, reasoning and tool calls."""
        return not (self.text.strip() or self.reasoning or self.tool_calls)


@dataclass(frozen=True)
class Conversation:
    """The messages of one sample or request and the tools they may call (OpenAI form)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def media(self) -> list[Part]:
        """The images and videos in order of appearance."""
        return [part for message in self.messages for part in message.parts if part.kind != "text"]

    @property
    def images(self) -> list[str]:
        """The image URLs in order of appearance."""
        return [part.url for part in self.media if part.kind == "image"]

    @property
    def videos(self) -> list[Part]:
        """The videos in order of appearance."""
        return [part for part in self.media if part.kind == "video"]


def parse_conversation(record: object, where: str) -> Conversation:
    """Check a record and turn it into a Conversation; DataError names `where` and the field path.

    Accepted and without effect: `name`, `tool_call_id` and `id` of a message, `detail` of an image, and
    `refusal`, `audio`, `annotations`, `function_call` when null (or empty). Any null counts as absent.
    Assistant content that begins with `<think>...</think>` is split into reasoning and content; newlines
    around the reasoning are layout, which the template writes anew. A `weight` of 0 is OpenAI's way to say
    `"trained": false`; any other number above 0 is what the answer counts in the loss.
    """
    root = Field(where, "", record)
    entries = root.entries(("messages", "tools"))
    if "messages" not in entries:
        root.fail('the record has no \'messages\'; expected a list of {"role", "content"} objects')
    fields = entries["messages"].items()
    if not fields:
        entries["messages"].fail("is empty; at least one message is needed")
    return conversation_of(fields, entries["tools"].items() if "tools" in entries else ())


def conversation_of(messages: Sequence[Field], tools: Sequence[Field] = ()) -> Conversation:
    """The same from message and tool objects that may lie anywhere in a record."""
    parsed = tuple(_message(field, index) for index, field in enumerate(messages))
    return Conversation(parsed, tuple(_tool(field) for field in tools))


def _message(field: Field, index: int) -> Message:
    entries = field.entries(_COMMON_KEYS + _ASSISTANT_KEYS + _IGNORED_KEYS + _NULL_KEYS)
    role = field.required(entries, "role").choice(ROLES)
    for key in _NULL_KEYS:
        if key in entries and entries[key].value != []:
            entries[key].fail("is not supported; it may only be null")
    if role == "system" and index > 0:
        field.fail("is a system message; only the first message may be one")
    if role == "assistant":
        return _assistant(field, entries)
    for key in _ASSISTANT_KEYS:
        if key in entries:
            entries[key].fail(f"belongs to assistant messages; this one's role is {role!r}")
    parts = _parts(field.required(entries, "content"), media=role == "user")
    return Message("system" if role == "system" else "user" if role == "user" else "tool", parts)


def _assistant(field: Field, entries: dict[str, Field]) -> Message:
    content = _parts(entries["content"], media=False) if "content" in entries else None
    calls = entries["tool_calls"].items() if "tool_calls" in entries else []
    reasoning = _reasoning(entries)
    if content is None and reasoning is None and not calls:
        field.fail("is an assistant message without 'content', 'reasoning_content' or 'tool_calls'")
    text = "".join(part.text for part in content or ())
    if reasoning is None:
        reasoning, text = _split_thought(text)
    parts = (Part("text", text),) if text else ()
    weight = weight_of(entries["weight"]) if "weight" in entries else 1.0
    trained = _trained(entries) and weight > 0
    return Message(
        "assistant",
        parts,
        reasoning,
        tuple(_tool_call(c) for c in calls),
        trained,
        weight if trained else 1.0,
    )


def _reasoning(entries: dict[str, Field]) -> str | None:
    given = [entries[key] for key in ("reasoning_content", "reasoning") if key in entries]
    texts = [field.string() for field in given]
    if len(set(texts)) > 1:
        given[1].fail("differs from 'reasoning_content'; give one of the two")
    return texts[0] if texts else None


def _split_thought(text: str) -> tuple[str | None, str]:
    match = _THOUGHT.match(text)
    if match is None:
        return None, text
    return match.group(1).strip("\n"), text[match.end() :].lstrip("\n")


def _trained(entries: dict[str, Field]) -> bool:
    if "trained" not in entries:
        return True
    field = entries["trained"]
    if field.value not in (0, 1):
        field.fail(f"is {field.value!r}; allowed: true, false, 1, 0")
    return bool(field.value)


def weight_of(field: Field) -> float:
    """A weight: a finite number of at least 0; true and false stand for 1 and 0."""
    if not isinstance(field.value, int | float):
        field.wrong_type("a number")
    if not 0 <= field.value <= sys.float_info.max:
        field.fail(f"is {field.value}; a weight must be a finite number, at least 0")
    return float(field.value)


def _parts(field: Field, media: bool) -> tuple[Part, ...]:
    if isinstance(field.value, str):
        return (Part("text", field.string()),)
    if not isinstance(field.value, list):
        field.wrong_type("a string or a list of parts")
    return tuple(_part(item, media) for item in field.items())


def _part(field: Field, media: bool) -> Part:
    entries = field.entries(_PART_KINDS_AND_TYPE)
    kind = field.required(entries, "type").choice(_PART_KINDS)
    if len(entries) > 2:
        field.fail(f"is of type {kind!r} and may hold only 'type' and {kind!r}")
    content = field.required(entries, kind)
    if kind == "text":
        return Part("text", content.string())
    if not media:
        name = "an image; images" if kind == "image_url" else "a video; videos"
        field.fail(f"is {name} may stand in user messages only")
    if kind == "video_url":
        return _video(content)
    if isinstance(content.value, dict):
        content = content.required(content.entries(("url", "detail")), "url")
    return Part("image", url=_url(content))


def _url(field: Field) -> str:
    if not field.string():
        field.fail("is empty; expected a path or a file://, http(s):// or data: URL")
    return field.string()


def _video(field: Field) -> Part:
    if not isinstance(field.value, dict):
        return Part("video", url=_url(field))
    entries = field.entries(("url", "frames", *_SAMPLING))
    if ("url" in entries) == ("frames" in entries):
        field.fail("needs either 'url' or 'frames', a list of pictures")
    sampling = {key: _positive(entries[key], key) for key in _SAMPLING if key in entries}
    if "url" in entries:
        return Part("video", url=_url(entries["url"]), sampling=sampling)
    frames = tuple(_url(item) for item in entries["frames"].items())
    if not frames:
        entries["frames"].fail("is empty; a video needs at least one frame")
    if "min_frames" in entries:
        entries["min_frames"].fail(
            "is for videos in one file; of a list all frames are seen, up to max_frames"
        )
    return Part("video", frames=frames, sampling=sampling)


def _positive(field: Field, key: str) -> float:
    value = field.value
    expected = "number" if key == "fps" else "whole number"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
        field.fail(f"is {value!r}; expected a positive {expected}")
    if key != "fps" and value != int(value):
        field.fail(f"is {value!r}; expected a positive {expected}")
    return float(value) if key == "fps" else int(value)


def _tool_call(field: Field) -> ToolCall:
    entries = field.entries(("id", "type", "index", "function"))
    if "type" in entries:
        entries["type"].choice(("function",))
    function = field.required(entries, "function")
    members = function.entries(("name", "arguments"))
    name = function.required(members, "name").string()
    return ToolCall(name, _arguments(function.required(members, "arguments")))


def _arguments(field: Field) -> dict[str, Any]:
    value = field.value
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except json.JSONDecodeError as error:
            field.fail(f"is not valid JSON: {error}")
    if not isinstance(value, dict):
        field.wrong_type("an object, or a string holding a JSON object")
    Field(field.where, field.path, value).json()
    return value


def _tool(field: Field) -> dict[str, Any]:
    entries = field.entries(("type", "function"))
    field.required(entries, "type").choice(("function",))
    function = field.required(entries, "function")
    members = function.entries(("name", "description", "parameters", "strict"))
    function.required(members, "name").string()
    if "description" in members:
        members["description"].string()
    if "parameters" in members and not isinstance(members["parameters"].value, dict):
        members["parameters"].wrong_type("an object (a JSON schema)")
    field.json()
    assert isinstance(field.value, dict)
    return field.value
