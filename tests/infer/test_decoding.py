"""The cache must not change the answer: decoding step by step equals reading everything anew each time."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernietune.infer.engine import Engine
from ernietune.infer.request import Request, SamplingParams
from ernietune.models.decoder import CausalLM, Inputs
from tests import tiny
from tests.fakes import ByteTokenizer, PlainTemplate

STEPS = 6


def uncached(model: CausalLM, request: Request) -> list[int]:
    """Greedy decoding without a cache, every token's forward over the whole sequence."""
    ids, positions = request.ids.tolist(), request.positions.tolist()
    routed = list(tiny.TOKENS.values())
    for _ in range(STEPS):
        with paddle.no_grad():
            hidden = model(
                Inputs(
                    ids=paddle.to_tensor(np.array(ids)),
                    positions=paddle.to_tensor(np.array(positions)),
                    is_vision=paddle.to_tensor(np.isin(ids, routed)) if model.config.is_vl else None,
                    patches=None if request.patches is None else paddle.to_tensor(request.patches),
                    grids=request.grids,
                )
            )
            token = int(model.logits(hidden)[-1].argmax())
        ids.append(token)
        positions.append([int(np.max(positions)) + 1] * 3)
    return ids[len(request.ids) :]


@pytest.mark.parametrize(
    ("shape", "grids"),
    [("tiny-dense", []), ("tiny-moe", []), ("tiny-vl", []), ("tiny-vl", [(1, 4, 6), (1, 2, 2)])],
)
def test_cached_decoding_equals_reading_everything_again(
    shape: str, grids: list[tuple[int, int, int]]
) -> None:
    model = tiny.model(shape)
    ids, positions = tiny.document([9, *["image"] * len(grids), 11], grids)
    request = Request(
        ids=ids,
        positions=positions,
        is_vision=np.isin(ids, list(tiny.TOKENS.values())) if model.config.is_vl else None,
        patches=np.concatenate([tiny.picture(grid) for grid in grids]) if grids else None,
        grids=tuple(grids),
    )
    engine = Engine(model, ByteTokenizer(), PlainTemplate(), max_length=200)
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    assert list(engine.generate(request, params).ids) == uncached(model, request)


def test_the_same_seed_gives_the_same_answer() -> None:
    ids, positions = tiny.document([12])
    request = Request(ids, positions)
    engine = Engine(tiny.model("tiny-dense"), ByteTokenizer(), PlainTemplate(), max_length=200)

    def answer(seed: int) -> tuple[int, ...]:
        return engine.generate(request, SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)).ids

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)
