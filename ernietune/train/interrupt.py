"""Ctrl-C in a run of several processes: noted where it arrives, and heeded by all after the same step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from ernietune.parallel.team import Team


class Interrupts:
    """In the block an interrupt of one of several processes waits for `heed`; alone it is Python's own."""

    def __init__(self, team: Team) -> None:
        self.team, self.asked = team, False
        self._before: object = None

    def __enter__(self) -> Interrupts:
        if self.team.world.size > 1:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A Ctrl-C comes from the terminal and from the launcher: the second of the two must not disturb
        # the end that the first one has brought about.
        if self.team.world.size > 1 and not self.asked:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def heed(self) -> None:
        """KeyboardInterrupt in all processes when one was interrupted; every one must call after its step."""
        if self.team.world.size > 1:
            self.asked = self.team.anybody(self.asked)
            if self.asked:
                raise KeyboardInterrupt
