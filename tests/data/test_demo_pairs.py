"""The bundled preference pairs are what they claim to be, and pass the whole data path."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ernietune.data.dataset import VisionTokens
from ernietune.data.pairs import Pair, PairDataset, PairEncoder, collate_pairs
from ernietune.data.sources import open_source, read_records
from ernietune.data.stream import Stream, StreamOptions
from ernietune.media.image import ImageLimits
from ernietune.text.template import Template
from ernietune.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data" / "preferences"
FILES = {"train": 480, "heldout": 120, "pictures_train": 480, "pictures_heldout": 120}
# Best first, both languages; written down here once more.
TASTE = [
    ["red", "yellow", "purple", "green", "blue", "black"],
    ["红色", "黄色", "紫色", "绿色", "蓝色", "黑色"],
    ["circle", "triangle", "cross", "square"],
    ["圆形", "三角形", "十字形", "正方形"],
]


def records(name: str) -> list[Any]:
    return [record for record, _ in read_records(FOLDER / f"{name}.jsonl")]


def question(record: Any) -> str:
    content = record["messages"][-1]["content"]
    return str(content if isinstance(content, str) else content[-1]["text"])


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_text_pairs_follow_the_taste(name: str) -> None:
    for record in records(name):
        order = next(order for order in TASTE if record["chosen"] in order)
        assert order.index(record["chosen"]) < order.index(record["rejected"])


def test_held_out_questions_are_new() -> None:
    assert not {question(r) for r in records("train")} & {question(r) for r in records("heldout")}
    pictures = [{str(r["messages"]) for r in records(f"pictures_{name}")} for name in ("train", "heldout")]
    assert not pictures[0] & pictures[1]


@pytest.mark.parametrize("name", ["pictures_train", "pictures_heldout"])
def test_badges_are_wrong_in_letter_digit_or_both(name: str) -> None:
    wrong = Counter(
        tuple(a == b for a, b in zip(r["chosen"], r["rejected"], strict=True)) for r in records(name)
    )
    assert set(wrong) == {(False, True), (True, False), (False, False)}
    assert min(wrong.values()) > len(records(name)) / 4


def test_no_answer_is_better_everywhere_among_badges() -> None:
    """A code is chosen about as often as rejected, so that pictures decide and not the code."""
    chosen, rejected = (
        Counter(r[side] for r in records("pictures_train")) for side in ("chosen", "rejected")
    )
    assert all(0.4 < chosen[code] / rejected[code] < 2.5 for code in chosen)


def test_the_script_writes_what_is_bundled(tmp_path: Path) -> None:
    script = ROOT / "examples" / "preferences.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    for name, count in FILES.items():
        made = [record for record, _ in read_records(tmp_path / f"{name}.jsonl")]
        assert len(made) == count
        if not name.startswith("pictures"):  # another Pillow may draw or compress otherwise
            assert made == records(name)


@pytest.fixture(scope="module")
def encoder() -> PairEncoder:
    tokenizer = Tokenizer.load(ROOT / "data" / "tiny")
    template = Template.for_checkpoint(tokenizer, "ernie4_5_moe_vl")
    names = ("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>")
    placeholder, *ends = (tokenizer.id_of(name) for name in names)
    return PairEncoder(
        template,
        512,
        vision=VisionTokens(placeholder, frozenset([placeholder, *ends])),
        limits=ImageLimits(min_pixels=3136, max_pixels=50176),
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data" / "samples").glob("preference_*")), ids=lambda p: p.stem
)
def test_every_form_of_pairs_gives_a_row(path: Path, encoder: PairEncoder) -> None:
    pairs = PairDataset([open_source(path)], encoder)
    batches = list(Stream(pairs, StreamOptions(512, epochs=1), collate_pairs))
    assert sum(batch.samples for batch in batches) == len(pairs)


def test_every_pair_can_be_trained(encoder: PairEncoder) -> None:
    pairs = PairDataset(
        [open_source(FOLDER / f"{name}.jsonl") for name in ("heldout", "pictures_heldout")], encoder
    )
    batches = list(Stream(pairs, StreamOptions(512, epochs=1), collate_pairs))
    assert sum(batch.samples for batch in batches) == 240
    last = pairs[239]
    assert isinstance(last, Pair)
    # A letter, a digit and the end of the turn, after the same prompt.
    tokenizer = Tokenizer.load(ROOT / "data" / "tiny")
    assert [tokenizer.decode([int(i)]) for i in last.chosen.ids[last.prompt :]][:2] == list(
        records("pictures_heldout")[-1]["chosen"]
    )
