from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ernietune.data.build import encoder_of, processor_for
from ernietune.data.commands import data_section, run_check, run_preview, run_stats, training_of
from ernietune.data.preview import Picture, Piece, image_of, packing_line, pieces, to_text
from ernietune.data.stats import cut_lines, histogram
from ernietune.errors import ConfigError
from ernietune.initialize import initialize
from ernietune.media.image import ImageLimits, image_to_patches
from ernietune.text.messages import parse_conversation

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
TINY = Path(__file__).parents[2] / "data" / "tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "m"
    return str(initialize("demo-vl", folder, dtype="float32", tokenizer=TINY))


def test_an_image_comes_back_from_its_patches() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    patches, grid = image_to_patches(Image.fromarray(pixels), ImageLimits())
    assert np.array_equal(np.asarray(image_of(patches, grid, ImageLimits())), pixels)


def test_pieces_of_a_sample(model: str) -> None:
    processor = processor_for(model)
    encoder = encoder_of(data_section(512, "auto", "all", False), processor)
    image = {"type": "image_url", "image_url": {"url": str(SAMPLES / "red.png")}}
    content = [image, {"type": "text", "text": "龘?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red 龘"}]
    (sample,) = encoder.encode(parse_conversation({"messages": messages}, "r"), "r")
    assert encoder.vision is not None
    found = list(pieces(sample, processor.tokenizer, encoder.vision.placeholder, encoder.limits))
    assert [(p.frames[0].size, p.tokens) for p in found if isinstance(p, Picture)] == [((56, 56), 4)]
    words = [p for p in found if isinstance(p, Piece)]
    assert "".join(p.text for p in words if p.trained) == "red 龘<|end_of_sentence|>"
    assert [p.target for p in words if p.target] == ["</s>"]
    assert [p.text for p in words].count("龘") == 2  # three byte tokens, one character
    assert to_text(found).plain.startswith(
        "<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|>[56x56 pixels"
    )


class Page(HTMLParser):
    """The trained and the other words of a page, its images and what it loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.images, self.foreign = "", [], []
        self.kind: str | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.kind = values.get("class") if tag == "span" else None
        if tag == "img":
            self.images.append(values["src"])
        self.foreign += [
            v for k, v in attributes if k in ("src", "href") and not (v or "").startswith("data:")
        ]

    def handle_data(self, data: str) -> None:
        if self.kind == "t":
            self.trained += data
        self.kind = None


def test_the_page_shows_pictures_and_what_is_trained(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "p.html"
    data = data_section(64, "auto", "all", False)
    run_preview([SAMPLES / "erniekit_vl.json", SAMPLES / "alpaca.json"], model, "auto", data, range(1), html)
    page = Page()
    page.feed(html.read_text(encoding="utf-8"))
    end = "<|end_of_sentence|>"
    assert page.trained == f"Greenred{end}blue{end}Hi{end}red{end}"
    assert page.foreign == []
    colors = []
    for url in page.images:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        colors.append(image.convert("RGB").getpixel((0, 0)))
    assert colors == [(220, 30, 30), (220, 30, 30), (30, 60, 220)]
    shown = capsys.readouterr().out
    assert f"{SAMPLES / 'erniekit_vl.json'}:2: up to messages[1]: tokens " in shown
    assert re.search(r"packing: samples 4, rows \d of 64 tokens, [\d.]+% full", shown)
    assert "Hi" in shown


def test_packing_in_words() -> None:
    assert packing_line([[30, 20], [50]], 100) == "packing: samples 3, rows 2 of 100 tokens, 50.0% full"


def test_a_histogram_by_powers_of_two() -> None:
    assert histogram([17, 20, 31, 32, 70, 127]) == [(16, 31, 3), (32, 63, 1), (64, 127, 2)]
    assert histogram([1]) == [(0, 15, 1)]
    assert histogram([16, 128]) == [(16, 31, 1), (32, 63, 0), (64, 127, 0), (128, 255, 1)]


def test_what_a_limit_leaves_out() -> None:
    tokens, trained = np.array([10, 20, 30, 40]), np.array([1, 2, 3, 4])
    assert cut_lines(tokens, trained, 30) == [
        "max_length 30: 1 samples (25.0%) are longer; they hold 4 of the trained tokens",
        "packed: 2 rows, 100.0% full",
    ]


def test_stats_in_words(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.jsonl"
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "red"}]
    good = {"conversations": turns, "image": str(SAMPLES / "red.png")}
    path.write_text(json.dumps(good) + "\n{broken\n")
    run_stats([path], model, "auto", data_section(16, "auto", "all", False))
    shown = capsys.readouterr().out
    assert "2 records (1 not usable), 1 samples" in shown
    assert "1 images, 6 tokens of them" in shown
    assert "max_length 16: 1 samples (100.0%) are longer; they hold 2 of the trained tokens" in shown


def test_check_says_whether_all_is_well(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_section(None, "auto", "all", False)
    assert run_check([SAMPLES / "messages.jsonl"], model, "vl", data)
    assert data.max_length == processor_for(model).config.max_position_embeddings
    (tmp_path / "d.jsonl").write_text('{"messages": 1}\n')
    assert not run_check([tmp_path / "d.jsonl"], None, "auto", data_section(None, "auto", "all", False))
    assert f"{tmp_path / 'd.jsonl'}:1: messages is a number; expected a list" in capsys.readouterr().out


def test_a_training_configuration_stands_for_its_data_model_and_settings(tmp_path: Path) -> None:
    file, plain = tmp_path / "mine.yaml", data_section(None, "auto", "all", False)
    file.write_text(
        "model: {path: m, template: vl}\ndata: {train: [d.jsonl]}\ntrain: {output: o, steps: 1}\n"
    )
    assert training_of([tmp_path / "d.jsonl"], "m", "vl", plain, print) is None
    training = training_of([file], None, "auto", plain, print)
    assert training is not None
    assert (training.model.template, training.data.train) == ("vl", ["d.jsonl"])
    others = (([file, file], None, plain), ([file], "m", plain), ([file], None, replace(plain, max_length=8)))
    for files, model, data in others:
        with pytest.raises(ConfigError, match="mine.yaml names its data, model and settings: give it alone"):
            training_of(files, model, "auto", data, print)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="--format is 'csv'; it must be one of auto, messages"):
        data_section(None, "csv", "all", False)
    with pytest.raises(ConfigError, match="--max-length is 0"):
        data_section(0, "auto", "all", False)


def test_options_without_effect_are_refused(model: str) -> None:
    data = data_section(None, "auto", "all", False)
    with pytest.raises(ConfigError, match="need --model"):
        run_check([SAMPLES / "messages.jsonl"], None, "vl", data)
    with pytest.raises(ConfigError, match="--first is 7, but .*messages.jsonl has 1 records"):
        run_preview([SAMPLES / "messages.jsonl"], model, "auto", data, range(7, 8), None)
