"""What one process holds between its steps, and the buffers through which it shares gradients and layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ernietune.estimate.setup import Setup

_ADAPTER = 4  # bytes of a number of an adapter
BUCKET = 1 << 26  # numbers that are summed in one call (parallel/slices.py)


@dataclass(frozen=True)
class Shared:
    """Something that trains: numbers of this process's part, bytes of one, and how it is divided further.

    Of `sharers` processes each updates a slice (with parallel.sharding), and holds no more than that slice
    between the uses of its layer when it is `sliced`.
    """

    path: str
    numbers: int
    size: int
    sharers: int
    sliced: bool
    stage: int

    @property
    def slice(self) -> int:
        """Numbers that this process updates."""
        return -(-self.numbers // self.sharers) if self.stage else self.numbers

    @property
    def held(self) -> float:
        """Bytes of the weights: whole, and with stages 1 and 2 the slice that is updated beside that."""
        if self.sliced:
            return float(self.size * self.slice)
        return float(self.size * (self.numbers + (self.slice if self.stage else 0)))

    @property
    def gradient(self) -> float:
        """Bytes of what a backward pass leaves."""
        return float(self.size * (self.slice if self.sliced else self.numbers))

    @property
    def waiting(self) -> float:
        """Bytes of the gradient between micro-batches: from stage 2 on it is a slice."""
        return float(self.size * (self.slice if self.stage >= 2 else self.numbers))


def shared(setup: Setup, prefix: str = "") -> list[Shared]:
    """All that trains below a path."""
    stage = setup.config.parallel.sharding
    return [
        Shared(
            path,
            numbers,
            setup.number if path in setup.trained else _ADAPTER,
            setup.sharers(path),
            setup.sliced(path) > 1,
            stage,
        )
        for path, numbers in setup.updating.items()
        if path.startswith(prefix)
    ]


def static_parts(setup: Setup) -> dict[str, float]:
    """What lies in memory all the time."""
    trains = shared(setup)
    adapters = [one for one in trains if one.path not in setup.trained]
    there = (path for path in setup.shapes if path not in setup.trained and not setup.waits(path))
    frozen = {path: setup.stored(path) / setup.sliced(path) for path in there}
    full = sum(one.held for one in trains if one.path in setup.trained)
    masters = 4.0 * sum(one.slice for one in trains if one.path in setup.trained and one.size == 2)
    tower = sum(size for path, size in frozen.items() if path.startswith("vision_model."))
    return {
        "weights": sum(frozen.values()) - tower + full,
        "vision weights": tower,
        "adapters": sum(one.held for one in adapters),
        "optimizer": 0.0 if setup.offloads("optimizer") else 8.0 * sum(one.slice for one in trains) + masters,
        "layers in use": 0.0,
        "communication": 0.0,
    }


def layer_in_use(setup: Setup, prefix: str) -> tuple[float, float]:
    """Bytes of a decoder layer that comes for its work: while it works, and more as it is put together.

    Gathered: the slices side by side, everybody's of them, and the tensors cut out of these. From the host:
    on a GPU the next layer is there as well.
    """
    if setup.offloads("weights"):
        size = sum(
            setup.stored(path) for path in setup.shapes if path.startswith(prefix) and setup.waits(path)
        )
        return (2 * size, 0.0) if setup.gpu else (size, 0.0)
    whole = {p: setup.stored(p) for p in setup.shapes if p.startswith(prefix) and p not in setup.trained}
    whole |= {one.path: float(one.size * one.numbers) for one in shared(setup, prefix)}
    gathered = {path: size for path, size in whole.items() if setup.sliced(path) > 1}
    if not gathered:
        return 0.0, 0.0
    bundles: dict[int, float] = {}
    for path, size in gathered.items():
        bundles[setup.sliced(path)] = bundles.get(setup.sliced(path), 0.0) + size
    return sum(bundles.values()), max(size * (1 + 1 / n) for n, size in bundles.items())


def summing(setup: Setup) -> float:
    """Bytes beside the gradients of a step while they are summed over the processes."""
    trains = [one for one in shared(setup) if one.sharers > 1]
    if setup.config.parallel.sharding:
        loose = [one for one in shared(setup) if not one.sliced]
        # Padded copies, all of them side by side, and what is left of their sum.
        return sum(one.size * (2.0 * one.numbers + one.slice) for one in loose)
    # Sums are new tensors; a bucket of them is there three times: as one, in parts, in their shapes.
    return _bytes(trains) + 2 * _bucket(trains)


def publishing(setup: Setup) -> float:
    """Bytes while updated slices become the model's parameters again, gradients being gone."""
    if not setup.config.parallel.sharding:
        return 0.0
    loose = [one for one in shared(setup) if not one.sliced]
    return sum(one.size * (one.slice + 2.0 * one.numbers) for one in loose)


def _bytes(some: Iterable[Shared]) -> float:
    return float(sum(one.size * one.numbers for one in some))


def _bucket(some: list[Shared]) -> float:
    """Bytes of the largest set of gradients that is summed in one call."""
    largest = waiting = 0
    for one in some:
        if waiting and waiting + one.numbers > BUCKET:
            waiting = 0
        waiting += one.numbers
        largest = max(largest, waiting * one.size)
    return float(largest)


def on_host(setup: Setup) -> dict[str, float]:
    """Bytes of the host's memory that stand for some of the device's; activations are the walk's to know."""
    found = {}
    if setup.offloads("optimizer"):  # two moments, and a copy of what is updated
        found["optimizer"] = 12.0 * sum(one.slice for one in shared(setup))
    if setup.offloads("weights") and setup.gpu:
        found["weights"] = sum(setup.stored(path) for path in setup.shapes if setup.waits(path))
    return found


def over_the_bus(setup: Setup) -> dict[str, float]:
    """Bytes between device and host in a step: gradients and parameters; every layer there and back again."""
    found = {}
    if setup.offloads("optimizer"):
        found["optimizer"] = 2.0 * sum(one.size * one.slice for one in shared(setup))
    if setup.offloads("weights") and setup.gpu:
        found["weights"] = 2.0 * setup.micro_batches * on_host(setup)["weights"]
    return found
