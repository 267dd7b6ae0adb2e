from __future__ import annotations

import numpy as np
import pytest

from ernietune.errors import RequestError
from ernietune.infer.penalties import Penalties
from ernietune.infer.request import SamplingParams, SettingError
from ernietune.infer.sampler import Sampler, candidates, log_probability

LOGITS = np.array([2.0, -1.0, 0.5, 1.0], np.float32)
NOTHING = -np.inf


def after(drawn: list[int], prompt: list[int] = [], ends: list[int] = [], **settings: object) -> list[float]:  # noqa: B006
    """The logits of the next token when these were drawn before."""
    penalties = Penalties(SamplingParams(**settings), np.array(prompt, np.int64), ends)
    for token in drawn:
        penalties.push(token)
    before = LOGITS.copy()
    result = penalties.apply(LOGITS).tolist()
    assert LOGITS.tolist() == before.tolist()
    return result


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> (
    None
):
    assert after([1], prompt=[0, 0], repetition_penalty=2.0) == [1.0, -2.0, 0.5, 1.0]


def test_presence_counts_once_and_frequency_every_time_and_neither_the_prompt() -> None:
    assert after([3, 3, 1], prompt=[0], presence_penalty=0.5) == [2.0, -1.5, 0.5, 0.5]
    assert after([3, 3, 1], prompt=[0], frequency_penalty=0.25) == [2.0, -1.25, 0.5, 0.5]
    assert after([3], frequency_penalty=-1.0) == [2.0, -1.0, 0.5, 2.0]


def test_bad_words_are_stopped_at_their_last_token() -> None:
    assert after([], bad_words=((2,),)) == [2.0, -1.0, NOTHING, 1.0]
    word = ((1, 3, 0),)
    assert after([1], bad_words=word)[0] == 2.0
    assert after([1, 3], bad_words=word)[0] == NOTHING
    assert after([1, 3, 2], bad_words=word)[0] == 2.0
    assert after([3], prompt=[1], bad_words=word)[0] == NOTHING  # begun in the prompt


def test_biases_and_allowed_tokens() -> None:
    assert after([], logit_bias=((1, 3.5), (0, -2.0))) == [0.0, 2.5, 0.5, 1.0]
    assert after([], allowed_ids=(3, 1)) == [NOTHING, -1.0, NOTHING, 1.0]


def test_before_min_tokens_nothing_ends_the_answer() -> None:
    assert after([3], ends=[0], min_tokens=2) == [NOTHING, -1.0, 0.5, 1.0]
    assert after([3, 3], ends=[0], min_tokens=2) == LOGITS.tolist()


def test_when_every_token_is_forbidden_the_request_fails_with_a_reason() -> None:
    with pytest.raises(RequestError, match="forbid every one"):
        Sampler(SamplingParams(allowed_ids=(2,), bad_words=((2,),))).pick(LOGITS)


def test_min_p_is_relative_to_the_best_after_temperature() -> None:
    # At temperature 1 the shares of the best are 1, 0.050, 0.223, 0.368; at 0.5 they are squared.
    assert candidates(LOGITS, SamplingParams(min_p=0.2))[0].tolist() == [0, 2, 3]
    assert candidates(LOGITS, SamplingParams(min_p=0.1, temperature=0.5))[0].tolist() == [0, 3]
    assert candidates(LOGITS, SamplingParams(min_p=1.0))[0].tolist() == [0]


def test_forbidden_tokens_are_never_drawn() -> None:
    sampler = Sampler(SamplingParams(seed=0, bad_words=((0,), (3,))))
    assert {sampler.pick(LOGITS) for _ in range(200)} == {1, 2}


def test_choices_of_one_seed_draw_differently() -> None:
    def draws(choice: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=3), choice=choice)
        return [sampler.pick(LOGITS) for _ in range(40)]

    assert draws(1) == draws(1)
    assert len({tuple(draws(choice)) for choice in range(4)}) == 4


def test_what_is_drawn_does_not_depend_on_the_last_bits_of_the_logits() -> None:
    generator = np.random.default_rng(0)
    flat = generator.normal(0, 1e-6, 50).astype(np.float32)  # nearly equal: their order is noise
    noisy = flat + generator.normal(0, 1e-6, 50).astype(np.float32)
    params = SamplingParams(seed=1, top_p=0.999999)
    one, other = Sampler(params), Sampler(params)
    assert [one.pick(flat) for _ in range(50)] == [other.pick(noisy) for _ in range(50)]


def test_log_probabilities_come_with_the_best_in_order() -> None:
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    entry = log_probability(LOGITS, 1, 3)
    assert entry.logprob == pytest.approx(exact[1])
    assert [token for token, _ in entry.top] == [0, 3, 2]
    assert [value for _, value in entry.top] == pytest.approx([exact[0], exact[3], exact[2]])
    assert log_probability(LOGITS, 1, 0).top == ()
    assert len(log_probability(LOGITS, 1, 20).top) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("bad_words", ((),)),
        ("allowed_ids", ()),
        ("logit_bias", ((1, 101.0),)),
        ("n", 0),
        ("n", 129),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("min_tokens", -1),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(SettingError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_lengths_that_contradict_each_other_are_named() -> None:
    with pytest.raises(SettingError, match=r"min_tokens is 5; it must be at most max_tokens \(4\)"):
        SamplingParams(max_tokens=4, min_tokens=5)
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0


@pytest.mark.parametrize("field", ["stop_ids", "allowed_ids"])
def test_token_ids_beyond_the_vocabulary_are_named(field: str) -> None:
    with pytest.raises(SettingError, match=f"{field} is 9; it must be made of token ids between 0 and 8"):
        SamplingParams(**{field: (1, 9)}).check_ids(9)
