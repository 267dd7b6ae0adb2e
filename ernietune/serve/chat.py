"""Talk to a model in the terminal, with media by path and tools; the model is here or behind a URL."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from ernietune.errors import DataError, ErnietuneError
from ernietune.media.image import open_image
from ernietune.media.video import VideoLimits, open_video
from ernietune.serve.agent import Speaker, Turn, answer_message, converse
from ernietune.serve.display import Display
from ernietune.serve.tools import Toolbox
from ernietune.serve.uploads import kind_of
from ernietune.serve.wire import conversation_records
from ernietune.text.messages import Conversation, Message, Part, parse_conversation
from ernietune.text.parse import Event, collect

GREETING = "Type a message. Ctrl-C stops an answer, `exit` or Ctrl-D leaves, `/help` lists the commands."
PICTURE_GREETING = (
    "`/image PATH` and `/video PATH`, or just the path, attach a picture or a video to the next message."
)
HELP = """\
/system TEXT   set the system message; without TEXT there is none
/image PATH    attach a picture to the next message; the path alone does the same
/video PATH    attach a video in the same way
/think         fold the thoughts of the model, or show them, the last one included
/tools         list the tools that the model may call
/history       print the conversation
/save FILE     write the conversation as a record of training data
/load FILE     go on with a saved one
/clear         forget the conversation (also: clear)
/exit          leave (also: exit, quit, Ctrl-D)"""
_LEAVING = ("exit", "quit", "/exit", "/quit")


def chat(
    speaker: Speaker,
    system: str | None = None,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
    tools: Toolbox | None = None,
) -> None:
    """Read messages and stream answers until `exit` or the end of the input.

    `read` is called with the prompt and raises EOFError at the end, as `input` does; the answers go to `out`
    (default: the standard output), thoughts dimmed where that is a terminal. `tools` may be called by the
    model.
    """
    with suppress(ImportError):  # line editing and earlier lines by the arrow keys, where Python has it
        import readline  # noqa: F401
    Chat(speaker, system, out or sys.stdout, tools or Toolbox()).run(read)


class Chat:
    """One conversation and the pictures and videos waiting for its next message."""

    def __init__(self, speaker: Speaker, system: str | None, out: TextIO, tools: Toolbox) -> None:
        self._speaker, self._tools = speaker, tools
        self._display = Display(out)
        self._say = self._display.say
        self._system = system
        self._messages: list[Message] = []
        self._media: list[Part] = []

    def run(self, read: Callable[[str], str]) -> None:
        """Answer one line after the other."""
        self._say(GREETING)
        if self._speaker.reads_pictures:
            self._say(PICTURE_GREETING)
        for line in _lines(read):
            if line in _LEAVING:
                return
            try:
                self._handle(line)
            except ErnietuneError as error:  # the conversation is as it was before the line
                self._say(f"error: {error}")

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._attach,
            "/video": self._attach_video,
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
            "/think": self._fold,
            "/tools": self._list_tools,
            "/history": self._print_history,
            "/help": lambda _: self._say(HELP),
        }
        bare = line.strip("'\"")
        if line == "clear":
            self._clear()
        elif command in commands:
            commands[command](rest.strip().strip("'\""))
        elif (kind := kind_of(bare)) and Path(bare).is_file():
            (self._attach if kind == "image" else self._attach_video)(bare)
        elif line.startswith("/") and command[1:].isalpha():
            self._say(f"There is no command {command}; /help lists them.")
        elif line:
            self._answer(line)

    def _clear(self, _: str = "") -> None:
        self._messages, self._media = [], []
        self._say("The conversation is empty again.")

    def _fold(self, _: str) -> None:
        """Fold thoughts from now on, or show them and the one that was folded last."""
        display = self._display
        display.folded = not display.folded
        self._say("Thoughts are folded from now on." if display.folded else "Thoughts are shown from now on.")
        if not display.folded and display.thought:
            display.dim(display.thought.strip() + "\n")

    def _list_tools(self, _: str) -> None:
        for tool in self._tools.tools:
            function = tool.schema["function"]
            arguments = ", ".join(function["parameters"]["properties"])
            self._say(f"{tool.name}({arguments}): {function['description'].splitlines()[0]}")
        if not self._tools.tools:
            self._say("There are no tools; start the chat with --tools FILE.py.")

    def _print_history(self, _: str) -> None:
        for message in self._conversation([]).messages:
            media = "".join(f"[{_name(part)}] " for part in message.parts if part.kind != "text")
            calls = "".join(f"-> {call.name}({json.dumps(call.arguments)}) " for call in message.tool_calls)
            self._say(f"{message.role}: {media}{message.text}{calls}")

    def _attach(self, path: str) -> None:
        """Remember a picture for the next message; opening it now shows a mistake where it was made."""
        if not self._speaker.reads_pictures:
            self._say("This model reads text only.")
            return
        size = open_image(path).size
        self._media.append(Part("image", url=_absolute(path)))
        self._say(f"Picture {Path(path).name} ({size[0]} x {size[1]}) goes with your next message.")

    def _attach_video(self, path: str) -> None:
        """The same for a video; its frames are looked at once."""
        if not self._speaker.reads_pictures:
            self._say("This model reads text only.")
            return
        deque(open_video(path, VideoLimits()), maxlen=0)
        self._media.append(Part("video", url=_absolute(path)))
        self._say(f"Video {Path(path).name} goes with your next message.")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._say("The system message is set." if text else "There is no system message any more.")

    def _save(self, path: str) -> None:
        """Write the conversation as one record of training data."""
        conversation = self._conversation([])
        record: dict[str, object] = {"messages": conversation_records(conversation)}
        if conversation.tools:
            record["tools"] = list(conversation.tools)
        try:
            with Path(path).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except FileExistsError as error:
            raise DataError(f"{path} exists already; choose another name") from error
        except OSError as error:
            raise DataError(f"cannot write {path!r}: {error.strerror}") from error
        self._say(f"Saved {len(self._messages)} messages to {path}.")

    def _load(self, path: str) -> None:
        try:
            record = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path!r}: {error}") from error
        conversation = parse_conversation(record, path)
        there = {tool.name for tool in self._tools.tools}
        if absent := [name for tool in conversation.tools if (name := tool["function"]["name"]) not in there]:
            raise DataError(f"{path} offers the tool {absent[0]}, which this chat does not have; see --tools")
        messages = list(conversation.messages)
        self._system = messages.pop(0).text if messages[0].role == "system" else None
        self._messages, self._media = messages, []
        self._say(f"Loaded {len(messages)} messages from {path}.")

    def _conversation(self, new: list[Message]) -> Conversation:
        start = [Message("system", (Part("text", self._system),))] if self._system else []
        return Conversation((*start, *self._messages, *new), self._tools.schemas)

    def _answer(self, line: str) -> None:
        """Stream the answer; a failed turn leaves the conversation as it was."""
        parts = (*self._media, Part("text", line))
        question = Message("user", parts)
        self._display.begin()
        answers, reason = self._follow(self._conversation([question]))
        self._display.end(reason)
        self._messages += [question, *answers]
        self._media = []

    def _follow(self, asked: Conversation) -> tuple[list[Message], str | None]:
        """Show the answer as it comes, the tool calls with it; Ctrl-C ends it where it is."""
        kept: list[Message] = []
        open_events: list[Event] = []
        reason: str | None = None
        try:
            with closing(converse(self._speaker, asked, self._tools)) as pieces:
                for piece in pieces:
                    self._display.show(piece)
                    if isinstance(piece, Event):
                        open_events.append(piece)
                    elif isinstance(piece, Turn):
                        kept += piece.messages
                        reason, open_events = piece.finish_reason, []
        except KeyboardInterrupt:
            # What was said stays; calls without a result do not.
            said = replace(collect(open_events), calls=())
            return [*kept, answer_message(said)], None
        return kept, reason


def _name(part: Part) -> str:
    """A picture or video for the history; a list of frames by its first one."""
    more = f" and {len(part.frames) - 1} more frames" if len(part.frames) > 1 else ""
    return (part.url or part.frames[0])[:60] + more


def _absolute(path: str) -> str:
    """A saved conversation should find its media from anywhere."""
    return path if urlsplit(path).scheme else str(Path(path).expanduser().absolute())


def _lines(read: Callable[[str], str]) -> Iterator[str]:
    """Lines until the input ends; Ctrl-C at the prompt drops the line."""
    while True:
        try:
            yield read("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
