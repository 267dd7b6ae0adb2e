"""Text out of tokens, one at a time: never half a character, never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """The text of one answer as its tokens arrive, cut before the first stop string.

    With `include_stop` it is cut behind that string.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._characters = Detokenizer(tokenizer)
        self._stops = StopStrings(stop, include_stop)

    @property
    def stopped(self) -> bool:
        """True once a stop string was found; further tokens add nothing."""
        return self._stops.found

    def push(self, token: int, may_stop: bool = True) -> str:
        """The text that became certain with this token; unless it `may_stop`, no stop string lies in it."""
        text = self._characters.push(token)
        return self._stops.push(text) if may_stop else text

    def finish(self) -> str:
        """The text that was held back; call it once, when no token follows."""
        return self._stops.push(self._characters.finish()) + self._stops.finish()


class Detokenizer:
    """Decodes a growing list of tokens; a character spread over several byte tokens comes out whole.

    Only the tokens since the last emitted character are decoded again, together with those of that character:
    a tokenizer may treat the first token of a text in a special way.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._known: list[int] = []  # tokens of the last emitted text, the context of the new ones
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, often "" inside of a character."""
        self._new.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._known, self._new = self._new, []
        return text

    def finish(self) -> str:
        """What is left, with replacement characters for bytes that never became a character."""
        text = self._new_text()
        self._known, self._new = self._new, []
        return text

    def _new_text(self) -> str:
        context = self._tokenizer.decode(self._known)
        return self._tokenizer.decode(self._known + self._new)[len(context) :]


class StopStrings:
    """Passes text through up to the stop string that is complete first, holding back what may become one.

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop, self._include = tuple(stop), include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain and was not returned yet."""
        if self.found:
            return ""
        text = self._held + text
        hits = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)[0 if self._include else 1]]
        certain = len(text) - self._possible_prefix(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The held text: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _possible_prefix(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0


def final_answer(text: str) -> str:
    """The answer alone: what follows the thought, without the <response> tags of thinking models."""
    _, _, answer = text.rpartition("</think>")
    return answer.replace("<response>", "").replace("</response>", "").strip()
