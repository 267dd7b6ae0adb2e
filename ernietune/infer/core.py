"""The engine without its thread: submitted requests, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from paddle import Tensor

from ernietune.errors import ErnietuneError
from ernietune.infer.blocks import BlockPool
from ernietune.infer.cache import PagedCache
from ernietune.infer.lowrank import LowRankLayers
from ernietune.infer.options import EngineOptions
from ernietune.infer.runner import Runner
from ernietune.infer.scheduler import Chunk, Scheduler
from ernietune.infer.sequence import Sequence, Ticket
from ernietune.models.decoder import CausalLM

_SCORED_ROWS = 64  # prompt positions whose logits exist at a time: 26 MB at 103,424 words


@dataclass(frozen=True)
class Stats:
    """Where the engine stands; the totals count from its start. `prefix_*` count prompt tokens."""

    waiting: int
    running: int
    blocks: int
    free_blocks: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Core:
    """Model, cache and scheduler. Not thread-safe: one thread owns it."""

    def __init__(self, model: CausalLM, options: EngineOptions, blocks: int) -> None:
        config, size = model.config, options.block_size
        self.pool = BlockPool(blocks, size)
        cache = PagedCache(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, blocks * size, model.dtype
        )
        self.adapters = LowRankLayers(model)
        self.runner = Runner(model, cache, size, options.feature_tokens, self.adapters)
        self.scheduler = Scheduler(
            self.pool,
            options.max_sequences,
            options.max_batched_tokens,
            options.prefix_cache,
            options.speculation,
        )
        self._tickets: dict[Sequence, Ticket] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self._tickets

    def add(self, ticket: Ticket) -> None:
        """Queue a request; its other choices start once the first has read the prompt, and find it cached."""
        for sequence in ticket.sequences:
            self._tickets[sequence] = ticket
            self.adapters.hold(sequence.adapter)
        self._prompt_tokens += ticket.sequences[0].length
        self.scheduler.add(ticket.sequences[0])

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request and free its blocks; nothing happens to one that has ended."""
        for sequence in ticket.sequences:
            self._drop(sequence)

    def abandon(self) -> list[Ticket]:
        """Forget every request; return them."""
        tickets = list(dict.fromkeys(self._tickets.values()))
        for ticket in tickets:
            self.cancel(ticket)
        return tickets

    def step(self) -> None:
        """Read the scheduled tokens, draw the next ones and deliver them."""
        # The rows of one adapter stand together, those of the model alone first.
        chunks = sorted(self.scheduler.schedule(), key=_adapter_number)
        if not chunks:
            return
        ends = np.cumsum([chunk.tokens for chunk in chunks]).tolist()
        complete = [(chunk, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.complete]
        wanted = [row for chunk, end in complete for row in range(end - 1 - chunk.drafted, end)]
        scoring = any(chunk.sequence.generation.unscored_from is not None for chunk in chunks)
        hidden = self.runner.forward(chunks, None if scoring else wanted or [0])
        self._steps += 1
        for chunk, end in zip(chunks, ends, strict=True):
            self.scheduler.advance(chunk.sequence, chunk.stop - chunk.drafted)
            self._score(chunk, end - chunk.tokens, hidden)
        if complete:
            rows = iter(self.runner.logits(hidden, wanted if scoring else range(len(wanted))))
            for chunk, _ in complete:
                self._answer(chunk, [next(rows) for _ in range(1 + chunk.drafted)])

    def stats(self) -> Stats:
        """A snapshot; from another thread its figures may belong to neighbouring steps."""
        scheduler = self.scheduler
        return Stats(
            waiting=len(self._tickets) - len(scheduler.running),
            running=len(scheduler.running),
            blocks=self.pool.count,
            free_blocks=self.pool.free,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def _score(self, chunk: Chunk, offset: int, hidden: Tensor) -> None:
        """Hand out the logits of the prompt tokens in this chunk, where they are asked for."""
        generation = chunk.sequence.generation
        first = generation.unscored_from
        if first is None:
            return
        last = min(chunk.stop, chunk.sequence.prompt_length - 1)
        for row in self._rows(hidden, offset + first - chunk.start, offset + last - chunk.start):
            generation.score(row)

    def _rows(self, hidden: Tensor, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        for low in range(start, stop, _SCORED_ROWS):
            yield from self.runner.logits(hidden, range(low, min(low + _SCORED_ROWS, stop)))

    def _answer(self, chunk: Chunk, logits: Items[NDArray[np.float32]]) -> None:
        """Draw one token, and one more behind each guess that was drawn just so.

        Every token is drawn from the logits behind the tokens before it, with the generator and the penalties
        as they stand there: a guess decides how soon a token comes, never which.
        """
        sequence = chunk.sequence
        guesses = sequence.ids[sequence.length : chunk.stop].tolist()
        for row, guess in zip(logits, [*guesses, None], strict=True):
            self._speak(sequence, row)
            if sequence not in self._tickets or sequence.ids[sequence.length - 1] != guess:
                break
            self._accepted_tokens += 1
            self.scheduler.advance(sequence, sequence.length)
        self._drafted_tokens += chunk.drafted
        if chunk.drafted and sequence in self._tickets:
            self.scheduler.trim(sequence)

    def _speak(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        """Draw and deliver one token; what goes wrong with one request does not concern the others."""
        ticket = self._tickets.get(sequence)
        if ticket is None:  # another choice of the request failed in this very step
            return
        first = sequence.length == sequence.prompt_length
        try:
            delta = sequence.generation.advance(logits)
        except ErnietuneError as error:
            self.cancel(ticket)
            ticket.deliver(error)
            return
        self._generated_tokens += len(delta.ids)
        if delta.finish_reason is None:
            sequence.append(delta.ids[0])
        else:
            self._drop(sequence)
        ticket.deliver(replace(delta, cached_tokens=sequence.cached_tokens or 0) if first else delta)
        if first and sequence is ticket.sequences[0]:
            for other in ticket.sequences[1:]:
                self.scheduler.add(other)

    def _drop(self, sequence: Sequence) -> None:
        if self._tickets.pop(sequence, None) is not None:
            self.scheduler.remove(sequence)
            self.adapters.drop(sequence.adapter)


def _adapter_number(chunk: Chunk) -> int:
    adapter = chunk.sequence.adapter
    return 0 if adapter is None else adapter.number
