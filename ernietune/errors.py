"""Errors a user can cause, as one small tree.

    ErnietuneError          any of the below; the command line prints its text and exits with 2
    ├── ConfigError         a YAML key, value or command-line override
    ├── DataError           a training or evaluation record (file:line), an image
    ├── CheckpointError     a model or adapter folder: missing, truncated, wrong tensors
    ├── RequestError        a prompt or sampling setting the engine cannot serve (HTTP 400)
    └── MissingPackage      an optional package that the command needs

Everything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class ErnietuneError(Exception):
    """A mistake the user can repair; the text says what, where and what to do."""


class ConfigError(ErnietuneError):
    """A configuration key, value or override is wrong."""


class DataError(ErnietuneError):
    """A record or image of a data set is wrong."""


class CheckpointError(ErnietuneError):
    """A checkpoint or adapter folder is missing, damaged or does not fit the model."""


class RequestError(ErnietuneError):
    """A generation request is outside of what the loaded model can do."""


class MissingPackage(ErnietuneError):
    """An optional package is not installed."""


def listed(items: Sequence[object], limit: int = 8) -> str:
    """Join items for a message; after `limit` of them say how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    rest = len(items) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
