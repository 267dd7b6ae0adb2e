"""Typed reading of a JSON object, with errors that name the file and the key path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernietune.errors import CheckpointError


class Fields:
    """Typed access to one JSON object; every complaint names the file and the key path."""

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.raw = raw
        self.where = where
        self.prefix = prefix

    def wrong(self, key: str, problem: str) -> CheckpointError:
        """Return the error for `key`."""
        return CheckpointError(f"{self.where}: {self.prefix}{key} {problem}")

    def value(self, key: str, default: Any = ...) -> Any:
        """Return the value of `key`; without a default a missing or null value is an error."""
        found = self.raw.get(key)
        if found is None and default is ...:
            raise self.wrong(key, "is missing")
        return default if found is None else found

    def integer(self, key: str, default: Any = ..., at_least: int = 1) -> Any:
        """Return an integer of at least `at_least`, or the default when absent."""
        found = self.value(key, default)
        if found is default:
            return found
        if type(found) is not int or found < at_least:
            raise self.wrong(key, f"must be an integer of at least {at_least}, found {found!r}")
        return found

    def number(self, key: str, default: Any = ...) -> float:
        """Return a positive number as float."""
        found = self.value(key, default)
        if type(found) not in (int, float) or not found > 0:
            raise self.wrong(key, f"must be a positive number, found {found!r}")
        return float(found)

    def boolean(self, key: str, default: Any = ...) -> bool:
        """Return true or false."""
        found = self.value(key, default)
        if type(found) is not bool:
            raise self.wrong(key, f"must be true or false, found {found!r}")
        return found

    def integers(self, key: str, default: Any = ...) -> list[int]:
        """Return a list of integers; a scalar counts as a list of one."""
        found = self.value(key, default)
        items = found if isinstance(found, list) else [found]
        if not items or any(type(item) is not int for item in items):
            raise self.wrong(key, f"must be an integer or a list of integers, found {found!r}")
        return items

    def child(self, key: str) -> Fields:
        """Return the object under `key`, for nested access."""
        found = self.value(key)
        if not isinstance(found, dict):
            raise self.wrong(key, f"must be an object, found {found!r}")
        return Fields(found, self.where, f"{self.prefix}{key}.")
