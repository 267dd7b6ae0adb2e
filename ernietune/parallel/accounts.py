"""What a run cost each process, counted: memory, bytes sent. `traffic` has what a step should send."""

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
