"""What a run cost each process, counted: memory, bytes sent; and what a step should send, by formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.base import core

from ernietune.parallel.collectives import all_gather
from ernietune.parallel.team import Team

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def peak_memory() -> int:
    """Bytes that Paddle's tensors took at most on this process's device."""
    if paddle.is_compiled_with_cuda():
        return int(paddle.device.cuda.max_memory_allocated())
    return int(core.host_memory_stat_peak_value("Allocated", 0))


def held_memory() -> int:
    """Bytes that Paddle's tensors take now."""
    if paddle.is_compiled_with_cuda():
        return int(paddle.device.cuda.memory_allocated())
    return int(core.host_memory_stat_current_value("Allocated", 0))


@dataclass(frozen=True)
class Account:
    """Of one process, in bytes: tensors at the start of the training, at the peak, and sent by kind."""

    held: int
    peak: int
    sent: Mapping[str, int]


def all_accounts(team: Team, held: int) -> list[Account]:
    """Everybody's, by rank; every process must call. `held` is what this one had when training began."""
    sent = dict(team.world.traffic.sent)
    mine = np.array([[held, peak_memory(), *(sent.get(kind, 0) for kind in KINDS)]], dtype=np.int64)
    table = all_gather(paddle.to_tensor(mine), team.world).numpy()
    return [
        Account(int(row[0]), int(row[1]), dict(zip(KINDS, map(int, row[2:]), strict=True))) for row in table
    ]


def lines(accounts: Sequence[Account]) -> list[str]:
    """One line a process, for the terminal."""
    return [
        f"rank {rank}: {account.held / 2**20:.1f} MiB before the first step, "
        f"{account.peak / 2**20:.1f} MiB at most; sent "
        + (", ".join(f"{kind} {n / 2**20:.2f} MiB" for kind, n in account.sent.items() if n) or "nothing")
        for rank, account in enumerate(accounts)
    ]


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


def gradient_bytes(step: StepTraffic, data: int, replicas: int, size: int = 4) -> float:
    """Sent by one process to sum its gradients once, as a ring does it: 2 (n - 1) / n of their size."""
    return 2 * size * (step.common * (data - 1) / data + step.experts * (replicas - 1) / replicas)


def exchange_bytes(step: StepTraffic, expert: int, passes: int = 4, size: int = 4) -> float:
    """Sent to other processes' experts and back, when experts are chosen evenly.

    Four passes: there and back, in the forward and in the backward pass; six with recompute.
    """
    rows = step.tokens * step.chosen * (expert - 1) / expert
    return passes * rows * step.width * size * step.moe_layers


def tensor_bytes(step: StepTraffic, tensor: int, sums: int = 4, size: int = 4) -> float:
    """Sent to gather rows and to sum them: two of either a layer in the forward and two in the backward pass.

    Each pair is one of the `sums`, and has the bytes of an all-reduce; six with recompute, which runs the
    forward ones again.
    """
    return sums * step.layers * 2 * (tensor - 1) / tensor * step.tokens * step.width * size


def vocabulary_bytes(step: StepTraffic, tensor: int, size: int = 4) -> float:
    """Sent where embedding and head are divided: words and last rows there, labelled rows' gradients back.

    A label has three fp32 numbers more. A gradient that goes on to pictures comes on top.
    """
    words = 3 * (tensor - 1) / tensor * step.tokens * step.width * size
    return words + 2 * (tensor - 1) / tensor * step.supervised * (step.width * size + 3 * 4)
