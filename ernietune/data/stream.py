"""The endless, seeded and resumable sequence of micro-batches a training loop takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ernietune.data.collate import Batch, collate
from ernietune.data.dataset import DropLog, Records, Skipped
from ernietune.data.packing import BUFFER, Packer, pack
from ernietune.errors import DataError

A = TypeVar("A")
B = TypeVar("B")
S = TypeVar("S", bound=Sized)
LOOK_AHEAD = 4  # samples in flight for each worker


@dataclass(frozen=True)
class StreamOptions:
    """What decides the sequence of batches; a resume needs the same values, `workers` excepted."""

    max_length: int
    packing: bool = True
    rows: int = 1  # rows of a micro-batch
    seed: int = 0
    shuffle: bool = True  # False: the files' order in every epoch
    epochs: int | None = None  # None: endless
    rank: int = 0
    world: int = 1
    buffer: int = BUFFER
    workers: int = 0

    @property
    def order_seed(self) -> int | None:
        """The seed of the shuffling, None without it."""
        return self.seed if self.shuffle else None


def epoch_order(length: int, seed: int | None, epoch: int) -> NDArray[np.int64]:
    """The order of `length` records in one epoch, from these three numbers only; no seed, no shuffling."""
    if seed is None:
        return np.arange(length)
    # Raw bits and a stable sort stay the same in every numpy release; `permutation` is not promised to.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(length), kind="stable")


def ordered_map(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """`map` with `workers` threads that run a bounded number of items ahead; the order is kept."""
    if workers == 0:
        yield from map(function, items)
        return
    source = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="data") as pool:
        ahead = deque(pool.submit(function, item) for item in islice(source, LOOK_AHEAD * workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(function, item) for item in islice(source, 1))
        finally:
            for future in ahead:
                future.cancel()


def sample_lengths(dataset: Records[Any], workers: int = 0) -> NDArray[np.int64]:
    """Tokens of every sample, int64 [records], 0 for a skipped record; encodes the whole data set once."""
    results = ordered_map(dataset.__getitem__, range(len(dataset)), workers)
    return np.array([0 if isinstance(result, Skipped) else len(result) for result in results], dtype=np.int64)


def count_batches(lengths: NDArray[np.int64], options: StreamOptions) -> int:
    """How many micro-batches a Stream over samples of these lengths yields in `options.epochs` epochs."""
    assert options.epochs is not None, "an endless stream has no count"
    rows = sum(len(_epoch_rows(lengths, options, epoch)) for epoch in range(options.epochs))
    return -(-rows // options.rows)


def _epoch_rows(lengths: NDArray[np.int64], options: StreamOptions, epoch: int) -> list[list[int]]:
    records = len(lengths)
    first = (options.rank - epoch * records) % options.world
    mine = epoch_order(records, options.order_seed, epoch)[first :: options.world]
    sizes = [(int(index), int(lengths[index])) for index in mine if lengths[index]]
    return list(pack(sizes, options.max_length, options.buffer if options.packing else 0))


class Stream(Generic[S]):
    """Iterator over micro-batches of a data set; `collate` makes one of rows of samples.

    Records are numbered through all epochs: position p is record `p % n` of the order of epoch `p // n`, and
    rank r of w takes the positions p with p % w == r. A row never mixes two epochs. `log` collects what was
    left out.

    With `workers` above 0 that many threads encode ahead: Pillow releases the interpreter lock while it
    decodes and resizes, and threads share the tokenizer, which processes would copy.
    """

    def __init__(
        self,
        dataset: Records[S],
        options: StreamOptions,
        collate: Callable[[Sequence[Sequence[Any]]], Batch] = collate,
    ) -> None:
        if len(dataset) < options.world:
            raise DataError(f"{len(dataset)} records cannot be shared by {options.world} processes")
        self.dataset = dataset
        self.options = options
        self.collate = collate
        self.log = DropLog()
        self.rows = 0
        self.tokens = 0
        self._next = options.rank  # the next position to pack
        self._packer: Packer[tuple[int, S]] = self._new_packer()
        self._results: Iterator[tuple[int, S | Skipped]] | None = None
        self._order = (-1, np.empty(0, dtype=np.int64))
        self._in_vain = 0

    def __iter__(self) -> Stream[S]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; the last one may have fewer rows."""
        rows = list(islice(iter(self._next_row, None), self.options.rows))
        if not rows:
            self.close()
            raise StopIteration
        return self.collate(rows)

    @property
    def epoch(self) -> float:
        """How many epochs have been packed, as a fraction."""
        return (self._next - self.options.rank) / len(self.dataset)

    @property
    def efficiency(self) -> float:
        """The share of `max_length` that the rows of this process used so far."""
        return self.tokens / (self.rows * self.options.max_length) if self.rows else 0.0

    def close(self) -> None:
        """Stop the worker threads; iterating on starts them again."""
        self._results = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands between two batches, as plain JSON values."""
        return {
            "records": len(self.dataset),
            "options": self._fixed_options(),
            "next": self._next,
            "open_rows": [[position for position, _ in row.items] for row in self._packer.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` stood: every later batch is the same, bit for bit.

        DataError when the data set or an option that decides the sequence has changed.
        """
        expected = {"records": len(self.dataset), **self._fixed_options()}
        found = {"records": state["records"], **state["options"]}
        changed = [
            f"{key} was {found[key]} and is {expected[key]}"
            for key in expected
            if found[key] != expected[key]
        ]
        if changed:
            raise DataError(
                f"the data cannot be resumed: {', '.join(changed)}; restore it or start a new run"
            )
        self.close()
        self._next = state["next"]
        self._packer = self._new_packer()
        for positions in state["open_rows"]:
            samples = [self._load_again(position) for position in positions]
            self._packer.reopen([((position, sample), len(sample)) for position, sample in samples])

    def _fixed_options(self) -> dict[str, Any]:
        values = asdict(self.options)
        return {key: values[key] for key in values if key not in ("workers", "epochs")}

    def _new_packer(self) -> Packer[tuple[int, S]]:
        return Packer(self.options.max_length, self.options.buffer if self.options.packing else 0)

    def _next_row(self) -> list[S] | None:
        """The next full row; None after the last epoch."""
        while True:
            if self._epoch_is_over():
                return self._taken(self._packer.pop())
            if self.options.epochs is not None and self._next // len(self.dataset) >= self.options.epochs:
                return None
            position, result = self._read()
            if not isinstance(result, Skipped):
                row = self._packer.add((position, result), len(result))
                if row is not None:
                    return self._taken(row)

    def _epoch_is_over(self) -> bool:
        """True when samples of an earlier epoch than the next one's still wait in open rows."""
        records = len(self.dataset)
        rows = self._packer.rows
        return bool(rows) and rows[0].items[0][0] // records < self._next // records

    def _taken(self, row: list[tuple[int, S]] | None) -> list[S]:
        assert row is not None
        samples = [sample for _, sample in row]
        self.rows += 1
        self.tokens += sum(len(sample) for sample in samples)
        return samples

    def _read(self) -> tuple[int, S | Skipped]:
        """Encode the next position, or take it from the threads."""
        if self._results is None:
            self._results = ordered_map(self._load, self._positions(self._next), self.options.workers)
        position, result = next(self._results)
        self._next = position + self.options.world
        self.log.note(result)
        self._in_vain = self._in_vain + 1 if isinstance(result, Skipped) else 0
        # With a usable record the longest run of others ends one epoch and begins the next.
        if self._in_vain > 2 * (len(self.dataset) - 1):
            raise DataError(f"none of the {len(self.dataset)} records can be used: {self.log.counts}")
        return position, result

    def _positions(self, first: int) -> Iterator[tuple[int, int]]:
        """(position, record) of this rank from `first` on; runs in the consuming thread only."""
        records, epochs = len(self.dataset), self.options.epochs
        for position in count(first, self.options.world):
            if epochs is not None and position >= epochs * records:
                return
            yield position, self._record(position)

    def _record(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.dataset), self.options.order_seed, epoch))
        return int(self._order[1][place])

    def _load(self, item: tuple[int, int]) -> tuple[int, S | Skipped]:
        position, record = item
        return position, self.dataset[record]

    def _load_again(self, position: int) -> tuple[int, S]:
        _, sample = self._load((position, self._record(position)))
        if isinstance(sample, Skipped):
            raise DataError(f"the data cannot be resumed: {sample.detail}, which was usable before")
        return position, sample
