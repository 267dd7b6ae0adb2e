"""How many processes share a run, who works with whom, and what each holds; imports no paddle.

Process r of `data` x `tensor` has the place (r // tensor, r % tensor). The processes of one first number read
the same samples and share every product; those of one second number read different samples. Each block of
`expert` data places shares one set of experts; the blocks are replicas of each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernietune.errors import ConfigError
from ernietune.models.config import ExpertPoolConfig, ModelConfig

Ranks = tuple[int, ...]

_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.(text|vision)_experts\.(gate|up|down)_proj\..*")
# Products whose outputs are split over the tensor group, and those that take such a split as input.
_COLUMN = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(\w+\.)?(gate|up)_proj)\..*")
_ROW = re.compile(r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.(\w+\.)?down_proj)\..*")
_VOCABULARY = re.compile(r"(model\.embed_tokens|lm_head)\.weight")
# Norms see a slice of the rows, and what a router's choice is worth shows in a part of the products.
_PARTIAL = re.compile(r"model\.(norm|layers\.\d+\.(\w+_layernorm|mlp\.\w+_experts\.router))\.weight")


@dataclass(frozen=True)
class Part:
    """How a parameter is divided.

    `expert`: its first axis over the processes of an expert group. `tensor`: the axis (from the end) that is
    divided over a tensor group, None where each has all of it. `partial`: each process of the tensor group
    works out a part of its gradient, and their sum is the gradient.
    """

    expert: bool = False
    tensor: int | None = None
    partial: bool = False

    @classmethod
    def of(cls, path: str) -> Part:
        """By the parameter's path; both factors of an adapter follow the matrix they go around."""
        expert, kind = bool(_EXPERTS.fullmatch(path)), path.rpartition(".")[2]
        if _COLUMN.fullmatch(path):
            return cls(expert, None if kind == "lora_A" else -2, kind == "lora_A")
        if _ROW.fullmatch(path):
            return cls(expert, None if kind == "lora_B" else -1, kind == "lora_B")
        if _VOCABULARY.fullmatch(path):
            return cls(tensor=-2)
        return cls(partial=bool(_PARTIAL.fullmatch(path)))


@dataclass(frozen=True)
class Degrees:
    """The `parallel` section, checked against nothing yet."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.data * self.tensor

    @property
    def replicas(self) -> int:
        """Sets of experts."""
        return self.data // self.expert

    def everybody(self) -> list[Ranks]:
        """One group of all."""
        return [tuple(range(self.world))]

    def tensor_groups(self) -> list[Ranks]:
        """Who shares the products of the same samples."""
        return [tuple(self._rank(d, t) for t in range(self.tensor)) for d in range(self.data)]

    def data_groups(self) -> list[Ranks]:
        """Who holds the same part of the model, experts aside, and reads other samples."""
        return [tuple(self._rank(d, t) for d in range(self.data)) for t in range(self.tensor)]

    def expert_groups(self) -> list[Ranks]:
        """Who together hold one set of experts."""
        return [
            tuple(self._rank(block * self.expert + e, t) for e in range(self.expert))
            for t in range(self.tensor)
            for block in range(self.replicas)
        ]

    def replica_groups(self) -> list[Ranks]:
        """Who hold the same experts."""
        return [
            tuple(self._rank(block * self.expert + e, t) for block in range(self.replicas))
            for t in range(self.tensor)
            for e in range(self.expert)
        ]

    def _rank(self, data: int, tensor: int) -> int:
        return data * self.tensor + tensor

    def local(self, config: ModelConfig) -> ModelConfig:
        """The geometry of what one process holds: fewer experts, fewer heads and words, narrower MLPs."""
        pools = tuple(
            ExpertPoolConfig(pool.count // self.expert, pool.intermediate_size // self.tensor)
            for pool in config.pools
        )
        return replace(
            config,
            pools=pools,
            num_attention_heads=config.num_attention_heads // self.tensor,
            num_key_value_heads=config.num_key_value_heads // self.tensor,
            intermediate_size=config.intermediate_size // self.tensor,
            vocab_size=config.vocab_size // self.tensor,
        )

    def local_shape(self, path: str, whole: Sequence[int]) -> list[int]:
        """The shape of a process's part of a parameter."""
        return [size // by for size, by in zip(whole, self._divisors(path, len(whole)), strict=True)]

    def whole_shape(self, path: str, local: Sequence[int]) -> list[int]:
        """The other way round."""
        return [size * by for size, by in zip(local, self._divisors(path, len(local)), strict=True)]

    def _divisors(self, path: str, axes: int) -> list[int]:
        part, found = Part.of(path), [1] * axes
        if part.expert:
            found[0] *= self.expert
        if part.tensor is not None:
            found[part.tensor] *= self.tensor
        return found

    def check(self, config: ModelConfig) -> None:
        """ConfigError when the model cannot be divided so."""
        if self.expert > 1 and not config.pools:
            raise ConfigError("parallel.expert: this model has no experts; leave the key out")
        sizes = [("expert", self.expert, "experts", pool.count) for pool in config.pools] + [
            ("tensor", self.tensor, "attention heads", config.num_attention_heads),
            ("tensor", self.tensor, "key/value heads", config.num_key_value_heads),
            ("tensor", self.tensor, "numbers of the MLP's inner width", config.intermediate_size),
            ("tensor", self.tensor, "words of the vocabulary", config.vocab_size),
            *(
                ("tensor", self.tensor, "numbers of an expert", pool.intermediate_size)
                for pool in config.pools
            ),
        ]
        for key, degree, what, count in sizes:
            if count % degree:
                raise ConfigError(
                    f"parallel.{key}: {degree} processes cannot share {count} {what}; "
                    f"use a divisor of {count}"
                )


@dataclass(frozen=True)
class Holding:
    """What the process of one rank holds of everything that is divided."""

    degrees: Degrees
    rank: int = 0

    def cut(self, path: str, whole: NDArray[Any]) -> NDArray[Any]:
        """The process's part of a whole parameter, as a view."""
        if Part.of(path).expert:
            whole = np.split(whole, self.degrees.expert)[self._expert]
        return self.cut_matrix(path, whole)

    def cut_matrix(self, path: str, whole: NDArray[Any]) -> NDArray[Any]:
        """The same of one expert of a stack, or of a parameter that is no stack."""
        axis = Part.of(path).tensor
        if axis is None:
            return whole
        return np.split(whole, self.degrees.tensor, axis=axis)[self.rank % self.degrees.tensor]

    def place(self, path: str, expert: int, held: int) -> int | None:
        """Where an expert of a stack stands among the `held` of this process; None: elsewhere."""
        first = self.first_expert(held) if Part.of(path).expert else 0
        return expert - first if first <= expert < first + held else None

    def first_expert(self, held: int) -> int:
        """Number of the first of the `held` experts of this process."""
        return self._expert * held

    @property
    def _expert(self) -> int:
        return self.rank // self.degrees.tensor % self.degrees.expert
