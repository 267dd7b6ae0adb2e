"""A guess decides how soon a token comes, never which: answers with and without guesses are the same."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernietune.errors import RequestError
from ernietune.infer.drafts import Speculation
from ernietune.infer.engine import Engine
from ernietune.infer.following import complete
from ernietune.infer.options import EngineOptions
from ernietune.infer.request import Completion, SamplingParams
from tests import fakes, tiny
from tests.fakes import ByteTokenizer, PlainTemplate, tokens

GUESSES = Speculation(tokens=4, longest=3, shortest=1)


@pytest.mark.parametrize(
    ("ids", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 9, [3, 4, 5, 1]),  # 1 2 stood at the start, followed by 3 4 5 1
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 5, 1, 2], 0, []),
        ([9, 2, 3, 4, 5, 6, 1, 2, 7, 8, 0, 6, 1, 2], 3, [7, 8, 0]),  # the longer repetition wins over 9 2
        ([5, 1, 1, 1, 1, 5, 2, 2, 2, 2, 5], 4, [2, 2, 2, 2]),  # the latest of two
        ([5, 5, 5], 4, [5, 5, 5, 5]),  # nowhere four follow: it goes on as it began
        ([7, 1, 2, 1, 2], 4, [1, 2, 1, 2]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([], 4, []),
    ],
)
def test_a_guess_is_what_followed_the_same_tokens_before(ids, most, expected) -> None:
    assert GUESSES.guess(np.array(ids, np.int64), most).tolist() == expected


def test_too_short_a_repetition_is_no_reason_to_guess() -> None:
    ids = np.array([1, 2, 3, 4, 2], np.int64)
    assert Speculation(4, 3, shortest=2).guess(ids, 4).tolist() == []
    assert Speculation(4, 3, shortest=1).guess(ids, 4).tolist() == [3, 4, 2, 3]


@pytest.mark.parametrize("wrong", [(0, 4, 1), (4, 0, 0), (4, 2, 3)])
def test_impossible_settings_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(RequestError, match="num_speculative_tokens"):
        Speculation(*wrong)


def engines(shape: str, **options: object) -> tuple[Engine, Engine]:
    """The same model, without guesses and with them."""
    model = tiny.model(shape)
    return tuple(
        Engine(
            model,
            ByteTokenizer(),
            PlainTemplate(),
            max_length=200,
            options=EngineOptions(block_size=4, speculation=guesses, **options),
        )
        for guesses in (None, GUESSES)
    )


def prompts(engine: Engine) -> list:
    """Some with a phrase that comes back, some at random."""
    generator = np.random.default_rng(3)
    phrase = generator.integers(10, 200, 12).tolist()
    made = [generator.integers(10, 200, 9).tolist() for _ in range(4)]
    return [engine.prepare_ids(ids) for ids in [phrase * 3, [*phrase, *made[0], *phrase[:5]], *made]]


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "seed": 5},
    "nearly greedy": {"temperature": 0.05, "seed": 6, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "choices": {"temperature": 0.3, "seed": 7, "n": 3},
    "words": {"temperature": 0.0, "bad_words": ((50, 51), (60,)), "logit_bias": ((70, 3.0),)},
    "min_tokens": {"temperature": 0.0, "min_tokens": 20, "ignore_eos": False},
}


def answers(engine: Engine, **settings: object) -> list[Completion]:
    fixed = {"max_tokens": 40, "logprobs": 2, "ignore_eos": True, "prompt_logprobs": 1}
    params = SamplingParams(**(fixed | settings))
    tickets = [engine.stream(request, params) for request in prompts(engine)]
    return [
        completion
        for request, stream in zip(prompts(engine), tickets, strict=True)
        for completion in _whole(list(stream), request, params.n)
    ]


def _whole(deltas, request, n):
    return [complete([d for d in deltas if d.index == i], len(request.ids)) for i in range(n)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", ["tiny-dense", "tiny-vl"])
def test_guesses_change_no_answer(shape: str, name: str) -> None:
    plain, guessing = engines(shape)
    expected, found = (answers(engine, **SETTINGS[name]) for engine in (plain, guessing))
    for one, other in zip(expected, found, strict=True):
        assert (one.ids, one.text, one.finish_reason) == (other.ids, other.text, other.finish_reason)
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
        assert len(one.prompt_logprobs or ()) == len(other.prompt_logprobs or ())
    stats = guessing.stats()
    assert stats.drafted_tokens > 0
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    assert stats.generated_tokens == plain.stats().generated_tokens
    assert stats.free_blocks == stats.blocks


def test_right_guesses_save_steps() -> None:
    """A script that says its prompt again: nearly every guess is right."""
    text = "The quick brown fox jumps over the lazy dog. "
    plain, guessing = (scripted(text * 3, len(text), guesses) for guesses in (None, Speculation(5, 3, 2)))
    params = SamplingParams(temperature=0.0, max_tokens=120)
    expected, found = (
        engine.generate(engine.prepare_ids(tokens(text)), params) for engine in (plain, guessing)
    )
    assert found.ids == expected.ids
    assert plain.stats().steps == 120
    assert guessing.stats().steps < 40
    assert guessing.stats().accepted_tokens > 80


def scripted(script: str, prompt: int, guesses: Speculation | None) -> Engine:
    model = RowByRow(tokens(script), prompt)
    options = EngineOptions(prefix_cache=False, speculation=guesses)
    return Engine(model, ByteTokenizer(), PlainTemplate(), max_length=1000, options=options)


class RowByRow(fakes.ScriptedModel):
    """Answers a prompt of `prompt` tokens, and says behind each guess what it would, were the guess right."""

    def __init__(self, script, prompt):
        super().__init__(script)
        self.prompt = prompt

    def __call__(self, inputs, cache):
        super().__call__(inputs, cache)
        rows = [place for span in cache.spans for place in range(span.first, span.length)]
        hidden = paddle.to_tensor(rows, "float32").reshape([-1, 1]) + (1 - self.prompt)
        return self.asked_for(inputs, hidden)


def test_a_guess_behind_the_end_is_not_said() -> None:
    """The answer ends in the middle of what was guessed: nothing comes after it, and all blocks are free."""
    text = "one two three four one two "
    engine = scripted("three", len(text), Speculation(8, 3, 2))
    engine.model.script.append(fakes.EOS)
    done = engine.generate(engine.prepare_ids(tokens(text)), SamplingParams(temperature=0.0))
    assert (done.text, done.finish_reason) == ("three", "stop")
    stopped = engine.generate(engine.prepare_ids(tokens(text)), SamplingParams(temperature=0.0, stop=("re",)))
    assert (stopped.text, stopped.finish_reason) == ("th", "stop")
    assert engine.stats().free_blocks == engine.stats().blocks


def test_a_crowded_cache_gives_up_guesses_first() -> None:
    """Blocks for guesses are only what nobody else wants: nobody is put back for them."""
    plain, guessing = engines("tiny-dense", cache_tokens=220, max_sequences=6, max_batched_tokens=16)
    settings = {"temperature": 0.0, "max_tokens": 30, "prompt_logprobs": None}
    assert [a.ids for a in answers(plain, **settings)] == [a.ids for a in answers(guessing, **settings)]
    assert guessing.stats().accepted_tokens > 0
    assert guessing.stats().free_blocks == guessing.stats().blocks
