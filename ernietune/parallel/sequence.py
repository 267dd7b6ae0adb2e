"""Sequence parallelism: between the divided products each process of a tensor group has a slice of the rows.

The residual stream [T, H] is cut into slices of ceil(T / t) rows on the way into the decoder. Attention and
MLP take all rows (an all-gather) and give the sum of everybody's outputs back in slices (a reduce-scatter):
the bytes of one all-reduce, while norms work on a slice and the graph keeps a slice. Rows of zeros fill the
last slices up; norms and sums leave them zero, and no product sees them.
"""

from __future__ import annotations

from collections.abc import Callable

from paddle import Tensor, nn

from ernietune.models.decoder import DecoderLayer
from ernietune.parallel.collectives import Group, all_rows, gathered_rows, own_rows, summed_rows

Forward = Callable[..., Tensor]


class RowSlices:
    """The rows of one forward pass over a tensor group; its backward pass comes before the next forward."""

    def __init__(self, group: Group) -> None:
        self.group, self.count = group, 0

    def around_decoder(self, decoder: nn.Layer) -> None:
        """Cut the rows on the way in, bring them together on the way out."""
        forward = decoder.forward

        def run(x: Tensor, *others: object) -> Tensor:
            self.count = x.shape[0]
            return all_rows(forward(own_rows(x, self.group), *others), self.group, self.count)

        decoder.forward = run

    def around_products(self, layer: DecoderLayer) -> None:
        """Attention and MLP work on all rows and on a part of their inner width."""
        modules: list[nn.Layer] = [layer.self_attn, layer.mlp]
        for number, module in enumerate(modules):
            gathering = Gathering(self)
            layer.add_sublayer(f"gathering_{number}", gathering)
            module.forward = self._divided(gathering, module.forward)

    def _divided(self, gathering: Gathering, forward: Forward) -> Forward:
        return lambda x, *others: summed_rows(forward(gathering(x), *others), self.group)


class Gathering(nn.Layer):
    """Slices -> all rows. A layer, so that recompute finds it: its output can be gathered again."""

    def __init__(self, slices: RowSlices) -> None:
        super().__init__()
        self.gathered: Callable[[Tensor], Tensor] = lambda x: gathered_rows(x, slices.group, slices.count)

    def forward(self, x: Tensor) -> Tensor:
        return self.gathered(x)
