"""Talk to a model in the terminal, with pictures by path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from ernietune.errors import DataError, ErnietuneError
from ernietune.infer.engine import Engine
from ernietune.infer.request import Delta, SamplingParams
from ernietune.infer.text_stream import final_answer
from ernietune.media.image import open_image
from ernietune.text.messages import Conversation, Message, Part

CHAT_SAMPLING = SamplingParams(max_tokens=1024, temperature=0.95, top_p=0.7)
"""The sampling settings of ERNIE's own command-line chat."""

GREETING = (
    "Type a message. `clear` forgets the conversation, `exit` or Ctrl-D leaves, Ctrl-C stops an answer."
)
PICTURE_GREETING = "`/image PATH`, or just the path, attaches a picture to the next message."
_PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def chat(
    engine: Engine,
    params: SamplingParams = CHAT_SAMPLING,
    system: str | None = None,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
    **template_options: Any,
) -> None:
    """Read messages and stream answers until `exit` or the end of the input.

    `read` is called with the prompt and raises EOFError at the end, as `input` does; the answers go to `out`
    (default: the standard output).
    """
    Chat(engine, params, system, out or sys.stdout, template_options).run(read)


class Chat:
    """One conversation and the pictures waiting for its next message."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None,
        out: TextIO,
        options: dict[str, Any],
    ) -> None:
        self._engine, self._params, self._out, self._options = engine, params, out, options
        self._start = [Message("system", (Part("text", system),))] if system else []
        self._clear()

    def run(self, read: Callable[[str], str]) -> None:
        """Answer one line after the other."""
        self._say(GREETING)
        if self._engine.reads_pictures:
            self._say(PICTURE_GREETING)
        for line in _lines(read):
            if line == "exit":
                return
            self._handle(line)

    def _handle(self, line: str) -> None:
        picture = _picture_path(line)
        if line == "clear":
            self._clear()
            self._say("The conversation is empty again.")
        elif picture is not None:
            self._attach(picture)
        elif line:
            self._answer(line)

    def _clear(self) -> None:
        self._messages = list(self._start)
        self._pictures: list[str] = []

    def _attach(self, path: str) -> None:
        """Remember a picture for the next message; opening it now shows a mistake where it was made."""
        if not self._engine.reads_pictures:
            self._say("This model reads text only.")
            return
        try:
            size = open_image(path).size
        except DataError as error:
            self._say(f"error: {error}")
            return
        self._pictures.append(path)
        self._say(f"Picture {Path(path).name} ({size[0]} x {size[1]}) goes with your next message.")

    def _answer(self, line: str) -> None:
        """Stream the answer; a failed turn leaves the conversation as it was."""
        parts = (*(Part("image", url=path) for path in self._pictures), Part("text", line))
        messages = [*self._messages, Message("user", parts)]
        try:
            request = self._engine.prepare(Conversation(tuple(messages)), **self._options)
            with closing(self._engine.stream(request, self._params)) as deltas:
                text = self._show(deltas)
        except ErnietuneError as error:
            self._say(f"error: {error}")
            return
        # As the templates want it: the thoughts of earlier turns are not read again.
        self._messages = [*messages, Message("assistant", (Part("text", final_answer(text)),))]
        self._pictures = []

    def _show(self, deltas: Iterator[Delta]) -> str:
        """Print the answer as it comes; Ctrl-C ends it where it is."""
        text, reason = "", None
        try:
            for delta in deltas:
                text, reason = text + delta.text, delta.finish_reason
                self._out.write(delta.text)
                self._out.flush()
        except KeyboardInterrupt:
            reason = None
        note = {"stop": "", "length": " [cut off: the limit of tokens is reached]", None: " [stopped]"}[
            reason
        ]
        self._say(note)
        return text

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def _lines(read: Callable[[str], str]) -> Iterator[str]:
    """Lines until the input ends; Ctrl-C at the prompt drops the line."""
    while True:
        try:
            yield read("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _picture_path(line: str) -> str | None:
    """The path in `/image PATH`, or the line itself when it is the path of an existing picture."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        return rest.strip().strip("'\"")
    bare = line.strip("'\"")
    is_picture = Path(bare).suffix.lower() in _PICTURE_SUFFIXES and Path(bare).is_file()
    return bare if is_picture else None
