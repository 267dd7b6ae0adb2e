"""`ernietune estimate`: from a configuration to what it says about a card."""

from __future__ import annotations

import json
from typing import Any

from ernietune.config import Config
from ernietune.errors import ConfigError
from ernietune.estimate.changes import first_that_fits, over_cards
from ernietune.estimate.report import estimate, print_estimate, resolved
from ernietune.estimate.setup import GIB, Setup, setup_of
from ernietune.memory_modes import budget_of
from ernietune.train.log import console
from ernietune.train.plan import model_geometry


def run(config: Config, memory: float, gpus: int, image_tokens: int | None, as_json: bool) -> None:
    """Print the estimate of a rank on a card of `memory` GiB."""
    if memory <= 0:
        raise ConfigError(f"--gpu-memory {memory:g} must be above 0 GiB")
    setup = resolved(setup_for(config, gpus, image_tokens), budget_of(config.train.recompute) or memory)
    found = estimate(setup)
    change = None if found.needed <= memory * GIB else first_that_fits(setup, memory)
    if as_json:
        console.print_json(json.dumps(found.as_json(memory, change)))
        return
    print_estimate(found, memory, change, _show)


def setup_for(config: Config, gpus: int = 1, image_tokens: int | None = None) -> Setup:
    """The setup of one card; ConfigError for options that do not fit the model."""
    geometry = model_geometry(config)
    setup = setup_of(over_cards(config, gpus, bool(geometry.pools)), geometry)
    if image_tokens is not None:
        if image_tokens and not setup.geometry.is_vl:
            raise ConfigError(f"--image-tokens {image_tokens}: this model reads no pictures")
        if image_tokens > setup.tokens:
            raise ConfigError(
                f"--image-tokens {image_tokens} is more than the {setup.tokens} tokens of a micro-batch"
            )
        setup = setup.changed(image_tokens=image_tokens)
    return setup


def _show(line: Any) -> None:
    console.print(line)
