"""Experts divided over processes: rows travel to the process that has their expert, and back.

Both pools share one exchange a layer, so a batch without pictures, a process without rows and an expert
without tokens are all the same: counts of zero. Nobody waits for a call that another leaves out.
"""

from __future__ import annotations

import numpy as np
import paddle
from ernietune_kernels import permute, unpermute
from paddle import Tensor

from ernietune.models.moe import ExpertPool, ModalitySplit, MoE
from ernietune.parallel.collectives import all_gather, exchanged
from ernietune.parallel.team import Team


class DividedExperts:
    """The forward pass of a MoE layer whose pools hold this process's experts only.

    A destination is numbered process * P * L + pool * L + local expert, with P pools of L experts a process:
    sorting by it sorts by process first, and by expert within.
    """

    def __init__(self, moe: MoE, team: Team) -> None:
        self.moe, self.group = moe, team.expert
        vision = moe.vision_experts
        self.pools: list[ExpertPool] = [moe.text_experts] + ([vision] if vision is not None else [])
        self.local = moe.text_experts.count // team.expert.size
        self.kinds = len(self.pools) * self.local  # experts of a process, of both pools

    def forward(self, x_TD: Tensor, split: ModalitySplit | None) -> Tensor:
        """As `MoE.forward`; every process of the expert group must call, each with a row or more."""
        routed = self._routed(x_TD, split)
        shared = self.moe.shared_experts
        return routed if shared is None else routed + shared(x_TD)

    def _routed(self, x_TD: Tensor, split: ModalitySplit | None) -> Tensor:
        weights, destinations = self._choices(x_TD, split)
        rows, plan = permute(x_TD, destinations, self.group.size * self.kinds)
        table = self._table(plan.counts)
        by_process = table.reshape(self.group.size, self.group.size, self.kinds)
        counts: list[list[int]] = by_process.sum(-1).tolist()
        arrived = exchanged(rows, counts, self.group)
        back = [list(line) for line in zip(*counts, strict=True)]
        done = exchanged(self._products(arrived, by_process[:, self.group.index]), back, self.group)
        return unpermute(done, weights, plan)

    def _choices(self, x_TD: Tensor, split: ModalitySplit | None) -> tuple[Tensor, Tensor]:
        """Weights and destinations [T, k], in token order."""
        if split is None or len(self.pools) == 1:
            weights, experts = self.pools[0].router(x_TD)
            return weights, self._numbered(experts, 0)
        found = []
        for number, rows in enumerate((split.text, split.vision)):
            if rows.shape[0]:
                weights, experts = self.pools[number].router(paddle.gather(x_TD, rows))
                found.append((weights, self._numbered(experts, number)))
        weights, destinations = (paddle.concat(list(parts)) for parts in zip(*found, strict=True))
        return paddle.gather(weights, split.restore), paddle.gather(destinations, split.restore)

    def _numbered(self, experts: Tensor, pool: int) -> Tensor:
        return experts // self.local * self.kinds + pool * self.local + experts % self.local

    def _table(self, counts: list[int]) -> np.ndarray:
        """[from, to * experts] rows, known to all after one small gather."""
        mine = paddle.to_tensor(np.array([counts], dtype=np.int64))
        return all_gather(mine, self.group).numpy()

    def _products(self, rows: Tensor, counts: np.ndarray) -> Tensor:
        """Rows sorted by sender and expert, `counts` [sender, expert] of each, through their experts."""
        if not rows.shape[0]:
            return rows * 1.0  # stays in the graph: the other processes wait for this one's backward
        order = paddle.to_tensor(by_expert(counts))
        totals = counts.sum(0).reshape(len(self.pools), self.local)
        used = [(pool, line.tolist()) for pool, line in zip(self.pools, totals, strict=True) if line.any()]
        if len(used) == 1:
            pool, line = used[0]
            return pool.products(rows, line, order)
        parts = paddle.split(paddle.gather(rows, order), [sum(line) for _, line in used])
        done = [pool.products(part, line) for (pool, line), part in zip(used, parts, strict=True)]
        return paddle.gather(paddle.concat(done), paddle.argsort(order))


def by_expert(counts: np.ndarray) -> np.ndarray:
    """The order by expert, then sender, of rows sorted by sender and expert: `counts` [sender, expert].

    Runs of rows that only change places, so nothing is compared: int64 [rows].
    """
    ends = np.cumsum(counts).reshape(counts.shape)
    lengths, firsts = counts.T.reshape(-1), (ends - counts).T.reshape(-1)
    places = np.cumsum(lengths) - lengths
    return np.repeat(firsts - places, lengths) + np.arange(lengths.sum())
