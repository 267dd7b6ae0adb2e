"""From one row of logits to a token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernietune.errors import CheckpointError
from ernietune.infer.request import SamplingParams


class Sampler:
    """Draws the tokens of one request; equal parameters and logits give equal tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        # A negative seed is as good as any other: its 64 bits are read as an unsigned number.
        seed = None if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The next token for logits [V]; CheckpointError when the model answers with NaN."""
        best = int(logits.argmax())
        if np.isnan(logits[best]):  # argmax stops at the first NaN
            raise CheckpointError(
                "the model's logits are not numbers (NaN): its weights are damaged or its training diverged; "
                "try an earlier checkpoint"
            )
        if self._params.greedy:
            return best
        tokens, probabilities = candidates(logits, self._params)
        edges = probabilities.cumsum()
        drawn = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return int(tokens[min(drawn, len(tokens) - 1)])


def candidates(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn and their probabilities (which need not add up to one).

    The order is temperature, then top_k, then top_p over what top_k left.
    """
    scaled = (logits.astype(np.float64) - logits.max()) / params.temperature
    tokens = np.arange(scaled.size)
    if 0 < params.top_k < scaled.size:
        tokens = np.argpartition(-scaled, params.top_k - 1)[: params.top_k]
    probabilities = np.exp(scaled[tokens])
    probabilities /= probabilities.sum()
    if params.top_p == 1:
        return tokens, probabilities
    # All below (1 - top_p) / n together have less than the 1 - top_p that may go: no need to sort those.
    likely = np.flatnonzero(probabilities >= (1 - params.top_p) / tokens.size)
    order = likely[np.lexsort((tokens[likely], -probabilities[likely]))]
    tokens, probabilities = tokens[order], probabilities[order]
    kept = int(np.searchsorted(probabilities.cumsum(), params.top_p)) + 1
    return tokens[:kept], probabilities[:kept]
