"""The values of train.recompute and train.offload: what a run saves on memory, and how it is spelt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("attention", "moe", "norm", "activation")
OFFLOADS = ("activations", "optimizer", "weights")
AUTO = "auto"
# The matrices that train.offload: weights keeps out of the device; norms and routers are small.
_WAITING = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.(\w+\.)?\w+_proj\.weight")
_GIB = re.compile(r"\d+(\.\d+)?")
_SWITCHES = {"True": "layers", "False": "none"}  # what YAML makes of true and false in a text


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again: every n-th layer (`every`; 0: none), or parts of all layers."""

    every: int = 0
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in train.recompute."""
        if self.parts:
            return "+".join(self.parts)
        return {0: "none", 1: "layers"}.get(self.every, f"every-{self.every}")

    def whole(self, layer: int) -> bool:
        """Whether the layer of this index is computed again as a whole."""
        return self.every > 0 and layer % self.every == 0


def spelt(value: str) -> str:
    """A value of train.recompute with true and false by their names."""
    return _SWITCHES.get(value, value)


def recompute_of(value: str) -> Recompute:
    """Read a checked value of train.recompute other than auto."""
    if value in ("none", "layers"):
        return Recompute(int(value == "layers"))
    if value.startswith("every-"):
        return Recompute(int(value.removeprefix("every-")))
    return Recompute(parts=tuple(part for part in PARTS if part in value.split("+")))


def offloads_of(value: str) -> frozenset[str]:
    """What a checked value of train.offload keeps on the host."""
    return frozenset() if value == "none" else frozenset(value.split("+"))


def waits_on_host(path: str) -> bool:
    """Whether train.offload: weights is about this parameter of the base."""
    return _WAITING.fullmatch(path) is not None


def is_auto(value: str) -> bool:
    """Whether a checked value leaves the choice to the estimate: auto, or auto-40 for 40 GiB."""
    return value.startswith(AUTO)


def budget_of(value: str) -> float | None:
    """The GiB that a value such as auto-40 may use; None: what the card has."""
    return float(value.removeprefix(AUTO + "-")) if value.startswith(AUTO + "-") else None


def memory_problems(recompute: str, offload: str) -> Iterator[tuple[str, str]]:
    """(key of the train section, what is wrong with it)."""
    if offload != "none" and not _distinct(offload.split("+"), OFFLOADS):
        names = ", ".join(OFFLOADS)
        yield "offload", f"is {offload!r}; it must be none, or of {names} one or several joined by +"
    number = recompute.removeprefix("every-")
    if recompute.startswith(AUTO + "-"):
        budget = recompute.removeprefix(AUTO + "-")
        if not _GIB.fullmatch(budget) or not float(budget):
            yield "recompute", f"is {recompute!r}; auto-n needs the GiB that it may use, such as auto-40"
    elif recompute.startswith("every-"):
        if not number.isdecimal() or int(number) < 2:
            yield "recompute", f"is {recompute!r}; every-n needs a whole number from 2, such as every-2"
    elif recompute not in ("none", "layers", AUTO) and not _distinct(recompute.split("+"), PARTS):
        names = ", ".join(PARTS)
        yield (
            "recompute",
            (
                f"is {recompute!r}; it must be none, layers, every-n, auto, auto-n, or of {names} one or "
                "several joined by +"
            ),
        )


def weights_problem(config: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why frozen weights cannot wait on the host in this configuration; None where they can, or do not."""
    model, train, parallel = config["model"], config["train"], config["parallel"]
    if "weights" not in train["offload"].split("+"):
        return None
    reasons = {
        "nothing is frozen without adapters; leave it out": not config["lora"]["enabled"],
        "a layer's weights are let go of after its work; set train.recompute: layers": (
            train["recompute"] != "layers"
        ),
        f"a base held as {model['quantization']} stays on the device; use model.quantization: none": (
            model["quantization"] != "none"
        ),
        "parallel.base: sharded keeps them on other devices; choose one of the two": (
            parallel["base"] == "sharded"
        ),
        "answers would fetch the model for every token; set train.eval_generate to 0": (
            train["eval_generate"] > 0
        ),
    }
    return next((f"names weights, but {reason}" for reason, holds in reasons.items() if holds), None)


def _distinct(names: list[str], known: tuple[str, ...]) -> bool:
    return set(names) <= set(known) and len(set(names)) == len(names)
