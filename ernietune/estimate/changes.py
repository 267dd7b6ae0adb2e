"""What to change in a configuration that needs more than a card has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ernietune.config import Config
from ernietune.config_rules import problems
from ernietune.errors import ConfigError
from ernietune.estimate.report import AUTO_MODES, estimate
from ernietune.estimate.setup import GIB, Setup
from ernietune.memory_modes import OFFLOADS

_SCHEMES = ("wint8", "wint4")
_LENGTHS = (4096, 2048, 1024)
_RANKS = (16, 8, 4)
_CARDS = (2, 4, 8, 16, 32)
_INSIDE_A_MACHINE = 8


def first_that_fits(setup: Setup, memory: float) -> str | None:
    """The first single change, from the least to the most costly, that makes a setup fit; None when none.

    Told as overrides of the configuration, several where degrees ask for them.
    """
    for name, candidate in _changes(setup):
        if _is_allowed(candidate) and estimate(candidate).needed <= memory * GIB:
            return name
    return None


def _is_allowed(setup: Setup) -> bool:
    try:
        setup.degrees.check(setup.geometry)
    except ConfigError:
        return False
    return not any(problems(setup.config))


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    config = setup.config
    for mode in AUTO_MODES[1:]:
        yield f"train.recompute={mode}", setup.changed(train__recompute=mode)
    yield from (_offloading(setup, part) for part in OFFLOADS if part != "weights")
    ranks = [rank for rank in _RANKS if config.lora.enabled and rank < config.lora.rank]
    yield from ((f"lora.rank={rank}", setup.changed(lora__rank=rank)) for rank in ranks)
    yield from _shared(setup)
    schemes = _SCHEMES if config.lora.enabled and config.model.quantization == "none" else ()
    yield from ((f"model.quantization={name}", setup.changed(model__quantization=name)) for name in schemes)
    yield _offloading(setup, "weights")  # every layer comes twice for each micro-batch
    for length in (length for length in _LENGTHS if length < config.data.max_length):
        yield f"data.max_length={length}", shorter(setup, length)
    yield from _over_more_cards(setup)


def _offloading(setup: Setup, part: str) -> tuple[str, Setup]:
    before = setup.config.train.offload
    more = part if before == "none" else f"{before}+{part}"
    return f"train.offload={more}", setup.changed(train__offload=more)


def _shared(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """What the processes that there are can share."""
    for stage in range(setup.config.parallel.sharding + 1, 4):
        yield f"parallel.sharding={stage}", setup.changed(parallel__sharding=stage)
    yield "parallel.base=sharded", setup.changed(parallel__base="sharded")


def _over_more_cards(setup: Setup) -> Iterator[tuple[str, Setup]]:
    degrees = setup.degrees
    for cards in _CARDS:
        if cards > degrees.expert and setup.geometry.pools:
            yield _spread(setup, data=max(cards, degrees.data), expert=cards)
        if degrees.tensor < cards <= _INSIDE_A_MACHINE:
            yield _spread(setup, tensor=cards)


def _spread(setup: Setup, **degrees: int) -> tuple[str, Setup]:
    changed = setup.changed(**{f"parallel__{name}": degree for name, degree in degrees.items()})
    told = [f"parallel.{name}={degree}" for name, degree in degrees.items()]
    whole = accumulation_for(changed.config)
    if whole != setup.config.train.accumulation:
        changed = changed.changed(train__accumulation=whole)
        told.append(f"train.accumulation={whole}")
    return f"{' '.join(told)} ({changed.degrees.world} cards)", changed


def accumulation_for(config: Config) -> int:
    """The micro-batches of a step, or the next number that `parallel.data` divides."""
    data = config.parallel.data
    return -(-config.train.accumulation // data) * data


def over_cards(config: Config, cards: int, has_experts: bool) -> Config:
    """A configuration of one process on `cards` of them, which share the experts where there are any.

    ConfigError when the configuration says itself how it is divided.
    """
    if cards == 1:
        return config
    processes = config.parallel.data * config.parallel.tensor
    if processes > 1:
        raise ConfigError(
            f"--gpus {cards}: this configuration is for {processes} processes already; "
            "leave it out, or change `parallel`"
        )
    parallel = replace(config.parallel, data=cards, expert=cards if has_experts else 1)
    config = replace(config, parallel=parallel)
    return replace(config, train=replace(config.train, accumulation=accumulation_for(config)))


def shorter(setup: Setup, length: int) -> Setup:
    """The setup with shorter rows and as large a share of pictures."""
    images = setup.image_tokens * length // setup.config.data.max_length
    return setup.changed(data__max_length=length, image_tokens=images)
