"""From one row of logits to a token and its log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ernietune.errors import CheckpointError, RequestError
from ernietune.infer.guided import GuideState
from ernietune.infer.penalties import Penalties
from ernietune.infer.request import SamplingParams, TokenLogprob

_NO_PROMPT = np.zeros(0, np.int64)
# Tokens less probable than e^-50 times the best are not looked at: a whole vocabulary of them would be drawn
# less than once in 10^16 draws.
_NEGLIGIBLE = -50.0


class Sampler:
    """Draws the tokens of one choice; equal parameters and logits give equal tokens."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: NDArray[np.int64] = _NO_PROMPT,
        ends: Sequence[int] = (),
        choice: int = 0,
        guide: GuideState | None = None,
    ) -> None:
        """`ends` are the tokens that end the answer; choices of one request draw differently."""
        self._params, self._guide = params, guide
        self._penalties = Penalties(params, prompt, ends)
        self._choice = choice

    @cached_property
    def _random(self) -> np.random.Generator:
        """Made when it is needed: a greedy answer needs none, and a seed costs more than a small step."""
        return np.random.Generator(np.random.PCG64(_seed(self._params.seed, self._choice)))

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The next token for logits [V].

        Raises CheckpointError when the model answers with NaN, RequestError when no token is allowed.
        """
        if np.isnan(logits[logits.argmax()]):  # argmax stops at the first NaN
            raise CheckpointError(
                "the model's logits are not numbers (NaN): its weights are damaged or its training diverged; "
                "try an earlier checkpoint"
            )
        logits = self._penalties.apply(logits)
        if self._guide is not None:
            logits = self._guide.apply(logits)
        token = int(logits.argmax())
        if logits[token] == -np.inf:
            raise RequestError(
                "no token may follow: bad_words, allowed_ids, min_tokens and the grammar of the answer "
                "together forbid every one; allow more tokens"
            )
        if not self._params.greedy:
            token = self._draw(logits)
        self._count(token)
        return token

    def take(self, token: int) -> bool:
        """Use this token instead of a drawn one; False, and nothing is done, where the grammar forbids it."""
        if self._guide is not None and not self._guide.allows(token):
            return False
        self._count(token)
        return True

    def _count(self, token: int) -> None:
        self._penalties.push(token)
        if self._guide is not None:
            self._guide.push(token)

    def _draw(self, logits: NDArray[np.float32]) -> int:
        tokens, probabilities = candidates(logits, self._params)
        # In the order of the ids: near-equal probabilities may swap places when the last bits of the logits
        # change, as they do with the number of requests in a batch, and that must not change what is drawn.
        order = np.argsort(tokens, kind="stable")
        edges = probabilities[order].cumsum()
        drawn = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return int(tokens[order[min(drawn, order.size - 1)]])


def _seed(seed: int | None, choice: int) -> int | list[int] | None:
    """What numpy makes a generator of; a negative seed is as good as any other, read as unsigned 64 bits."""
    if seed is None:
        return None
    return [seed % 2**64, choice] if choice else seed % 2**64


def candidates(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn and their probabilities (which need not add up to one).

    The order is temperature, min_p, then top_k, then top_p over what they left.
    """
    best = float(logits.max())
    least = max(_NEGLIGIBLE, np.log(params.min_p)) if params.min_p else _NEGLIGIBLE
    tokens = np.flatnonzero(logits >= best + least * params.temperature)
    if 0 < params.top_k < tokens.size:
        tokens = tokens[np.argpartition(-logits[tokens], params.top_k - 1)[: params.top_k]]
    scaled = (logits[tokens] - np.float32(best)) / np.float32(params.temperature)
    probabilities = np.exp(scaled).astype(np.float64)
    probabilities /= probabilities.sum()
    if params.top_p == 1:
        return tokens, probabilities
    # All below (1 - top_p) / n together have less than the 1 - top_p that may go: no need to sort those.
    likely = np.flatnonzero(probabilities >= (1 - params.top_p) / tokens.size)
    order = likely[np.lexsort((tokens[likely], -scaled[likely]))]
    tokens, probabilities = tokens[order], probabilities[order]
    kept = int(np.searchsorted(probabilities.cumsum(), params.top_p)) + 1
    return tokens[:kept], probabilities[:kept]


def log_probability(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """The token's log-probability under logits [V], and the `count` best tokens with theirs."""
    peak = logits.max()
    total = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    value = float(logits[token]) - total
    if not count:
        return TokenLogprob(token, value)
    count = min(count, logits.size)
    best = np.argpartition(-logits, count - 1)[:count]
    best = best[np.lexsort((best, -logits[best]))]
    return TokenLogprob(token, value, tuple((int(i), float(logits[i]) - total) for i in best))
