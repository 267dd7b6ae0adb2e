"""The thread that runs the engine's steps while there is something to do."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial

from ernietune.errors import RequestError
from ernietune.infer.core import Core
from ernietune.infer.sequence import Ticket

_LINGER_SECONDS = 5  # an idle thread waits so long for the next request before it ends
_CLOSING_SECONDS = 10  # how long closing waits for the step that is under way


class Loop:
    """Takes requests from any thread and steps the core in a thread of its own.

    The thread is started by the first request and ends when it has been idle for a while. At the end of the
    program it is stopped between two steps: a thread that Python stops inside of Paddle aborts the process.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None  # the one that owns the core
        self._closing = False
        _loops.add(self)

    def submit(self, *tickets: Ticket) -> None:
        """Queue requests; those of one call enter the same step, whatever the timing."""
        with self._changed:
            self._inbox += [partial(self.core.add, ticket) for ticket in tickets]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request before the next step; its blocks are free from then on."""
        with self._changed:
            if self._thread is not None:
                self._inbox.append(lambda: self.core.cancel(ticket))
                self._changed.notify()

    def close(self) -> None:
        """End the thread after the step that is under way; what is unfinished fails with RequestError."""
        with self._changed:
            thread, self._closing = self._thread, self._thread is not None
            self._changed.notify()
        if thread is not None:
            thread.join(_CLOSING_SECONDS)

    @property
    def _unneeded(self) -> bool:
        return self.core.idle and not self._inbox

    def _run(self) -> None:
        try:
            while self._take_orders():
                self.core.step()
        finally:
            closed = RequestError("the engine was closed before the answer was complete")
            self._end(sys.exc_info()[1] or closed)

    def _take_orders(self) -> bool:
        """Carry out what came in since the last step; False when the thread should end."""
        with self._changed:
            if self._unneeded:
                self._changed.wait_for(lambda: self._inbox or self._closing, _LINGER_SECONDS)
            if self._closing:
                return False
            if self._unneeded:
                self._thread = None  # who comes from now on starts a new one
                return False
            orders, self._inbox = self._inbox, []
        for order in orders:
            order()
        return True

    def _end(self, reason: BaseException) -> None:
        """Give up what is left, newcomers included, and tell them why; the next request starts anew."""
        with self._changed:
            if self._thread is not threading.current_thread():
                return
            self._thread, self._closing = None, False
            orders, self._inbox = self._inbox, []
            for order in orders:
                order()
            tickets = self.core.abandon()
        for ticket in tickets:
            ticket.deliver(reason)


class Run:
    """A request that was checked and can begin; once it has begun it can be given up, at any time."""

    def __init__(self, loop: Loop, ticket: Ticket) -> None:
        self._loop, self._ticket = loop, ticket

    def start(self) -> None:
        """Queue it; from now on its deltas are delivered."""
        self._loop.submit(self._ticket)

    def cancel(self) -> None:
        """End it before the next step; nothing happens to one that has ended."""
        self._loop.cancel(self._ticket)


_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loop in list(_loops):
        loop.close()
