"""Every collective of the package, with its gradient: NCCL's own call, or a composition where gloo has none.

gloo (CPU) has neither all-to-all nor reduce-scatter, no all_reduce of an empty tensor and connects groups
through keys that overlap. All of that is dealt with here, so that the callers are the same on both.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed import collective as paddle_groups

RowCall = Callable[[Tensor], Tensor]


@dataclass
class Traffic:
    """Bytes this process sends by kind of collective, as the ring (or direct) algorithm sends them."""

    sent: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def note(self, kind: str, sent: float) -> None:
        """Count one call."""
        self.sent[kind] = self.sent.get(kind, 0) + round(sent)
        self.calls[kind] = self.calls.get(kind, 0) + 1


@dataclass(frozen=True, eq=False)
class Group:
    """Some processes, by their numbers in the world; `index` is this one's place among them."""

    ranks: tuple[int, ...]
    index: int
    handle: Any = None  # Paddle's group; None for a group of one, which never communicates
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        """How many processes."""
        return len(self.ranks)


def start() -> None:
    """Join the other processes of the launch (NCCL on GPUs, gloo on CPUs)."""
    if not dist.is_initialized():
        paddle.disable_signal_handler()  # a stop is no crash: no stack of C++ frames in the log
        dist.init_parallel_env()


def make_group(layout: Sequence[tuple[int, ...]], traffic: Traffic) -> Group:
    """This process's group of a layout that puts every process in exactly one; all of them must call.

    A layout of one group is the world's own.
    """
    rank = dist.get_rank()
    mine = next(ranks for ranks in layout if rank in ranks)
    if len(mine) == 1:
        return Group(mine, 0, None, traffic)
    if len(layout) == 1:
        handle = paddle_groups._get_default_group()
    elif _on_gloo():
        handle = _gloo_group(mine, rank)
    else:
        # NCCL exchanges its ids under a counter: every process makes all groups, in one order.
        handle = [dist.new_group(list(ranks)) for ranks in layout][layout.index(mine)]
    return Group(mine, mine.index(rank), handle, traffic)


def _on_gloo() -> bool:
    return not paddle.is_compiled_with_cuda()


def _gloo_group(ranks: tuple[int, ...], rank: int) -> Any:
    """A group with a store of its own: gloo's groups write the same keys, so a shared one mixes them up."""
    host = "127.0.0.1"
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    ports: list[Tensor] = []
    dist.all_gather(ports, paddle.to_tensor([port]))
    chosen = int(ports[ranks[0]].item())
    store = core.TCPStore(host, chosen, rank == ranks[0], len(ranks), 120)
    shared = paddle_groups._default_store
    paddle_groups._default_store = store
    try:
        return dist.new_group(list(ranks))
    finally:
        paddle_groups._default_store = shared


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * int(tensor.element_size())


def all_reduce(tensor: Tensor, group: Group, largest: bool = False) -> Tensor:
    """The sum (or the largest) of a tensor over the group, in place; every process gets the same bits."""
    if group.size == 1 or not math.prod(tensor.shape):
        return tensor
    assert tensor.dtype != paddle.float16, "gloo's sums of float16 are wrong without an error"
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group.handle)
    group.traffic.note("all_reduce", 2 * _bytes(tensor) * (group.size - 1) / group.size)
    return tensor


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """[n, ...] of every process, one after the other along the first axis; n is the same everywhere."""
    if group.size == 1 or not math.prod(tensor.shape):
        return tensor
    group.traffic.note("all_gather", _bytes(tensor) * (group.size - 1))
    return _all_gather(tensor, group)


def _all_gather(tensor: Tensor, group: Group) -> Tensor:
    whole = paddle.empty([group.size * tensor.shape[0], *tensor.shape[1:]], tensor.dtype)
    dist.stream.all_gather(whole, tensor.contiguous(), group=group.handle, sync_op=True)
    return whole


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """Part `index` of the sum of [size * n, ...] over the group: [n, ...]."""
    if group.size == 1:
        return tensor
    group.traffic.note("reduce_scatter", _bytes(tensor) * (group.size - 1) / group.size)
    rows = tensor.shape[0] // group.size
    if _on_gloo():
        dist.all_reduce(tensor, group=group.handle)
        return tensor[group.index * rows : (group.index + 1) * rows].clone()
    part = paddle.empty([rows, *tensor.shape[1:]], tensor.dtype)
    dist.stream.reduce_scatter(part, tensor, group=group.handle, sync_op=True)
    return part


def exchange(rows: Tensor, counts: Sequence[Sequence[int]], group: Group) -> Tensor:
    """Rows [N, D] sorted by the process they go to -> rows sorted by the process they come from.

    `counts[i][j]` rows go from process i to process j; zero is allowed anywhere, for everybody.
    """
    sent, received = list(counts[group.index]), [line[group.index] for line in counts]
    away = sum(sent) - sent[group.index]
    group.traffic.note("all_to_all", away * rows.shape[1] * int(rows.element_size()))
    if _on_gloo():
        return _composed_exchange(rows, counts, group)
    result = paddle.empty([sum(received), rows.shape[1]], rows.dtype)
    # The two forms of this call order their split sizes differently: only keywords are safe.
    dist.stream.alltoall_single(
        result,
        rows.contiguous(),
        out_split_sizes=received,
        in_split_sizes=sent,
        group=group.handle,
        sync_op=True,
    )
    return result


def _composed_exchange(rows: Tensor, counts: Sequence[Sequence[int]], group: Group) -> Tensor:
    """All-to-all as one all-gather of padded rows and slices of it; exact, with more traffic."""
    longest = max(sum(line) for line in counts)
    if not longest:
        return rows
    missing = longest - rows.shape[0]
    padded = paddle.concat([rows, paddle.zeros([missing, rows.shape[1]], rows.dtype)]) if missing else rows
    whole = _all_gather(padded, group)
    parts = []
    for source, line in enumerate(counts):
        first = source * longest + sum(line[: group.index])
        if line[group.index]:
            parts.append(whole[first : first + line[group.index]])
    return paddle.concat(parts) if parts else paddle.zeros([0, rows.shape[1]], rows.dtype)


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """The first process's values for everybody, in place."""
    if group.size > 1:
        dist.broadcast(tensor, src=group.ranks[0], group=group.handle)
        group.traffic.note("broadcast", _bytes(tensor) if group.index == 0 else 0)
    return tensor


def wait_for_all(group: Group) -> None:
    """Return when every process of the group has come here."""
    all_reduce(paddle.ones([1], "int32"), group)


class _Exchange(PyLayer):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[list[int]], group: Group) -> Tensor:
        ctx.back, ctx.group = [list(line) for line in zip(*counts, strict=True)], group
        return exchange(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return exchange(grad, ctx.back, ctx.group)


def exchanged(rows: Tensor, counts: list[list[int]], group: Group) -> Tensor:
    """`exchange`, whose gradient is the exchange with the counts turned round."""
    return _Exchange.apply(rows, counts, group)


class _Rows(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: RowCall, back: RowCall) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.back(grad)


def _own(x: Tensor, group: Group) -> Tensor:
    """Of [T, D] this process's ceil(T / size) rows, filled up with zeros."""
    padded = _in_slices(x, group)
    rows = padded.shape[0] // group.size
    return padded[group.index * rows : (group.index + 1) * rows].clone()


def _in_slices(x: Tensor, group: Group) -> Tensor:
    missing = -x.shape[0] % group.size
    return paddle.concat([x, paddle.zeros([missing, x.shape[1]], x.dtype)]) if missing else x


def _all(x: Tensor, group: Group, count: int) -> Tensor:
    whole = all_gather(x, group)
    return whole if whole.shape[0] == count else whole[:count]


def _sum_of_own(x: Tensor, group: Group) -> Tensor:
    slices = _in_slices(x, group)
    # gloo sums in place, and `x` may be somebody else's as well.
    return reduce_scatter(x.clone() if slices is x else slices, group)


def own_rows(x: Tensor, group: Group) -> Tensor:
    """A slice of [T, D] that all have; everybody gets the gradient of all rows."""
    return _Rows.apply(x, lambda rows: _own(rows, group), lambda grad: _all(grad, group, x.shape[0]))


def all_rows(x: Tensor, group: Group, count: int) -> Tensor:
    """The other way round: slices -> [count, D], on which all go on doing the same."""
    return _Rows.apply(x, lambda rows: _all(rows, group, count), lambda grad: _own(grad, group))


def gathered_rows(x: Tensor, group: Group, count: int) -> Tensor:
    """Slices -> [count, D], on the way into work that the group shares: gradients are summed into slices."""
    return _Rows.apply(x, lambda rows: _all(rows, group, count), lambda grad: _sum_of_own(grad, group))


def summed_rows(x: Tensor, group: Group) -> Tensor:
    """The sum over the group of what each worked out for all rows, cut into slices."""
    count = x.shape[0]
    return _Rows.apply(x, lambda rows: _sum_of_own(rows, group), lambda grad: _all(grad, group, count))
