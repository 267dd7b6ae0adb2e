"""The engine, answering everything at once, against transformers on the same random weights, in fp32."""

import numpy as np
import pytest
import references
import tiny

from ernietune.checkpoint.load import load_model
from ernietune.infer.engine import Engine
from ernietune.infer.options import EngineOptions
from ernietune.infer.request import Request, SamplingParams
from tests.fakes import ByteTokenizer, PlainTemplate

torch = references.torch
pytestmark = pytest.mark.parity
NEW = 10
CROWDED = EngineOptions(max_sequences=4, max_batched_tokens=16, block_size=4, cache_tokens=96)


@pytest.fixture(scope="module", params=list(references.BUILDERS))
def pair(request, tmp_path_factory):
    """(kind, transformers model, our engine), ours loaded from what transformers saved."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = references.build(request.param)
    reference.save_pretrained(folder)
    return request.param, reference, Engine(
        load_model(folder), ByteTokenizer(), PlainTemplate(), max_length=64, options=CROWDED
    )  # fmt: skip


def log_softmax(logits):
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def answer(engine, requests):
    """All requests side by side: [(ids, logprobs)]; the picture's placeholder stays out of the answers."""
    params = SamplingParams(
        temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=0, bad_words=((references.IMAGE,),)
    )
    streams = [engine.stream(request, params) for request in requests]
    started = [[next(stream)] for stream in streams]
    deltas = [first + list(stream) for first, stream in zip(started, streams, strict=True)]
    return [
        ([t for d in all_ for t in d.ids], [entry.logprob for d in all_ for entry in d.logprobs])
        for all_ in deltas
    ]


def compare(reference, prompt, said, logprobs, **inputs):
    """Greedy by transformers: one forward over prompt and answer gives every step's choice."""
    ids = np.concatenate([prompt, said])
    extra = inputs["make"](ids) if inputs else {}
    truth = log_softmax(references.logits(reference, ids, **extra)[len(prompt) - 1 : -1])
    np.testing.assert_allclose(logprobs, truth[np.arange(NEW), said], atol=2e-5)
    truth[:, references.IMAGE] = -np.inf
    assert truth.argmax(-1).tolist() == said


def generated(reference, prompt, **inputs):
    """The greedy answer of transformers' own `generate`, step by step over its cache."""
    ids = torch.tensor(np.asarray(prompt))[None]
    whole = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        bad_words_ids=[[references.IMAGE]],
        **inputs,
    )
    return whole[0, len(prompt) :].tolist()


def test_greedy_answers(pair):
    kind, reference, engine = pair
    generator = np.random.default_rng(1)
    prompts = [generator.integers(20, 300, count) for count in (3, 41, 12, 1, 27, 18)]
    answers = answer(engine, [engine.prepare_ids(ids) for ids in prompts])
    for ids, (said, logprobs) in zip(prompts, answers, strict=True):
        assert len(said) == NEW
        if kind == "vl":
            compare(reference, ids, said, logprobs, make=lambda all_: references.picture_inputs(all_, [], []))
            assert generated(reference, ids, **references.picture_inputs(ids, [], [])) == said
        else:
            compare(reference, ids, said, logprobs)
            assert generated(reference, ids) == said
    assert engine.stats().free_blocks == engine.stats().blocks


def test_greedy_answers_about_pictures(pair):
    kind, reference, engine = pair
    if kind != "vl":
        pytest.skip("a text model")
    grids = [(1, 4, 6), (1, 2, 2)]
    pixels = [tiny.picture(grid) for grid in grids]
    requests = []
    for number in range(4):
        ids, positions = tiny.document([3, "image", 2, "image", 4 + number], grids, seed=number)
        requests.append(Request(ids, positions, None, np.concatenate(pixels), tuple(grids)))
    for request, (said, logprobs) in zip(requests, answer(engine, requests), strict=True):
        compare(
            reference,
            request.ids,
            said,
            logprobs,
            make=lambda all_: references.picture_inputs(all_, grids, pixels),
        )
        inputs = references.picture_inputs(request.ids, grids, pixels)
        assert generated(reference, request.ids, **inputs) == said
