"""A value of a record together with the way to it, so that every complaint names file, line and field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

from ernietune.errors import DataError


class FieldError(DataError):
    """A DataError that knows its field: `path` inside of the record, "" for the record itself."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Field:
    """One value: `where` is `file:line`, `path` the way to it inside of the record, "" for the record itself.

    The readers below return what they name, or raise FieldError, a DataError, with both.
    """

    where: str
    path: str
    value: object

    def fail(self, problem: str) -> NoReturn:
        """Raise FieldError: `file:line: path problem`."""
        text = f"{self.path} {problem}" if self.path else problem
        raise FieldError(f"{self.where}: {text}", self.path)

    def wrong_type(self, expected: str) -> NoReturn:
        """Raise FieldError that says what the value is and what it should be."""
        self.fail(f"is {_type_name(self.value)}; expected {expected}")

    def entries(self, known: Collection[str]) -> dict[str, Field]:
        """The non-null members of an object; a key outside of `known` is an error."""
        if not isinstance(self.value, dict):
            self.wrong_type("an object")
        for key in self.value:
            if key not in known:
                self._unknown_key(str(key), known)
        prefix = f"{self.path}." if self.path else ""
        return {
            key: Field(self.where, prefix + key, value)
            for key, value in self.value.items()
            if value is not None
        }

    def items(self) -> list[Field]:
        """The elements of a list."""
        if not isinstance(self.value, list):
            self.wrong_type("a list")
        return [Field(self.where, f"{self.path}[{i}]", value) for i, value in enumerate(self.value)]

    def string(self) -> str:
        """A string of valid Unicode text."""
        if not isinstance(self.value, str):
            self.wrong_type("a string")
        try:
            self.value.encode()
        except UnicodeEncodeError as error:
            self.fail(
                f"holds half of a surrogate pair at character {error.start}; it is not valid Unicode text"
            )
        return self.value

    def json(self) -> str:
        """The value as JSON text; it must be made of JSON values and valid Unicode only."""
        try:
            text = json.dumps(self.value, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (TypeError, ValueError) as error:
            self.fail(f"cannot be written as JSON: {error}")
        return text

    def choice(self, allowed: Collection[str]) -> str:
        """One of some words."""
        value = self.string()
        if value not in allowed:
            self.fail(f"is {value!r}; allowed: {', '.join(allowed)}")
        return value

    def required(self, entries: dict[str, Field], key: str) -> Field:
        """The member `key` of this object, which `entries` are."""
        if key not in entries:
            self.fail(f"has no {key!r}")
        return entries[key]

    def _unknown_key(self, key: str, known: Collection[str]) -> NoReturn:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
        self.fail(f"has the unknown key {key!r}; {hint}")


def _type_name(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
