"""One process per card: the command starts itself that many times, watches, and stops all when one fails.

The only reader of Paddle's PADDLE_* variables. On several machines `python -m paddle.distributed.launch` sets
the same variables (docs/parallel.md), and the command then takes its place as one of its processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ernietune import environment
from ernietune.errors import ConfigError

_PATIENCE = 10.0  # seconds the others get to end by themselves, then again to end when asked
_POLL = 0.1
_INTERRUPTED = 130  # the exit code after Ctrl-C
_BETWEEN = 2.0  # seconds in which the failure that caused another one shows


@dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Place:
        """As the launcher's variables say; alone without them."""
        rank, world = (os.environ.get(f"PADDLE_{name}") for name in ("TRAINER_ID", "TRAINERS_NUM"))
        return cls(int(rank or 0), int(world or 1))

    @property
    def is_main(self) -> bool:
        """True for the process that talks and writes."""
        return self.rank == 0


def place_for(processes: int) -> Place | None:
    """This process's place in a run of `processes`; None when they have yet to be started.

    ConfigError when a launcher has started another number.
    """
    if "PADDLE_TRAINERS_NUM" not in os.environ:
        return Place() if processes == 1 else None
    place = Place.here()
    if place.world != processes:
        raise ConfigError(
            f"parallel: data x tensor is {processes}, but {place.world} processes were started; "
            "make the two equal"
        )
    return place


def run(processes: int, logs: Path, arguments: Sequence[str]) -> int:
    """Start `python -m ernietune ARGUMENTS` as that many processes of this machine; the exit code of the run.

    The first speaks in the terminal, the others in `logs`/rank-N.log. When one fails, the others are stopped
    and one sentence says which and where to read on; the exit code is the failing one's.
    """
    _require_cards(processes)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"train.output: {logs} cannot be created ({error.strerror})") from None
    command = [sys.executable, "-m", "ernietune", *arguments]
    with ExitStack() as files:
        workers = []
        for rank, added in enumerate(variables(processes)):
            output = files.enter_context(log_of(logs, rank).open("w")) if rank else None
            workers.append(
                subprocess.Popen(command, env={**os.environ, **added}, stdout=output, stderr=output)
            )
        try:
            return _watch(workers, logs)
        except KeyboardInterrupt:
            return _interrupt(workers, logs)


def log_of(logs: Path, rank: int) -> Path:
    """Where a process other than the first writes what it says."""
    return logs / f"rank-{rank}.log"


def _require_cards(processes: int) -> None:
    if not environment.has_gpu_build():
        return
    cards = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cards is not None and len(cards.split(",")) < processes:
        raise ConfigError(
            f"parallel: data x tensor is {processes}, but CUDA_VISIBLE_DEVICES shows "
            f"{len(cards.split(','))} cards; show more, or lower the degrees"
        )


def variables(processes: int) -> list[Mapping[str, str]]:
    """What each process's environment adds: its number, everybody's address, its share of the cores."""
    ports = _free_ports(processes + 1)
    addresses = [f"127.0.0.1:{port}" for port in ports[:-1]]
    shared = {
        "PADDLE_TRAINERS_NUM": str(processes),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(addresses),
        "PADDLE_MASTER": f"127.0.0.1:{ports[-1]}",
        "PADDLE_LOCAL_SIZE": str(processes),
        "PYTHONUNBUFFERED": "1",
    }
    if not environment.has_gpu_build():
        # Ours were set for one process that has all cores.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = str(max(1, cores // processes))
        shared |= {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return [
        {
            **shared,
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_CURRENT_ENDPOINT": address,
            "FLAGS_selected_gpus": str(rank),
        }
        for rank, address in enumerate(addresses)
    ]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_together:
        sockets = [open_together.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _watch(workers: Sequence[subprocess.Popen[bytes]], logs: Path) -> int:
    """Wait until all have ended well, or one has not: then stop the rest and say so."""
    while all(worker.poll() in (None, 0) for worker in workers):
        if all(worker.poll() == 0 for worker in workers):
            return 0
        time.sleep(_POLL)
    _wait(workers, _BETWEEN)
    codes = {rank: worker.poll() for rank, worker in enumerate(workers)}
    failed = {rank: code for rank, code in codes.items() if code}
    # A process that was killed is the cause; those that ended by themselves may have missed it.
    rank, code = min(failed.items(), key=lambda found: (found[1] > 0, found[0]))
    if code in (2, _INTERRUPTED):
        # A user's mistake, or an interrupt: it ends every process, and the first says why.
        _wait(workers, _PATIENCE)
        if workers[0].poll() == code:
            _end(workers)
            return code
    _end(workers)
    print(f"error: {_obituary(rank, code, workers[rank].pid, logs)}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _interrupt(workers: Sequence[subprocess.Popen[bytes]], logs: Path) -> int:
    """Pass Ctrl-C on: all processes end their step, save and stop. Another one stops them at once."""
    try:
        print("interrupted: ending the step, then saving; Ctrl-C again stops at once", file=sys.stderr)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGINT)
        return _watch(workers, logs)
    except KeyboardInterrupt:
        _end(workers)
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return _INTERRUPTED


def _obituary(rank: int, code: int, pid: int, logs: Path) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    where = f"; see {log_of(logs, rank)}{_last_line(log_of(logs, rank))}" if rank else ""
    return (
        f"rank {rank} (process {pid}) {how}{where}. The other processes were stopped; "
        "the same command goes on from the last checkpoint, with the same or other degrees"
    )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1].strip()[:300]})" if lines else ""


def _wait(workers: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(worker.poll() is None for worker in workers):
        time.sleep(_POLL)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every process that still runs to stop, and kill those that do not."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    _wait(workers, _PATIENCE)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
