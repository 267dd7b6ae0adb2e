"""The thread that runs the engine's steps while there is something to do."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from ernietune.infer.core import Core
from ernietune.infer.sequence import Ticket

_LINGER_SECONDS = 5  # an idle thread waits so long for the next request before it ends


class Loop:
    """Takes requests from any thread and steps the core in a thread of its own.

    The thread is started by the first request and ends when it has been idle for a while.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._alive = False

    def submit(self, ticket: Ticket) -> None:
        """Queue a request."""
        with self._changed:
            self._inbox.append(lambda: self.core.add(ticket))
            if not self._alive:
                self._alive = True
                threading.Thread(target=self._run, name="engine", daemon=True).start()
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request before the next step; its blocks are free from then on."""
        with self._changed:
            if self._alive:
                self._inbox.append(lambda: self.core.cancel(ticket))
                self._changed.notify()

    def _run(self) -> None:
        done = False
        try:
            while self._take_orders():
                self.core.step()
            done = True
        finally:
            if not done:
                self._fail(sys.exc_info()[1])

    def _take_orders(self) -> bool:
        """Carry out what came in since the last step; False when the thread should end."""
        with self._changed:
            if self.core.idle and not self._inbox:
                self._changed.wait_for(lambda: self._inbox, _LINGER_SECONDS)
            if self.core.idle and not self._inbox:
                self._alive = False
                return False
            orders, self._inbox = self._inbox, []
        for order in orders:
            order()
        return True

    def _fail(self, error: BaseException | None) -> None:
        """Tell everybody that a step failed, newcomers included; the next request starts anew."""
        assert error is not None
        with self._changed:
            orders, self._inbox = self._inbox, []
            self._alive = False
            for order in orders:
                order()
            tickets = self.core.abandon()
        for ticket in tickets:
            ticket.deliver(error)
