"""What is asked of the engine and what it answers: plain frozen data, no paddle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ernietune.errors import RequestError

FinishReason = Literal["stop", "length"]
MAX_STOP_STRINGS = 16
_SEED_RANGE = 2**63


class SettingError(RequestError):
    """A sampling setting is out of range; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


class ContextLengthError(RequestError):
    """Prompt and answer together do not fit into the model's context."""


@dataclass(frozen=True)
class SamplingParams:
    """How the answer is drawn from the model and where it ends.

    `max_tokens` None means as many as the context holds. Temperature 0 and top_k 1 are greedy; top_k 0 or -1
    keeps every token. Equal seeds give equal answers; None draws a fresh one. Raises SettingError.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(0 <= self.temperature <= 2, "temperature", self.temperature, "between 0 and 2")
        _check(0 <= self.top_p <= 1, "top_p", self.top_p, "between 0 and 1")
        _check(self.top_k >= -1, "top_k", self.top_k, "at least 1, or 0 or -1 to keep every token")
        in_range = self.seed is None or -_SEED_RANGE <= self.seed < _SEED_RANGE
        _check(in_range, "seed", self.seed, "a signed 64-bit integer")
        _check(
            len(self.stop) <= MAX_STOP_STRINGS, "stop", list(self.stop), f"at most {MAX_STOP_STRINGS} strings"
        )
        _check("" not in self.stop, "stop", list(self.stop), "strings that are not empty")

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0 or self.top_k == 1


def _check(fine: bool, field: str, value: object, expected: str) -> None:
    if not fine:
        raise SettingError(field, f"is {value!r}; it must be {expected}")


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, ready for the model: S tokens, P image patches.

    `is_vision` is None for a model without vision experts, `patches` None for a prompt without pictures.
    """

    ids: NDArray[np.int64]  # [S]
    positions: NDArray[np.int64]  # [S, 3]
    is_vision: NDArray[np.bool_] | None = None  # [S]
    patches: NDArray[np.float32] | None = None  # [P, 588], normalised
    grids: tuple[tuple[int, int, int], ...] = ()

    @property
    def next_position(self) -> int:
        """The position of the first generated token, the same on the three axes."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class Delta:
    """One step of a generation: the tokens it made and the text that became certain with them.

    A step without tokens says that the request still waits for its turn. The last step has a finish reason.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer; `ids` hold every generated token, the end-of-turn token included."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.ids)
