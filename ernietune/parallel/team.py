"""The processes of a run as one of them sees them: its groups, its share of the work, sums over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import paddle
import paddle.distributed as dist

from ernietune.parallel import collectives
from ernietune.parallel.collectives import Group, Traffic, all_reduce
from ernietune.parallel.degrees import Degrees, Holding

B = TypeVar("B")


@dataclass(frozen=True)
class Team:
    """Groups of this process; all of one when it is alone.

    `data` holds the same part of the model (experts aside) and reads other samples, `tensor` shares the
    products of the same samples, `expert` has one set of experts, `replica` the same experts.
    """

    degrees: Degrees
    world: Group
    data: Group
    tensor: Group
    expert: Group
    replica: Group

    @classmethod
    def alone(cls) -> Team:
        """One process."""
        return cls(Degrees(), *(Group((0,), 0) for _ in range(5)))

    @classmethod
    def of(cls, degrees: Degrees) -> Team:
        """Join the other processes of the launch; every one of them must call."""
        if degrees.world == 1:
            return cls.alone()
        collectives.start()
        traffic = Traffic()
        layouts = (
            degrees.everybody(),
            degrees.data_groups(),
            degrees.tensor_groups(),
            degrees.expert_groups(),
            degrees.replica_groups(),
        )
        made: dict[tuple[tuple[int, ...], ...], Group] = {}
        for layout in layouts:
            key = tuple(layout)
            if key not in made:
                made[key] = collectives.make_group(layout, traffic)
        return cls(degrees, *(made[tuple(layout)] for layout in layouts))

    @property
    def holding(self) -> Holding:
        """What this process holds."""
        return Holding(self.degrees, self.world.index)

    @property
    def is_main(self) -> bool:
        """True for the process that talks and writes."""
        return self.world.index == 0

    @property
    def speaks_for_its_data(self) -> bool:
        """True for one process of those that read the same samples."""
        return self.tensor.index == 0

    def mine(self, batches: Sequence[B]) -> list[tuple[int, B]]:
        """The micro-batches of a step that fall to this process, with their numbers in the step."""
        return list(enumerate(batches))[self.data.index :: self.data.size]

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Every value summed over the processes with other samples; all must know the same names."""
        return _summed(values, self.data)

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Every value summed over all processes."""
        return _summed(values, self.world)

    def merged(self, sums: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Sums by section and name over the processes with other samples, each of which may lack names."""
        names: list[list[tuple[str, str]]] = []
        dist.all_gather_object(names, [(a, b) for a, some in sums.items() for b in some], self.data.handle)
        keys = sorted({(str(a), str(b)) for some in names for a, b in some})
        total = self.sums({f"{a}\0{b}": sums.get(a, {}).get(b, 0.0) for a, b in keys})
        found: dict[str, dict[str, float]] = {}
        for a, b in keys:
            found.setdefault(a, {})[b] = total[f"{a}\0{b}"]
        return found

    def agreed(self, values: Mapping[str, float]) -> dict[str, float]:
        """The first process's values, for decisions that all must take alike."""
        if self.world.size == 1:
            return dict(values)
        names = sorted(values)
        numbers = paddle.to_tensor(np.array([values[name] for name in names], dtype=np.float64))
        return dict(zip(names, collectives.broadcast(numbers, self.world).tolist(), strict=True))

    def told(self, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What the first process works out, alone; the others wait for it."""
        found = [work() if self.is_main else {}]
        if self.world.size > 1:
            dist.broadcast_object_list(found, self.world.ranks[0], self.world.handle)
        return found[0]

    def anybody(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.world.size == 1:
            return flag
        return bool(all_reduce(paddle.to_tensor([int(flag)]), self.world, largest=True).item())

    def wait(self) -> None:
        """Return when every process has come here."""
        collectives.wait_for_all(self.world)


def _summed(values: Mapping[str, float], group: Group) -> dict[str, float]:
    if group.size == 1 or not values:
        return dict(values)
    names = sorted(values)
    numbers = paddle.to_tensor(np.array([values[name] for name in names], dtype=np.float64))
    return dict(zip(names, all_reduce(numbers, group).tolist(), strict=True))
