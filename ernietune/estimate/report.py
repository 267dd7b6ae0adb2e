"""The estimate of a configuration: what it says, as a table, a line, and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ernietune.estimate.holdings import on_host, over_the_bus
from ernietune.estimate.sent import sent
from ernietune.estimate.setup import GIB, Setup
from ernietune.estimate.walk import CONTEXT, SLACK, Moment, walk
from ernietune.estimate.work import SHARE, Card, Work, cards_for, work
from ernietune.memory_modes import is_auto

# From the cheapest in time to the dearest; the parts compute again only what is cheap.
AUTO_MODES = ("none", "norm+activation", "attention+norm+activation", "every-2", "layers")


@dataclass(frozen=True)
class Estimate:
    """Memory of one rank and work of a step."""

    setup: Setup
    peak: Moment
    largest: dict[str, float]
    work: Work
    sent: dict[str, float]

    @property
    def needed(self) -> float:
        """Bytes that one card must have: the peak, and on a GPU what no formula gives."""
        return self.peak.total * (1 + SLACK) + CONTEXT if self.setup.gpu else self.peak.total

    @property
    def host(self) -> dict[str, float]:
        """Bytes on the host that stand for bytes of the card."""
        return _kept_on_host(self.setup) | on_host(self.setup)

    @property
    def bus(self) -> dict[str, float]:
        """Bytes between card and host in a step."""
        kept = {name: 2 * self.setup.micro_batches * size for name, size in _kept_on_host(self.setup).items()}
        return kept | over_the_bus(self.setup)

    def seconds(self, card: Card) -> tuple[float, float]:
        """Least and most of a step, when all processes have such a card."""
        return self.work.seconds(card, self.setup.degrees.world)

    def line(self) -> str:
        """One sentence for the start of a training."""
        where = "of the card" if self.setup.gpu else "of memory besides Python"
        parts = {name: size for name, size in self.peak.parts.items() if size >= 0.05 * self.peak.total}
        named = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        processes = self.setup.degrees.world
        each = f" on each of {processes} processes" if processes > 1 else ""
        told = f"estimate: {self.needed / GIB:.1f} GiB {where}{each} for full rows ({named})"
        sends = sum(self.sent.values())
        return f"{told}; sent in a step {sends / GIB:.2f} GiB" if sends else told

    def as_json(self, memory: float, change: str | None) -> dict[str, Any]:
        """All of it, in bytes, operations and seconds."""
        return {
            "needed": round(self.needed),
            "fits": self.needed <= memory * GIB,
            "peak": {name: round(size) for name, size in self.peak.parts.items()},
            "peak_at": self.peak.name,
            "largest": {name: round(size) for name, size in self.largest.items()},
            "host": {name: round(size) for name, size in self.host.items()},
            "bus": {name: round(size) for name, size in self.bus.items()},
            "recompute": self.setup.config.train.recompute,
            "processes": self.setup.degrees.world,
            "sent": {name: round(size) for name, size in self.sent.items()},
            "image_tokens": self.setup.image_tokens,
            "flops": vars(self.work),
            "seconds": {card.name: self.seconds(card) for card in cards_for(memory) if self.setup.gpu},
            "change": change,
        }


def estimate(setup: Setup) -> Estimate:
    """What a setup needs, whose train.recompute is not auto."""
    moments = walk(setup)
    names = moments.peak.parts
    largest = {name: max(moment.parts[name] for moment in moments.moments) for name in names}
    return Estimate(setup, moments.peak, largest, work(setup), sent(setup))


def resolved(setup: Setup, memory: float) -> Setup:
    """The setup with auto replaced by the cheapest recompute that fits `memory` GiB, else by layers."""
    if not is_auto(setup.config.train.recompute):
        return setup
    for mode in AUTO_MODES:
        candidate = setup.changed(train__recompute=mode)
        if estimate(candidate).needed <= memory * GIB:
            return candidate
    return setup.changed(train__recompute=AUTO_MODES[-1])


def _kept_on_host(setup: Setup) -> dict[str, float]:
    """The most that the graph would keep on the card without offload."""
    if not setup.offloads("activations"):
        return {}
    return {"activations": estimate(setup.changed(train__offload="none")).largest["activations"]}


def print_estimate(found: Estimate, memory: float, change: str | None, show: Any) -> None:
    """The table by part and rank, the verdict, the work and the assumptions, through `show`."""
    show(_table(found))
    needed = found.needed / GIB
    rank = "every rank" if found.setup.degrees.world > 1 else "the card"
    extra = f" ({CONTEXT / GIB:.0f} GiB CUDA context and {SLACK:.0%} slack included)" * found.setup.gpu
    verdict = "fits" if needed <= memory else "does not fit"
    show(f"{rank} needs {needed:.1f} GiB{extra}: {verdict} {memory:g} GiB")
    if needed > memory:
        show(f"what makes it fit: {change}" if change else "no single change makes it fit")
    if found.host:
        show(f"on the host instead: {_in_gib(found.host)}; moved in a step: {_in_gib(found.bus)}")
    if found.sent:
        show(f"sent by every rank in a step: {_in_gib(found.sent)}")
    _print_work(found, memory, show)


def _in_gib(sizes: dict[str, float]) -> str:
    each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
    return f"{sum(sizes.values()) / GIB:.2f} GiB ({each})"


def _table(found: Estimate) -> Table:
    processes, config = found.setup.degrees.world, found.setup.config
    ranks = "one process" if processes == 1 else f"ranks 0 to {processes - 1}, all alike"
    table = Table(
        title=f"{ranks}, {config.train.rows} x {config.data.max_length} tokens, "
        f"recompute {config.train.recompute}; fullest moment: {found.peak.name}"
    )
    table.add_column("part")
    table.add_column("at the peak, GiB", justify="right")
    table.add_column("largest, GiB", justify="right")
    for name, size in found.peak.parts.items():
        table.add_row(name, f"{size / GIB:.2f}", f"{found.largest[name] / GIB:.2f}")
    table.add_row("together", f"{found.peak.total / GIB:.2f}", "")
    return table


def _print_work(found: Estimate, memory: float, show: Any) -> None:
    job, setup = found.work, found.setup
    show(
        f"a step: {job.total / 1e15:.3g} PFLOP (forward {job.forward / 1e15:.3g}, backward "
        f"{job.backward / 1e15:.3g}, recompute {job.recompute / 1e15:.3g})"
        + (f"; {setup.image_tokens} of {setup.tokens} tokens are pictures" if setup.image_tokens else "")
    )
    if not setup.gpu:
        return
    low, high = SHARE
    for card in cards_for(memory):
        least, most = found.seconds(card)
        show(
            f"{card.name} at {low:.0%} to {high:.0%} of {card.flops / 1e12:.0f} TFLOP/s bf16 (assumed, not "
            f"measured): {least:.1f} to {most:.1f} s a step"
        )
