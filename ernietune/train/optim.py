"""AdamW over what trains, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ernietune.config import TrainSection

MASTER = "master_weight"  # the fp32 copy Paddle keeps of a bf16 parameter


def trainable(model: nn.Layer) -> dict[str, Tensor]:
    """Every parameter that takes a gradient, by its path in the model."""
    return {path: p for path, p in model.named_parameters() if not p.stop_gradient}


def learning_rate(step: int, total: int, train: TrainSection) -> float:
    """Rate of step 1..total: linear warm-up, then cosine or linear down to the minimum, or constant."""
    peak, least, warmup = train.learning_rate, train.min_learning_rate, train.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if train.schedule == "constant":
        return peak
    progress = (step - 1 - warmup) / max(1, total - warmup)  # the last step still moves
    if train.schedule == "linear":
        return peak + (least - peak) * progress
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """Paddle's AdamW with LoRA+ rates, and a state keyed by the parameters' paths.

    Paddle keys its own state by automatic names that change with everything built before.
    """

    def __init__(self, model: nn.Layer, train: TrainSection, plus_ratio: float = 1.0) -> None:
        self.parameters = trainable(model)
        fast = [p for path, p in self.parameters.items() if path.endswith(".lora_B")]
        others = [p for path, p in self.parameters.items() if not path.endswith(".lora_B")]
        # Matrices only: biases and norms, whatever they are called, keep their scale.
        decayed = {p.name for p in self.parameters.values() if p.ndim > 1}
        groups = [{"params": others, "learning_rate": 1.0}, {"params": fast, "learning_rate": plus_ratio}]
        low_precision = any(p.dtype in (paddle.bfloat16, paddle.float16) for p in self.parameters.values())
        self.clip_norm = train.clip_norm
        self.adamw = paddle.optimizer.AdamW(
            learning_rate=train.learning_rate,
            parameters=[group for group in groups if group["params"]],
            beta1=train.beta1,
            beta2=train.beta2,
            epsilon=train.epsilon,
            weight_decay=train.weight_decay,
            apply_decay_param_fun=lambda name: name in decayed,
            multi_precision=low_precision,
        )

    def step(self, rate: float) -> float:
        """Clip, update and forget the gradients; return the norm they had before clipping."""
        parameters = list(self.parameters.values())
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        norm = paddle.nn.utils.clip_grad_norm_(parameters, limit).item()
        self.adamw.set_lr(rate)
        self.adamw.step()
        self.adamw.clear_grad(set_to_zero=False)
        return float(norm)

    def state(self) -> dict[str, np.ndarray]:
        """Moments and powers as `path::moment`, for a checkpoint."""
        by_name = {p.name: path for path, p in self.parameters.items()}
        return {f"{by_name[owner]}::{kind}": tensor.numpy() for owner, kind, tensor in self._accumulators()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from what `state` returned.

        A parameter that had no gradient yet, such as a vision adapter before the first picture, has no state.
        """
        names = {path: p.name for path, p in self.parameters.items()}
        renamed: dict[str, Any] = {"master_weights": {}}
        for key, values in state.items():
            path, _, kind = key.partition("::")
            if kind == MASTER:
                renamed["master_weights"][names[path]] = paddle.to_tensor(values)
            else:
                renamed[f"{names[path]}_{kind}"] = paddle.to_tensor(values)
        self.adamw.set_state_dict(renamed)

    def _accumulators(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, kind, tensor); Paddle joins the first two with an underscore."""
        owners = sorted((p.name for p in self.parameters.values()), key=len, reverse=True)
        state = self.adamw.state_dict()
        for owner, tensor in state.pop("master_weights", {}).items():
            yield owner, MASTER, tensor
        for key, tensor in state.items():
            if isinstance(tensor, Tensor):
                owner = next(name for name in owners if key.startswith(name + "_"))
                yield owner, key[len(owner) + 1 :], tensor
