"""Bytes that one process sends in a step, by what they are for; the formulas are `parallel.traffic`'s."""

from __future__ import annotations

from ernietune.estimate.holdings import Shared, shared
from ernietune.estimate.setup import Setup
from ernietune.parallel import traffic
from ernietune.parallel.degrees import Part
from ernietune.parallel.traffic import StepTraffic


def sent(setup: Setup) -> dict[str, float]:
    """By purpose; only what several processes send at all. Experts are taken to be chosen evenly."""
    degrees, rows = setup.degrees, _rows(setup)
    found = {
        "gradients": _gradients(setup),
        "gathered layers": _gathered(setup),
        "rows of experts": traffic.exchange_bytes(rows, degrees.expert, _passes(setup), setup.number),
        "tensor group": traffic.tensor_bytes(rows, degrees.tensor, _sums(setup), setup.number)
        + _before_and_after(setup, rows),
    }
    return {name: size for name, size in found.items() if size}


def _rows(setup: Setup) -> StepTraffic:
    """What travels with the tokens of a step of this process."""
    g, tokens = setup.geometry, float(setup.tokens * setup.micro_batches)
    return StepTraffic(
        tokens=tokens,
        supervised=tokens,
        width=g.hidden_size,
        layers=g.num_hidden_layers,
        moe_layers=len(_moe_layers(setup)),
        chosen=g.moe_k,
    )


def _moe_layers(setup: Setup) -> list[int]:
    return [index for index in range(setup.geometry.num_hidden_layers) if setup.geometry.is_moe_layer(index)]


def _passes(setup: Setup) -> float:
    """How often rows travel for a layer: there and back, in both passes, and again where it is recomputed."""
    mode, layers = setup.recompute, _moe_layers(setup)
    again = sum(mode.whole(index) or "moe" in mode.parts for index in layers)
    return 4 + 2 * again / max(1, len(layers))


def _sums(setup: Setup) -> float:
    """How often a layer's activations are summed over the tensor group, a gathering being half of a sum.

    To a sum of attention and of MLP in either pass come those of what is recomputed.
    """
    mode, layers = setup.recompute, setup.geometry.num_hidden_layers
    again = 2.0 * sum(mode.whole(index) for index in range(layers))
    again += layers * (("attention" in mode.parts) + 0.5 * ("norm" in mode.parts))
    again += len(_moe_layers(setup)) * ("moe" in mode.parts) + 0.5 * layers * ("norm" in mode.parts)
    return 4 + again / layers


def _before_and_after(setup: Setup, rows: StepTraffic) -> float:
    """Words, where the vocabulary is divided; rows that are gathered after the last layer, and their losses.

    In front of the first layer gradients are gathered where something trains there.
    """
    tensor = setup.degrees.tensor
    once = traffic.scattered(rows.tokens, tensor) * rows.width * setup.number
    divided = setup.local.vocab_size < setup.geometry.vocab_size
    after = traffic.vocabulary_bytes(rows, tensor, setup.number) if divided else once
    return after + once * setup.trains_before_layers


def _gradients(setup: Setup) -> float:
    """Over those who read other samples, and over the tensor group where each has a part of the gradient."""
    stage, times = setup.config.parallel.sharding, setup.micro_batches
    found = 0.0
    for one in shared(setup):
        step = StepTraffic(common=one.numbers)
        if one.sliced:  # what is gathered in use is not gathered after the update
            found += times * traffic.scattered(one.size * one.numbers, one.sharers)
        else:
            found += traffic.gradient_bytes(step, one.sharers, 1, one.size, stage, times)
        if Part.of(one.path).partial:
            again = times if stage >= 2 else 1
            found += again * 2 * traffic.scattered(one.size * one.numbers, setup.degrees.tensor)
    return found


def _gathered(setup: Setup) -> float:
    """Decoder layers of which each process keeps a slice."""
    frozen = [
        traffic.gathering_bytes(setup.stored(path), setup.sliced(path), setup.micro_batches)
        for path in setup.shapes
        if path not in setup.trained
    ]
    return sum(frozen) + sum(_moving(setup, one) for one in shared(setup) if one.sliced)


def _moving(setup: Setup, one: Shared) -> float:
    return traffic.gathering_bytes(one.size * one.numbers, one.sharers, setup.micro_batches)
