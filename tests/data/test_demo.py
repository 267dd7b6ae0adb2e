"""The bundled demo data: what it claims about itself holds, and it passes the whole data path."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernietune.data.dataset import Dataset, Encoder, Sample, VisionTokens
from ernietune.data.sources import open_source, read_records
from ernietune.data.stream import Stream, StreamOptions
from ernietune.media.image import ImageLimits
from ernietune.text.template import IGNORE, Template
from ernietune.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TINY, BADGES = ROOT / "data" / "tiny", ROOT / "data" / "badges"
LETTERS = {"red": "K", "green": "M", "blue": "T", "yellow": "R", "purple": "V", "black": "H"}
LIMITS = ImageLimits(min_pixels=3136, max_pixels=50176)


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shapes", ROOT / "examples" / "shapes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def image_of(record: Any) -> Image.Image:
    uri = record["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def color_family(pixel: np.ndarray) -> str:
    """A colour's name by its strong and weak channels, without the generator's table."""
    strong = tuple(pixel > 110)
    if strong == (False, False, False):
        return "black"
    return {
        (True, False, False): "red",
        (False, True, False): "green",
        (False, False, True): "blue",
        (True, True, False): "yellow",
        (True, False, True): "purple",
    }[strong]


@pytest.mark.parametrize(("name", "count"), [("train", 480), ("heldout", 120)])
def test_badges_are_balanced_and_their_letter_is_the_colour(name: str, count: int) -> None:
    records = [record for record, _ in read_records(BADGES / f"{name}.jsonl")]
    answers = Counter(record["messages"][1]["content"] for record in records)
    assert len(records) == count
    assert set(answers.values()) == {count // 24}
    assert len(answers) == 24
    for record in records:
        pixels = np.asarray(image_of(record)).reshape(-1, 3)
        darkest = pixels[pixels.min(axis=1).argmin()]
        assert record["messages"][1]["content"][0] == LETTERS[color_family(darkest)]


def test_the_held_out_pictures_are_not_in_the_training_set() -> None:
    train, heldout = (
        {image_of(record).tobytes() for record, _ in read_records(BADGES / f"{name}.jsonl")}
        for name in ("train", "heldout")
    )
    assert len(train) == 480
    assert not train & heldout


def test_the_bundled_files_are_what_the_generator_writes(shapes: ModuleType) -> None:
    written = [record for record, _ in islice(read_records(BADGES / "train.jsonl"), 20)]
    again = list(islice(shapes.badges(20, 1), 20))
    for ours, theirs in zip(again, written, strict=True):
        assert np.array_equal(np.asarray(image_of(ours)), np.asarray(image_of(theirs)))
        assert ours["messages"][1] == theirs["messages"][1]


def test_answers_follow_from_the_scene(shapes: ModuleType) -> None:
    red, blue = shapes.Thing("red", "circle", 28, 28, 15), shapes.Thing("blue", "square", 84, 84, 15)
    rng = np.random.default_rng(0)
    scene = [red, blue]
    assert {shapes.ask_count(rng, scene, "en")[1] for _ in range(5)} == {"2"}
    assert {shapes.ask_list(rng, scene, "zh")[1] for _ in range(5)} == {"红色圆形，蓝色正方形"}
    for _ in range(40):
        question, answer = shapes.ask_place(rng, scene, "en")
        assert answer == ("top left" if "red" in question else "bottom right")
        question, answer = shapes.ask_color(rng, scene, "en")
        assert answer == ("red" if "circle" in question else "blue")
        asked = shapes.ask_presence(rng, scene, "en")
        if asked is not None:
            assert asked[1] == ("yes" if "red circle" in asked[0] or "blue square" in asked[0] else "no")


def test_unclear_questions_are_not_asked(shapes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    twins = [shapes.Thing("red", "circle", 28, 28, 15), shapes.Thing("red", "circle", 84, 84, 15)]
    assert all(
        ask(rng, twins, "en") is None for ask in (shapes.ask_color, shapes.ask_shape, shapes.ask_place)
    )
    assert shapes.ask_place(rng, [shapes.Thing("red", "circle", 60, 90, 15)], "en") is None


def test_a_record_depends_on_seed_and_number_only(shapes: ModuleType) -> None:
    few = list(shapes.generate(shapes.pretrain_record, 3, seed=5))
    more = list(islice(shapes.generate(shapes.pretrain_record, 9, seed=5), 3))
    assert json.dumps(few) == json.dumps(more)


@pytest.mark.parametrize(
    "text", ["red", "purple", "yes", "红色", "正方形", "没有", "K", "7", "Picture", "User"]
)
def test_common_words_are_one_token(tokenizer: Tokenizer, text: str) -> None:
    assert len(tokenizer.encode(text)) == 1


def test_a_badge_passes_the_whole_data_path(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.id_of(f"<|IMAGE_{name}|>") for name in ("PLACEHOLDER", "START", "END")]
    template = Template.for_checkpoint(tokenizer, "ernie4_5_moe_vl")
    encoder = Encoder(template, 64, vision=VisionTokens(ids[0], frozenset(ids)), limits=LIMITS)
    dataset = Dataset([open_source(BADGES / "train.jsonl")], encoder)
    record = next(read_records(BADGES / "train.jsonl"))[0]
    sample = dataset[0]
    assert isinstance(sample, Sample)
    question, answer = record["messages"][0]["content"][1]["text"], record["messages"][1]["content"]
    picture = f"<|IMAGE_START|>{'<|IMAGE_PLACEHOLDER|>' * 16}<|IMAGE_END|>"
    prompt = f"<|begin_of_sentence|>User: Picture 1:{picture}{question}\nAssistant: <think>\n\n</think>\n\n"
    text = tokenizer.decode(sample.ids.tolist(), skip_special=False)
    assert text == f"{prompt}{answer}<|end_of_sentence|>"
    trained = sample.labels[sample.labels != IGNORE].tolist()
    assert trained == [*tokenizer.encode(answer), tokenizer.eos_id]
    assert sample.is_vision.sum() == 18
    assert sample.grids.tolist() == [[1, 8, 8]]
    # the picture is not resized, so its pixels come through: first patch, red channel, row by row
    pixels = np.asarray(image_of(record).convert("RGB"))
    assert sample.patches[0, :196].tolist() == pixels[:14, :14, 0].ravel().tolist()
    batch = next(Stream(dataset, StreamOptions(max_length=512)))
    assert batch.samples > 8
    assert batch.supervised == 3 * batch.samples
