"""From the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable

import pytest

from ernietune.errors import RequestError
from ernietune.infer.request import Delta
from ernietune.serve.stream import Arrived, Mailbox, follow, together


class Spoken:
    """A run that delivers what it is given from a thread of its own."""

    def __init__(
        self, deliver: Callable[[Delta | BaseException], None], *items: Delta | BaseException
    ) -> None:
        self.deliver, self.items, self.cancelled = deliver, items, 0

    def start(self) -> None:
        threading.Thread(target=lambda: [self.deliver(item) for item in self.items]).start()

    def cancel(self) -> None:
        self.cancelled += 1


def run_of(mail: Mailbox, *items: Delta | BaseException, choices: int = 1) -> tuple[Spoken, AsyncGenerator]:
    arrived: Arrived = asyncio.Queue()
    run = Spoken(mail.to(arrived), *items)
    return run, follow(run, arrived, choices)  # type: ignore[arg-type]


def test_the_loop_is_woken_once_for_all_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop, calls = asyncio.get_running_loop(), []
        real = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(args), real(*args)))
        mail = Mailbox(loop)
        queues: list[Arrived] = [asyncio.Queue() for _ in range(16)]
        for step in range(3):
            for queue in queues:
                mail.to(queue)(Delta(str(step)))
        assert len(calls) == 1
        texts = [[(await queue.get()).text for _ in range(3)] for queue in queues]  # type: ignore[union-attr]
        assert texts == [["0", "1", "2"]] * 16
        mail.to(queues[0])(Delta("later"))
        assert len(calls) == 2
        assert (await queues[0].get()).text == "later"  # type: ignore[union-attr]

    asyncio.run(main())


def test_a_run_ends_with_its_last_choice_and_is_cancelled_when_left() -> None:
    async def main() -> None:
        mail = Mailbox(asyncio.get_running_loop())
        ends = [Delta("a"), Delta("b", finish_reason="stop"), Delta("c", finish_reason="length", index=1)]
        run, deltas = run_of(mail, *ends, Delta("too late"), choices=2)
        assert [delta.text async for delta in deltas] == ["a", "b", "c"]
        assert run.cancelled == 1
        run, deltas = run_of(mail, Delta("a"), Delta("b"))
        assert (await anext(deltas)).text == "a"
        await deltas.aclose()
        assert run.cancelled == 1

    asyncio.run(main())


@pytest.mark.parametrize("others", [0, 2])
def test_an_error_ends_the_run_and_those_beside_it(others: int) -> None:
    async def main() -> None:
        mail = Mailbox(asyncio.get_running_loop())
        broken, deltas = run_of(mail, Delta("a"), RequestError("no token may follow"))
        beside = [run_of(mail, Delta("x")) for _ in range(others)]
        with pytest.raises(RequestError, match="no token may follow"):
            [_ async for _ in together([deltas, *(stream for _, stream in beside)])]
        assert [run.cancelled for run, _ in [(broken, deltas), *beside]] == [1] * (1 + others)

    asyncio.run(main())


def test_what_comes_when_the_loop_is_closed_is_nobodys() -> None:
    loop = asyncio.new_event_loop()
    mail, arrived = Mailbox(loop), asyncio.Queue()
    loop.close()
    mail.to(arrived)(Delta("a"))
    assert arrived.empty()
