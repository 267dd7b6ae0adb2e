"""Hidden states of some rows alone: the same numbers, with nothing computed for the others at the end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest
import tiny


@pytest.mark.parametrize("shape", ["tiny-dense", "tiny-moe", "tiny-vl"])
@pytest.mark.parametrize("rows", [[23], [0, 9, 22], [8, 7], list(range(24))])
def test_wanted_rows_are_those_of_the_whole(shape: str, rows: list[int]) -> None:
    model = tiny.model(shape)
    grid = (1, 4, 4)
    layout = [7, "image", 11] if shape == "tiny-vl" else [24]
    with_picture = shape == "tiny-vl"
    one = tiny.document(layout, [grid] if with_picture else ())
    inputs = tiny.pack([one], [grid] if with_picture else (), [tiny.picture(grid)] if with_picture else None)
    seen = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    with paddle.no_grad():
        whole = model(inputs).numpy()
        some = model(replace(inputs, wanted_rows=paddle.to_tensor(np.array(rows)))).numpy()
    np.testing.assert_allclose(some, whole[rows], rtol=0, atol=2e-6)
    assert seen == [len(whole), len(rows)]
