"""What the rules work on: the settings of a file of theirs, and our values with where each comes from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from ernietune.compat.keys import ERNIEKIT_ONLY, PADDLEFORMERS_ONLY, REASONS
from ernietune.errors import ConfigError

T = TypeVar("T", str, int, float, bool)
ERNIEKIT, PADDLEFORMERS = "ERNIEKit", "PaddleFormers"
_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
AGREES = "as it is here anyway"


@dataclass(frozen=True)
class Given:
    """One setting of theirs: the key as it is spelled, its value, and where it stands."""

    key: str
    value: Any
    where: str  # file:line, or "command line"
    line: int | None = None

    @property
    def short(self) -> str:
        """Where it stands, for a report that has named the file."""
        return f"line {self.line}" if self.line else self.where

    def fail(self, problem: str) -> NoReturn:
        """Raise the ConfigError that names this setting."""
        raise ConfigError(f"{self.where}: `{self.key}` {problem}")


def parsed(text: str) -> bool | float | str:
    """What a quoted value spells: "1.0" is a number, "True" a boolean."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def converted(setting: Given, kind: type[T]) -> T:
    """The value as a text, number or boolean; ConfigError when it is none."""
    value = setting.value
    if isinstance(value, str) and kind is not str:
        value = parsed(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool) or (number and value in (0, 1)),
        float: number,
        int: number and float(value).is_integer(),
        str: isinstance(value, (str, int, float)),
    }
    if not fits[kind]:
        setting.fail(f"is {setting.value!r}; it must be {_KINDS[kind]}")
    return kind(value)


@dataclass
class Translation:
    """Our values by key path, where each comes from, and what a reader must know."""

    file: str
    given: Mapping[str, Given]  # by ERNIEKit's spelling
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[tuple[Given, str]] = field(default_factory=list)
    explained: set[str] = field(default_factory=set)  # keys that a value, a note or a refusal accounts for

    @property
    def toolkit(self) -> str:
        """The toolkit the file was written for; a file that suits both counts as ERNIEKit's."""
        spelled = {setting.key for setting in self.given.values()}
        theirs = spelled & PADDLEFORMERS_ONLY and not spelled & ERNIEKIT_ONLY
        return PADDLEFORMERS if theirs else ERNIEKIT

    @property
    def mixed(self) -> list[str]:
        """PaddleFormers' keys in a file of ERNIEKit, which drops them there without a word."""
        spelled = {setting.key for setting in self.given.values()}
        return sorted(spelled & PADDLEFORMERS_ONLY) if spelled & ERNIEKIT_ONLY else []

    @property
    def pictures(self) -> bool:
        """Whether the stage is one of vision-language models."""
        return self.take("stage", str, "SFT").upper().startswith("VL-")

    @property
    def idle(self) -> dict[str, list[str]]:
        """Reason -> the given keys that change nothing here for that reason, as spelled."""
        found: dict[str, list[str]] = {}
        for key, setting in self.given.items():
            if key not in self.explained:
                found.setdefault(REASONS.get(key, AGREES), []).append(setting.key)
        return found

    def has(self, *keys: str) -> bool:
        """Whether one of the keys is given a value; null and empty text are none."""
        return any(key in self.given and self.given[key].value not in (None, "") for key in keys)

    def take(self, key: str, kind: type[T], default: T) -> T:
        """The value of a key, or their default; ConfigError for another type."""
        return converted(self.given[key], kind) if self.has(key) else default

    def items(self, key: str) -> list[str]:
        """The entries of a comma-separated text, or of a list."""
        if not self.has(key):
            return []
        value = self.given[key].value
        entries = value if isinstance(value, list) else str(value).split(",")
        return [text for text in (str(entry).strip() for entry in entries) if text]

    def choice(self, key: str, default: str, allowed: Mapping[str, str]) -> str:
        """Our name for a named value of theirs; ConfigError with the nearest or all names otherwise."""
        value = self.take(key, str, default).lower()
        if value not in allowed:
            near = difflib.get_close_matches(value, list(allowed), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(allowed)}"
            self.given[key].fail(f"is {self.given[key].value!r}; {hint}")
        return allowed[value]

    def put(self, path: str, value: Any, *keys: str) -> None:
        """Set our key; `keys` are theirs that decide it."""
        self.values[path] = value
        self.sources[path] = " + ".join(
            self.given[key].key if self.has(key) else f"{key} (not given)" for key in keys
        )
        found = [self.given[key].line for key in keys if key in self.given]
        if found and found[0] is not None:
            self.lines[path] = found[0]
        self.explained.update(keys)

    def note(self, text: str, *keys: str) -> None:
        """Something the reader should know, with the line of the first of `keys` that is given."""
        found = [self.given[key] for key in keys if key in self.given]
        self.notes.append(f"{found[0].short}: {text}" if found else text)
        self.explained.update(keys)

    def refuse(self, key: str, why: str) -> None:
        """A key that would change the result and cannot be honoured."""
        self.refused.append((self.given[key], why))
        self.explained.add(key)
