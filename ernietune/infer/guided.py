"""Answers that have to fit a grammar: which tokens may follow is worked out on the bytes they stand for.

The grammar is llguidance's affair (extra `guided`); here is what it has to know of a tokenizer, and the mask.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ernietune.infer.guide import Grammar, Guide
from ernietune.infer.request import SettingError

INSTALL = "pip install 'ernietune[guided]'"
_COMPILED = 64  # grammars kept for requests that ask for the same again
# White space between the parts of JSON: one space, or a new line with its indentation. Where any goes, a
# model that is held to a form it does not know writes little else.
_JSON_SPACE = r" |\n {0,20}"


class Speller(Protocol):
    """The part of a tokenizer that says which bytes a token adds to a text, None for a control token."""

    def spelling(self, token: int) -> bytes | None: ...
    def encode_plain(self, text: str) -> list[int]: ...


class Guides:
    """Makes grammars of guides, for one vocabulary; thread-safe."""

    def __init__(self, tokenizer: Speller, words: int, ends: Sequence[int]) -> None:
        """`words` tokens, of which `ends` may end an answer where its grammar does."""
        self._tokenizer, self._words, self._ends = tokenizer, words, tuple(ends)
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compile = functools.lru_cache(_COMPILED)(self._compiled)

    def start(self, guide: Guide) -> GuideState:
        """The grammar at its beginning; SettingError for one that is wrong, or when the extra is missing."""
        with self._lock:
            matcher = self._compile(guide)
        return GuideState(guide.field, matcher.deep_copy())

    def _compiled(self, guide: Guide) -> Any:
        library = _library(guide.field)
        if self._vocabulary is None:
            self._vocabulary = self._spelled(library)
        try:
            text = json.dumps({"grammars": [_entry(grammar, library) for grammar in guide.grammars]})
        except ValueError as error:
            raise SettingError(guide.field, f"is no grammar ({_one_line(error)})") from error
        matcher = library.LLMatcher(self._vocabulary, text, log_level=0)
        if matcher.is_error():
            raise SettingError(guide.field, f"cannot be followed: {_one_line(matcher.get_error())}")
        return matcher

    def _spelled(self, library: ModuleType) -> Any:
        wrapped = library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._words, self._ends[0]))
        return library.LLTokenizer(wrapped, n_vocab=self._words, eos_token=list(self._ends))


class GuideState:
    """Where one answer stands in its grammar."""

    def __init__(self, field: str, matcher: Any) -> None:
        self._field, self._matcher = field, matcher

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits [V] with what may not follow at minus infinity; the argument stays as it is."""
        return np.where(self._allowed(logits.size), logits, np.float32(-np.inf))

    def allows(self, token: int) -> bool:
        """Whether the token may follow."""
        return bool(self._allowed(token + 1)[token])

    def push(self, token: int) -> None:
        """Go on behind a token that may follow."""
        if not self._matcher.consume_token(token):
            raise self._stuck()

    def _allowed(self, words: int) -> NDArray[np.bool_]:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._stuck()
        return np.unpackbits(np.frombuffer(mask, np.uint8), count=words, bitorder="little").view(np.bool_)

    def _stuck(self) -> SettingError:
        return SettingError(
            self._field, f"could not be followed any further: {_one_line(self._matcher.get_error())}"
        )


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of each token, and which of them are no text."""

    bos_token_id = None

    def __init__(self, tokenizer: Speller, words: int, end: int) -> None:
        spelled = [tokenizer.spelling(token) for token in range(words)]
        self._tokenizer, self.eos_token_id = tokenizer, end
        self.special_token_ids = [token for token, text in enumerate(spelled) if text is None]
        # A control token gets a name that no text can have: 0xFF never occurs in UTF-8.
        self.tokens = [b"\xff%d" % token if text is None else text for token, text in enumerate(spelled)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text)


def _library(field: str) -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise SettingError(field, f"needs guided decoding: {INSTALL}") from error
    return llguidance


def _entry(grammar: Grammar, library: ModuleType) -> dict[str, object]:
    """A grammar as llguidance takes it."""
    if grammar.form == "json":
        schema = {"x-guidance": {"whitespace_pattern": _JSON_SPACE}} | json.loads(grammar.text)
        return {"name": grammar.name, "json_schema": schema}
    lark = grammar.text
    if grammar.form == "regex":
        # \d means 0 to 9: nobody who asks for digits wants those of other scripts.
        lark = f"start: /{library.regex_to_lark(lark, use_ascii='d')}/"
    elif grammar.form == "any":
        lark = library.grammar_from("grammar", lark)
    return {"name": grammar.name, "lark_grammar": lark}


def _one_line(error: object) -> str:
    """The library's words on one line, without the picture of the place and the state of its parser."""
    lines = [line.strip() for line in str(error).partition("<state>")[0].splitlines()]
    return " ".join(line for line in lines if line.strip("^| "))[:400]
