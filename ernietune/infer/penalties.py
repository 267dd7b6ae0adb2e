"""What a request adds to the model's logits before a token is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ernietune.infer.request import SamplingParams


class Penalties:
    """Biases, penalties and forbidden tokens of one request; `push` tells it every drawn token."""

    def __init__(self, params: SamplingParams, prompt: NDArray[np.int64], ends: Sequence[int] = ()) -> None:
        """`ends` are the tokens that would end the answer: forbidden before min_tokens."""
        self._params = params
        self._ends = np.array(sorted(ends), np.int64)
        self._tokens: list[int] = prompt.tolist() if params.bad_words else []
        self._seen = set(prompt.tolist()) if params.repetition_penalty != 1 else set()
        self._counts: Counter[int] = Counter()
        self._drawn = 0
        self._changes = bool(
            params.bad_words
            or params.logit_bias
            or params.allowed_ids
            or params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
        )

    def push(self, token: int) -> None:
        """Count a drawn token."""
        self._drawn += 1
        if self._changes:
            self._tokens.append(token)
            self._seen.add(token)
            self._counts[token] += 1

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits [V] with everything added; the argument itself stays as it is."""
        early = self._drawn < self._params.min_tokens and self._ends.size
        if not (self._changes or early):
            return logits
        changed = logits.copy()
        if self._changes:
            self._bias(changed)
            self._repetition(changed)
            self._frequency(changed)
            self._forbid(changed)
        if early:
            changed[self._ends] = -np.inf
        return changed

    def _bias(self, logits: NDArray[np.float32]) -> None:
        for token, bias in self._params.logit_bias:
            logits[token] += bias

    def _repetition(self, logits: NDArray[np.float32]) -> None:
        penalty = self._params.repetition_penalty
        if penalty != 1:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)

    def _frequency(self, logits: NDArray[np.float32]) -> None:
        presence, frequency = self._params.presence_penalty, self._params.frequency_penalty
        if (presence or frequency) and self._counts:
            tokens = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float64, len(self._counts))
            logits[tokens] -= (presence + frequency * counts).astype(np.float32)

    def _forbid(self, logits: NDArray[np.float32]) -> None:
        if self._params.allowed_ids:
            allowed = np.array(self._params.allowed_ids, np.int64)
            kept = logits[allowed]
            logits.fill(-np.inf)
            logits[allowed] = kept
        for *begin, last in self._params.bad_words:
            if not begin or self._tokens[-len(begin) :] == begin:
                logits[last] = -np.inf
