"""What a step should send, by formula; imports no paddle: the estimate and the accounts share it.

All are bytes that one process sends, as a ring (or direct) algorithm sends them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTraffic:
    """The terms of the formulas: numbers that train, as one process holds them, and its tokens.

    `common` are summed over the data group, `experts` over the replicas; `tokens` are those of all
    micro-batches of the process, `supervised` those with a label, `chosen` the experts a token goes to.
    """

    common: int = 0
    experts: int = 0
    tokens: float = 0
    supervised: float = 0
    width: int = 0
    layers: int = 0
    moe_layers: int = 0
    chosen: int = 0


def scattered(size: float, processes: int) -> float:
    """To leave each of `processes` a slice of a sum of `size` bytes, or to gather such slices."""
    return size * (processes - 1) / processes


def gradient_bytes(
    step: StepTraffic, data: int, replicas: int, size: int = 4, stage: int = 0, micro_batches: int = 1
) -> float:
    """To sum the gradients: 2 (n - 1) / n of their size once a step.

    Stages 2 and 3 scatter sums after each micro-batch, and gather what was updated once.
    """
    once = size * (scattered(step.common, data) + scattered(step.experts, replicas))
    return once * (micro_batches + 1 if stage >= 2 else 2)


def exchange_bytes(step: StepTraffic, expert: int, passes: float = 4, size: int = 4) -> float:
    """To other processes' experts and back, when experts are chosen evenly.

    Four passes: there and back, in the forward and in the backward pass; six with recompute.
    """
    return passes * scattered(step.tokens * step.chosen, expert) * step.width * size * step.moe_layers


def tensor_bytes(step: StepTraffic, tensor: int, sums: float = 4, size: int = 4) -> float:
    """To gather rows and to sum them: two of either a layer in the forward and two in the backward pass.

    Each pair is one of the `sums`, and has the bytes of an all-reduce; six with recompute, which runs the
    forward ones again.
    """
    return sums * step.layers * 2 * scattered(step.tokens, tensor) * step.width * size


def vocabulary_bytes(step: StepTraffic, tensor: int, size: int = 4) -> float:
    """Where embedding and head are divided: words and last rows there, labelled rows' gradients back.

    A label has three fp32 numbers more. A gradient that goes on to pictures comes on top.
    """
    words = 3 * scattered(step.tokens, tensor) * step.width * size
    return words + 2 * scattered(step.supervised, tensor) * (step.width * size + 3 * 4)


def gathering_bytes(size: float, processes: int, micro_batches: int) -> float:
    """To gather slices of `size` bytes of layers in use: once forward, once more when they are recomputed."""
    return 2 * micro_batches * scattered(size, processes)
