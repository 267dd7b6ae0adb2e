"""What runs beside a request must not change its answer.

Every request of a crowded engine is compared with one forward pass over its prompt and answer alone,
without a cache: at each place the token must be the most probable one there and have the same
log-probability. By induction that is generation one token after the other.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.infer.request import Completion, Delta, Request, SamplingParams
from ernietune.models.decoder import CausalLM, Inputs
from tests import adapted, tiny
from tests.fakes import ByteTokenizer, PlainTemplate

PICTURE = tiny.TOKENS["im_patch_id"]
VISION = list(tiny.TOKENS.values())
# 32 blocks of 4 tokens, far less than the requests want together, and steps of at most 24 tokens.
CROWDED = EngineOptions(max_sequences=8, max_batched_tokens=24, block_size=4, cache_tokens=128)


def greedy(**settings: object) -> SamplingParams:
    """The placeholder never gets into an answer: the reference would look for its picture."""
    fixed = {"temperature": 0.0, "logprobs": 3, "ignore_eos": True, "bad_words": ((PICTURE,),)}
    return SamplingParams(**(fixed | settings))


def crowded(model: CausalLM, options: EngineOptions = CROWDED) -> Engine:
    return Engine(model, ByteTokenizer(), PlainTemplate(), max_length=120, options=options)


def requests(model: CausalLM, count: int) -> list[Request]:
    """Prompts of 1 to 77 tokens; every third begins alike, every other has pictures (VL)."""
    generator = np.random.default_rng(5)
    shared = generator.integers(10, 200, 26)
    made = []
    for number in range(count):
        grids = [(1, 4, 6), (1, 2, 2), (2, 4, 4)][: number % 4] if model.config.is_vl and number % 2 else []
        own = int(generator.integers(1, 30))
        ids, positions = tiny.document([26, *["image"] * len(grids), own], grids, seed=number)
        ids[:26] = shared if number % 3 == 0 else ids[:26]
        if not grids and number % 5 == 0:
            ids, positions = ids[26:], positions[: len(ids) - 26]
        pixels = [tiny.picture(grid, seed=number % 2) for grid in grids]
        made.append(Request(ids, positions, None, np.concatenate(pixels) if pixels else None, tuple(grids)))
    return made


def with_videos(model: CausalLM, count: int) -> list[Request]:
    """Prompts with a video of two to six frames, every third with a picture before it.

    The same video comes up for several requests: its features and prefix are shared where nothing differs.
    """
    made = []
    for number in range(count):
        video = ((2, 4, 4), (4, 4, 6), (6, 4, 4))[number % 3]
        grids = [(1, 4, 4), video] if number % 3 == 2 else [video]
        ids, positions = tiny.document([9, *["image"] * len(grids), 3 + number], grids, seed=number % 2)
        pixels = np.concatenate([tiny.picture(grid, seed=number % 2) for grid in grids])
        made.append(Request(ids, positions, None, pixels, tuple(grids)))
    return made


def log_probabilities(model: CausalLM, request: Request, answer: tuple[int, ...]) -> np.ndarray:
    """[prompt + answer, V] in one forward without a cache, from fp64 sums."""
    ids = np.concatenate([request.ids, np.array(answer, np.int64)])
    after = np.full((len(answer), 3), request.next_position) + np.arange(len(answer))[:, None]
    with paddle.no_grad():
        hidden = model(
            Inputs(
                ids=paddle.to_tensor(ids),
                positions=paddle.to_tensor(np.concatenate([request.positions, after])),
                is_vision=paddle.to_tensor(np.isin(ids, VISION)) if model.config.is_vl else None,
                patches=None if request.patches is None else paddle.to_tensor(request.patches),
                grids=request.grids,
            )
        )
        logits = model.logits(hidden).numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    prompt: tuple = ()

    def take(self, delta: Delta) -> None:
        self.ids += delta.ids
        self.logprobs += [entry.logprob for entry in delta.logprobs]
        self.finished = delta.finish_reason is not None
        self.prompt = delta.prompt_logprobs or self.prompt


def run(
    engine: Engine,
    asked: list[tuple[Request, SamplingParams]],
    cancel: set[int],
    begun: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """All at once; those in `cancel` are given up after their third token. `begun` is called with each."""
    answers = [Answer() for _ in asked]
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    runs = [
        engine.run(request, params, lambda item, i=i: arrived.put((i, item)), priority=i % 2)
        for i, (request, params) in enumerate(asked)
    ]
    for run in runs:
        run.start()
    while not all(answer.finished for i, answer in enumerate(answers) if i not in cancel):
        i, item = arrived.get(timeout=30)
        if isinstance(item, BaseException):
            raise item
        begun()
        answers[i].take(item)
        if i in cancel and len(answers[i].ids) == 3:
            runs[i].cancel()
    for number in cancel:
        runs[number].cancel()
    while engine.stats().running or engine.stats().waiting:
        time.sleep(0.005)
    return answers


SECOND = {"rank": 2, "rslora": True, "alpha": 3.0}


def mixed(model: CausalLM, count: int) -> list[tuple[Request, SamplingParams]]:
    """Texts, pictures and videos (VL), the model alone and two adapters in turn; some prompts are scored too.

    A kind of request that is to be mixed in joins this list.
    """
    seen = with_videos(model, count // 5) if model.config.is_vl else []
    return [
        (
            replace(request, adapter=(None, "one", "two")[number % 3]),
            greedy(max_tokens=3 + 4 * (number % 8), prompt_logprobs=2 if number % 7 == 0 else None),
        )
        for number, request in enumerate([*requests(model, count - len(seen)), *seen])
    ]


@pytest.mark.parametrize(("shape", "count"), [("tiny-dense", 70), ("tiny-moe", 65), ("tiny-vl", 65)])
def test_a_crowd_gets_the_answers_that_each_gets_alone(shape: str, count: int, tmp_path: Path) -> None:
    """200 requests in chunks, from shared prefixes, preempted and beside cancelled ones, by three models."""
    engine = crowded(tiny.model(shape))
    engine.adapters.load("one", adapted.write(tmp_path / "one", shape, 1))
    engine.adapters.load("two", adapted.write(tmp_path / "two", shape, 2, **SECOND))
    alone = {
        None: tiny.model(shape),
        "one": adapted.merged(shape, 1),
        "two": adapted.merged(shape, 2, **SECOND),
    }
    asked = mixed(engine.model, count)
    cancelled = {2, 9, 15, 31, 32, 49}
    answers = run(engine, asked, cancelled)
    for number, ((request, params), answer) in enumerate(zip(asked, answers, strict=True)):
        assert answer.finished or number in cancelled
        if answer.ids:
            check(alone[request.adapter], request, params, answer)
    stats = engine.stats()
    assert stats.preemptions >= 2
    assert stats.prefix_hits > 20
    assert stats.free_blocks == stats.blocks == 32


def check(model: CausalLM, request: Request, params: SamplingParams, answer: Answer) -> None:
    truth = log_probabilities(model, request, tuple(answer.ids))
    prompt = len(request.ids)
    at = truth[prompt - 1 : -1]
    expected = at[np.arange(len(answer.ids)), answer.ids]
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-5)
    allowed = at.copy()
    allowed[:, PICTURE] = -np.inf
    assert answer.ids == allowed.argmax(-1).tolist()
    if params.prompt_logprobs is not None:
        first, *scores = answer.prompt
        assert first is None
        values = truth[np.arange(prompt - 1), request.ids[1:]]
        np.testing.assert_allclose([score.logprob for score in scores], values, atol=1e-5)
        best = np.sort(truth[: prompt - 1], axis=-1)[:, ::-1][:, :2]
        np.testing.assert_allclose([[v for _, v in s.top] for s in scores], best, atol=1e-5)
    else:
        assert answer.prompt == ()


@pytest.mark.parametrize("shape", ["tiny-dense", "tiny-moe"])
def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(shape: str) -> None:
    model = tiny.model(shape)
    asked = [
        (
            request,
            SamplingParams(
                max_tokens=10,
                seed=number,
                temperature=0.9,
                top_p=0.95 if number % 2 else 1.0,
                top_k=0 if number % 3 else 40,
                min_p=0.01 if number % 4 == 0 else 0.0,
                repetition_penalty=1.2 if number % 5 == 0 else 1.0,
                presence_penalty=0.5 if number % 2 else 0.0,
                logprobs=0,
                ignore_eos=True,
            ),
        )
        for number, request in enumerate(requests(model, 16))
    ]
    together = run(crowded(model), asked, {5})
    alone = crowded(model, EngineOptions(max_sequences=1, prefix_cache=False, max_batched_tokens=200))
    for number, ((request, params), answer) in enumerate(zip(asked, together, strict=True)):
        if number != 5:
            assert alone.generate(request, params).ids == tuple(answer.ids), number


def test_choices_share_the_prompt_and_differ_from_each_other() -> None:
    model = tiny.model("tiny-dense")
    engine = crowded(model)
    ids, positions = tiny.document([42])
    request = Request(ids, positions)
    params = SamplingParams(n=4, seed=1, max_tokens=8, ignore_eos=True, prompt_logprobs=1)
    choices = engine.generate_all(request, params)
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.ids for choice in choices}) == 4
    # 42 tokens are ten full blocks of 4: only the last two tokens of the prompt are read again.
    assert [choice.cached_tokens for choice in choices] == [0, 40, 40, 40]
    assert [choice.prompt_logprobs is None for choice in choices] == [False, True, True, True]
    assert engine.generate_all(request, params)[3].ids == choices[3].ids
    single = SamplingParams(seed=1, max_tokens=8, ignore_eos=True)
    assert engine.generate(request, single).ids == choices[0].ids


def test_a_conversation_finds_its_earlier_turns_in_the_cache() -> None:
    engine = crowded(tiny.model("tiny-dense"))
    ids, _ = tiny.document([30])
    first = engine.generate(engine.prepare_ids(ids), greedy(max_tokens=10))
    assert first.cached_tokens == 0
    # The last generated token was never read: 39 tokens are in the cache, 36 of them in full blocks.
    again = engine.generate(engine.prepare_ids([*ids, *first.ids, 77, 78]), greedy(max_tokens=2))
    assert again.cached_tokens == 36
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (30 + 42, 36)
    assert stats.free_blocks == stats.blocks


def test_a_prompt_is_never_taken_from_the_cache_as_a_whole() -> None:
    engine = crowded(tiny.model("tiny-dense"))
    request = engine.prepare_ids(tiny.document([16])[0])
    answers = [engine.generate(request, greedy(max_tokens=4)) for _ in range(2)]
    assert [answer.cached_tokens for answer in answers] == [0, 12]
    assert answers[0].ids == answers[1].ids


def test_other_pixels_or_another_shape_are_another_prefix() -> None:
    engine = crowded(tiny.model("tiny-vl"))

    def cached(grid: tuple[int, int, int], seed: int) -> int:
        ids, positions = tiny.document([3, "image", 20], [grid])
        request = Request(ids, positions, None, tiny.picture(grid, seed), (grid,))
        return engine.generate(request, greedy(max_tokens=1)).cached_tokens

    # 3 + 8 + 20 tokens, the picture's six at 4 to 9 (24 patches in both shapes).
    assert cached((1, 4, 6), 0) == 0
    assert cached((1, 4, 6), 0) == 28
    assert cached((1, 4, 6), 1) == 4
    assert cached((1, 6, 4), 0) == 4


def test_the_features_of_a_picture_are_computed_once() -> None:
    model = tiny.model("tiny-vl")
    engine = crowded(model, EngineOptions(max_batched_tokens=16, prefix_cache=False))
    computed = []
    features = model.picture_features
    model.picture_features = lambda patches, grids: computed.append(grids) or features(patches, grids)
    ids, positions = tiny.document(["image", 2, "image", 5], [(1, 8, 8)] * 2)
    pixels = np.concatenate([tiny.picture((1, 8, 8), 3)] * 2)
    request = Request(ids, positions, None, pixels, ((1, 8, 8),) * 2)
    answers = [engine.generate(request, greedy(max_tokens=3)) for _ in range(2)]
    assert computed == [[(1, 8, 8)]]
    check(model, request, greedy(), as_answer(answers[1]))


def as_answer(completion: Completion) -> Answer:
    return Answer(list(completion.ids), [entry.logprob for entry in completion.logprobs], True)


def test_logprobs_report_the_best_and_the_greedy_value_is_the_very_same_float() -> None:
    engine = crowded(tiny.model("tiny-dense"))
    answer = engine.generate(engine.prepare_ids([11, 12, 13]), greedy(max_tokens=5, prompt_logprobs=1))
    assert len(answer.logprobs) == 5
    for entry, token in zip(answer.logprobs, answer.ids, strict=True):
        assert entry.id == token
        assert len(entry.top) == 3
        assert entry.top[0] == (token, entry.logprob)
        assert [value for _, value in entry.top] == sorted((v for _, v in entry.top), reverse=True)


def test_a_prompt_can_be_scored_without_an_answer() -> None:
    model = tiny.model("tiny-moe")
    engine = crowded(model)
    request = engine.prepare_ids(tiny.document([120])[0])  # as long as the context
    answer = engine.generate(request, greedy(max_tokens=0, prompt_logprobs=0))
    assert (answer.ids, answer.text, answer.finish_reason) == ((), "", "length")
    truth = log_probabilities(model, request, ())
    values = [score.logprob for score in answer.prompt_logprobs[1:]]
    np.testing.assert_allclose(values, truth[np.arange(119), request.ids[1:]], atol=1e-5)
