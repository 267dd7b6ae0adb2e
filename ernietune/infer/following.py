"""Deltas of the engine's thread, followed in the thread that asked, and joined to whole answers."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterable
from typing import TypeAlias

from ernietune.infer.loop import Run
from ernietune.infer.request import Completion, Delta

Arrived: TypeAlias = "queue.SimpleQueue[Delta | BaseException]"
_POLL_SECONDS = 0.1  # how often a stream that waits gives its reader the chance to close it


def follow(run: Run, arrived: Arrived, choices: int) -> Generator[Delta, None, None]:
    """Start a run that delivers into `arrived`; yield its deltas until all choices are complete.

    Closing cancels. While nothing arrives it yields empty deltas.
    """
    run.start()
    try:
        while choices:
            try:
                item = arrived.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                item = Delta()
            if isinstance(item, BaseException):
                raise item
            choices -= item.finish_reason is not None
            yield item
    finally:
        run.cancel()


def collect(arrived: queue.SimpleQueue[tuple[int, Delta | BaseException]], answers: int) -> list[list[Delta]]:
    """The deltas of each of so many answers, when all have ended; raises the first error."""
    deltas: list[list[Delta]] = [[] for _ in range(answers)]
    while answers:
        number, item = arrived.get()
        if isinstance(item, BaseException):
            raise item
        deltas[number].append(item)
        answers -= item.finish_reason is not None
    return deltas


def complete(deltas: Iterable[Delta], prompt_tokens: int) -> Completion:
    """Join the deltas of one choice of a whole generation."""
    kept = [delta for delta in deltas if delta.ids or delta.finish_reason]
    reason = kept[-1].finish_reason if kept else None
    assert reason is not None, "a generation ended without a finish reason"
    return Completion(
        text="".join(delta.text for delta in kept),
        ids=tuple(token for delta in kept for token in delta.ids),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        index=kept[0].index,
        logprobs=tuple(entry for delta in kept for entry in delta.logprobs),
        prompt_logprobs=kept[0].prompt_logprobs,
        cached_tokens=kept[0].cached_tokens,
    )
