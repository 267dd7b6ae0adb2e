"""AdamW over what trains, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ernietune.config import TrainSection
from ernietune.errors import ConfigError
from ernietune.parallel.host_memory import ON_HOST, HostCopy, at
from ernietune.parallel.trained import Trained
from ernietune.targets import PARAMETER_GROUPS, matches_group

MASTER = "master_weight"  # the fp32 copy Paddle keeps of a bf16 parameter


def learning_rate(step: int, total: int, train: TrainSection) -> float:
    """Rate of step 1..total: linear warm-up, then cosine or linear down to the minimum, or constant."""
    peak, least = train.learning_rate, train.min_learning_rate
    warmup = train.warmup_steps or math.ceil(train.warmup_ratio * total)
    if step <= warmup:
        return peak * step / warmup
    if train.schedule == "constant":
        return peak
    progress = (step - 1 - warmup) / max(1, total - warmup)  # the last step still moves
    if train.schedule == "linear":
        return peak + (least - peak) * progress
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def rate_ratios(
    paths: Iterable[str], ratios: Mapping[str, float], plus_ratio: float = 1.0
) -> dict[str, float]:
    """Every path's factor of the learning rate: that of the first matching group or pattern, times LoRA+'s.

    ConfigError for a name that matches nothing that trains.
    """
    found = dict.fromkeys(paths, 1.0)
    waiting = set(found)
    for name, ratio in ratios.items():
        matching = [path for path in found if matches_group(name, path)]
        if not matching:
            raise ConfigError(
                f"train.rate_ratios: {name!r} matches nothing that trains; "
                f"use {', '.join(PARAMETER_GROUPS)} or a regular expression for whole parameter paths"
            )
        found |= dict.fromkeys(waiting.intersection(matching), ratio)
        waiting.difference_update(matching)
    return {path: ratio * (plus_ratio if path.endswith(".lora_B") else 1.0) for path, ratio in found.items()}


class Optimizer:
    """Paddle's AdamW with a rate per group, LoRA+'s included, and a state keyed by the parameters' paths.

    Paddle keys its own state by automatic names that change with everything built before.
    """

    def __init__(
        self,
        model: nn.Layer,
        train: TrainSection,
        plus_ratio: float = 1.0,
        trained: Trained | None = None,
        on_host: bool = False,
    ) -> None:
        """`trained` is what `parallel.apply` gave; by default all that trains, in one process.

        With `on_host` moments and an fp32 copy of the parameters live in host memory, where the update runs.
        """
        self.trained = trained or Trained(model)
        self.parameters = self.trained.updated
        self.host = HostCopy(self.parameters) if on_host else None
        stepped = self.parameters if self.host is None else self.host.copies
        groups: dict[float, list[Tensor]] = {}
        for path, ratio in rate_ratios(self.parameters, train.rate_ratios, plus_ratio).items():
            groups.setdefault(ratio, []).append(stepped[path])
        # Matrices only: biases and norms, whatever they are called, keep their scale.
        decayed = {stepped[path].name for path, s in self.trained.shapes.items() if len(s) > 1}
        low_precision = any(p.dtype in (paddle.bfloat16, paddle.float16) for p in stepped.values())
        self._names = {path: p.name for path, p in stepped.items()}
        self.clip_norm = train.clip_norm
        self.adamw = paddle.optimizer.AdamW(
            learning_rate=train.learning_rate,
            parameters=[{"params": some, "learning_rate": ratio} for ratio, some in groups.items()],
            beta1=train.beta1,
            beta2=train.beta2,
            epsilon=train.epsilon,
            weight_decay=train.weight_decay,
            apply_decay_param_fun=lambda name: name in decayed,
            multi_precision=low_precision,
        )

    def step(self, rate: float) -> float:
        """Clip, update and forget the gradients; return the norm they had before clipping."""
        norm = self._clipped(float("inf") if self.clip_norm is None else self.clip_norm)
        self.adamw.set_lr(rate)
        with nullcontext() if self.host is None else self.host.working():
            self.adamw.step()
        self.adamw.clear_grad(set_to_zero=False)
        self.trained.publish()
        return norm

    def _clipped(self, limit: float) -> float:
        if self.trained.team.world.size > 1:
            return self.trained.clip(limit)
        return float(paddle.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit).item())

    def weights(self) -> dict[str, np.ndarray]:
        """All that trains in fp32, whole, by path; every process must call."""
        return {path: self.trained.whole(path, p.astype("float32")) for path, p in self.parameters.items()}

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Continue from what `weights` returned."""
        for path in self.parameters:
            self.trained.set_whole(path, weights[path])
        if self.host is not None:
            self.host.follow()
        self.trained.publish()

    def state(self) -> dict[str, np.ndarray]:
        """Moments and powers as `path::moment`, whole, for a checkpoint; every process must call."""
        by_name = {name: path for path, name in self._names.items()}
        found = {(by_name[owner], kind): tensor for owner, kind, tensor in self._accumulators()}
        if self.host is not None:
            found |= {(path, MASTER): copy for path, copy in self.host.masters.items()}
        return {
            f"{path}::{kind}": self.trained.whole(path, at(found[path, kind], self.parameters[path].place))
            if _is_divided(kind)
            else found[path, kind].numpy()
            for path, kind in sorted(found)  # one order on all processes
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from what `state` returned.

        A parameter that had no gradient yet, such as a vision adapter before the first picture, has no state.
        """
        names = self._names
        renamed: dict[str, Any] = {"master_weights": {}}
        for key, values in state.items():
            path, _, kind = key.partition("::")
            tensor = self.trained.part(path, values) if _is_divided(kind) else paddle.to_tensor(values)
            if kind == MASTER and self.host is not None:
                self.host.copies[path].set_value(at(tensor, ON_HOST))
            elif kind == MASTER:
                renamed["master_weights"][names[path]] = tensor
            else:
                renamed[f"{names[path]}_{kind}"] = tensor
        if self.host is not None:
            renamed = {
                key: at(value, ON_HOST) if isinstance(value, Tensor) else value
                for key, value in renamed.items()
            }
        self.adamw.set_state_dict(renamed)

    def _accumulators(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, kind, tensor); Paddle joins the first two with an underscore."""
        owners = sorted(self._names.values(), key=len, reverse=True)
        state = self.adamw.state_dict()
        for owner, tensor in state.pop("master_weights", {}).items():
            yield owner, MASTER, tensor
        for key, tensor in state.items():
            if isinstance(tensor, Tensor):
                owner = next(name for name in owners if key.startswith(name + "_"))
                yield owner, key[len(owner) + 1 :], tensor


def _is_divided(kind: str) -> bool:
    """Moments and master weights have the parameter's shape; the powers of beta are single numbers."""
    return not kind.startswith("beta")
