from __future__ import annotations

import numpy as np
import pytest

from ernietune.errors import CheckpointError, RequestError
from ernietune.infer.request import SamplingParams, SettingError
from ernietune.infer.sampler import Sampler, candidates

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def draws(count: int, **settings: float) -> list[int]:
    sampler = Sampler(SamplingParams(**settings))
    return [sampler.pick(LOGITS) for _ in range(count)]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.39}])
def test_greedy_takes_the_most_probable(settings: dict[str, float]) -> None:
    assert set(draws(50, **settings)) == {1}


def test_equal_seeds_give_equal_draws() -> None:
    assert draws(30, seed=7) == draws(30, seed=7)
    assert draws(30, seed=7) != draws(30, seed=8)
    assert draws(30, seed=-7) == draws(30, seed=-7)


def test_draws_follow_the_distribution() -> None:
    counts = np.bincount(draws(20000, seed=1), minlength=5) / 20000
    # Four standard deviations of a share of 0.4 over 20,000 draws are 0.014.
    np.testing.assert_allclose(counts, PROBABILITIES, atol=0.015)


def test_temperature_sharpens_the_distribution() -> None:
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    counts = np.bincount(draws(20000, seed=1, temperature=0.5), minlength=5) / 20000
    np.testing.assert_allclose(counts, expected, atol=0.015)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        # top_p counts over what top_k left: 0.4 of 0.7 is 57 %.
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"top_k": 2, "top_p": 0.6}, {1, 3}),
    ],
)
def test_kept_tokens(settings: dict[str, float], kept: set[int]) -> None:
    tokens, _ = candidates(LOGITS, SamplingParams(**settings))
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    logits = np.random.default_rng(3).normal(0, 3, 2000).astype(np.float32)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum()
    order = np.argsort(-exact)
    needed = int(np.argmax(np.cumsum(exact[order]) >= top_p)) + 1
    tokens, _ = candidates(logits, SamplingParams(top_p=top_p))
    assert tokens.tolist() == order[:needed].tolist()


def test_huge_logits_and_small_temperatures_do_not_overflow() -> None:
    assert Sampler(SamplingParams(temperature=1e-6, seed=0)).pick(np.float32([3e38, -3e38, 0])) == 0


def test_nan_is_reported_not_sampled() -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        Sampler(SamplingParams()).pick(np.float32([0, np.nan, 5]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_p", -0.5),
        ("top_k", -2),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"^{field} is ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert isinstance(caught.value, RequestError)
