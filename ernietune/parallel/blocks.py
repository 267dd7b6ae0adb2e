"""Decoder layers whose parameters are slices, gathered for as long as the layer works.

The gathering stands inside the recomputed region: a layer's whole weights exist while its forward pass runs,
and again while its backward pass does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernietune.models.layers import ExpertLinear, parameter
from ernietune.parallel import slices
from ernietune.parallel.collectives import Group
from ernietune.parallel.degrees import Part
from ernietune.parallel.host_memory import Fetch, WaitingLayers
from ernietune.parallel.team import Team


@dataclass(frozen=True)
class Waiting:
    """Frozen weights on the host, by the path they have without adapters, and the layers they come in."""

    weights: Mapping[str, Fetch]
    layers: WaitingLayers = field(default_factory=WaitingLayers)

    def of(self, prefix: str, layer: nn.Layer) -> _FromHost:
        """Those of one layer. `base` in a path is the layer that an adapter goes around."""
        found = [
            (path, home, name, self.weights[plain])
            for path, home, name in _parameters(layer, prefix)
            if (plain := path.replace(".base.weight", ".weight")) in self.weights
        ]
        homes = {path: (home, name) for path, home, name, _ in found}
        return _FromHost(homes, [fetch for *_, fetch in found], self.layers)


class _FromHost:
    """Frozen parameters of one layer that wait on the host; their room here is given up."""

    def __init__(
        self, homes: dict[str, tuple[nn.Layer, str]], fetches: list[Fetch], layers: WaitingLayers
    ) -> None:
        self.paths, self.homes = set(homes), list(homes.values())
        self.layers, self.number = layers, layers.add(fetches)
        for home, name in self.homes:
            home._parameters[name]._clear_data()

    def gather(self) -> list[Tensor]:
        """The whole parameters."""
        return self.layers.take(self.number)


class _Bundle:
    """Some parameters of one layer that are sliced over one group and have one type."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.paths: list[str] = []
        self.homes: list[tuple[nn.Layer, str]] = []
        self.shapes: list[list[int]] = []
        self.pieces: list[Tensor] = []

    def add(self, path: str, home: nn.Layer, name: str) -> None:
        """Cut a parameter, and free all of it but the slice."""
        whole = home._parameters[name]
        piece = parameter([slices.length(whole.shape, self.group)], str(whole.dtype).split(".")[-1])
        piece.set_value(slices.own(whole, self.group))
        piece.stop_gradient = whole.stop_gradient
        self.paths.append(path)
        self.homes.append((home, name))
        self.shapes.append(list(whole.shape))
        self.pieces.append(piece)
        whole._clear_data()

    def gather(self) -> list[Tensor]:
        """The whole parameters."""
        return slices.gather(self.pieces, self.shapes, self.group)


class _Gather(PyLayer):
    """x and the slices -> x and the whole trained parameters; backward reduces to the slices.

    One node for all of a layer, which x always passes: every process reduces, whatever its samples reached.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.block = block
        return (x.clone(), *(whole for bundle in block.bundles for whole in bundle.gather()))

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
        return (grad_x, *ctx.block.reduce(list(gradients)))


class Block:
    """One layer whose trained parameters (`trained`, slices by path) or frozen ones are gathered in use.

    Or fetched: `waiting` are frozen ones that are not there, by path.
    """

    def __init__(
        self,
        prefix: str,
        layer: nn.Layer,
        team: Team,
        trained: bool,
        frozen: bool,
        waiting: Waiting | None = None,
    ) -> None:
        bundles: dict[tuple[bool, int, str], _Bundle] = {}
        self.team = team
        absent = (waiting or Waiting({})).of(prefix, layer)
        for path, home, name in _parameters(layer, prefix):
            whole = home._parameters[name]
            group = team.replica if Part.of(path).expert else team.data
            if path in absent.paths or group.size == 1 or not (frozen if whole.stop_gradient else trained):
                continue
            key = (bool(whole.stop_gradient), id(group), str(whole.dtype))
            bundles.setdefault(key, _Bundle(group)).add(path, home, name)
        self.bundles = [bundle for (still, *_), bundle in bundles.items() if not still]
        self.frozen: list[_Bundle | _FromHost] = [b for (still, *_), b in bundles.items() if still]
        if absent.homes:
            self.frozen.append(absent)
        self._stacks = [sub for sub in layer.sublayers() if isinstance(sub, ExpertLinear)]
        self._reached: set[str] = set()

    @property
    def trained(self) -> dict[str, Tensor]:
        """The slices that train, by path."""
        return {
            path: piece
            for bundle in self.bundles
            for path, piece in zip(bundle.paths, bundle.pieces, strict=True)
        }

    def take_reached(self) -> set[str]:
        """Paths that got a gradient from this process since the last call."""
        reached, self._reached = self._reached, set()
        return reached

    def reduce(self, gradients: list[Tensor | None]) -> list[Tensor]:
        """Gradients of the whole parameters -> those of this process's slices, summed."""
        reduced: list[Tensor] = []
        for bundle in self.bundles:
            mine = [gradients.pop(0) for _ in bundle.pieces]
            self._reached |= {p for p, g in zip(bundle.paths, mine, strict=True) if g is not None}
            mine = self._whole_over_tensor(bundle, mine)
            dtype = str(bundle.pieces[0].dtype).split(".")[-1]
            reduced += slices.reduce(mine, bundle.shapes, bundle.group, dtype)
        return reduced

    def _whole_over_tensor(self, bundle: _Bundle, gradients: list[Tensor | None]) -> list[Tensor | None]:
        if self.team.tensor.size == 1:
            return gradients
        partial = [i for i, path in enumerate(bundle.paths) if Part.of(path).partial]
        filled = [
            paddle.zeros(bundle.shapes[i], bundle.pieces[i].dtype) if gradients[i] is None else gradients[i]
            for i in partial
        ]
        for i, total in zip(partial, slices.sum_all(filled, self.team.tensor), strict=True):
            gradients[i] = total
        return gradients

    def around(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer's forward pass with its parameters gathered."""

        def run(x: Tensor, *others: object) -> Tensor:
            with paddle.no_grad():
                still = [whole for bundle in self.frozen for whole in bundle.gather()]
            moving: tuple[Tensor, ...] = ()
            if self.bundles:
                pieces = [piece for bundle in self.bundles for piece in bundle.pieces]
                x, *rest = _Gather.apply(x, self, *pieces)
                moving = tuple(rest)
            with self._placed(still, moving):
                return forward(x, *others)

        return run

    @contextmanager
    def _placed(self, still: list[Tensor], moving: tuple[Tensor, ...]) -> Iterator[None]:
        homes = [home for bundle in (*self.frozen, *self.bundles) for home in bundle.homes]
        before = [home._parameters[name] for home, name in homes]
        for (home, name), whole in zip(homes, (*still, *moving), strict=True):
            home._parameters[name] = whole
        try:
            yield
        finally:
            for (home, name), sliced in zip(homes, before, strict=True):
                home._parameters[name] = sliced
            for stack in self._stacks:
                stack.forget_views()  # they would keep the gathered stack alive


def _parameters(layer: nn.Layer, prefix: str) -> Iterator[tuple[str, nn.Layer, str]]:
    """(path, the layer that has it, its name there) of every parameter."""
    for path, home in layer.named_sublayers(include_self=True):
        for name, found in home._parameters.items():
            if found is not None:
                yield ".".join(part for part in (prefix, path, name) if part), home, name
