"""Pictures of coloured shapes with questions in English and Chinese: the data of the tiny demo model.

    python examples/shapes.py pretrain --count 50000 --seed 1 OUT_DIR    OUT_DIR/pretrain.jsonl
    python examples/shapes.py closeups --count 40000 --seed 3 OUT_DIR    OUT_DIR/closeups.jsonl
    python examples/shapes.py badges --seed 1 OUT_DIR                    OUT_DIR/{train,heldout}.jsonl
    python examples/shapes.py text --count 5000 --seed 1 OUT_DIR         OUT_DIR/text.jsonl

`pretrain` teaches colours, shapes, numbers and places. `badges` is the task the demo fine-tunes: every
picture is a badge whose code (a letter for the colour, a digit for the shape) nobody could know without being
taught. Pictures are 112 x 112 PNG inside the JSON lines as data: URIs (8 x 8 patches, 16 image tokens). Every
record depends on the seed and its own number only.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))
from shape_words import COLORS, PHRASES, PLACES, SAME, SHAPES, TEXT_PAIRS, YES_NO

Rng = np.random.Generator
Exchange = tuple[str, str]  # question, answer
SIZE = 112
MARGIN = 3
LANGUAGES = ("en", "zh")
# In a made-up convention the red cross is K4, the blue circle T7.
BADGE_LETTERS = dict(zip(COLORS, "KMTRVH", strict=True))
BADGE_DIGITS = dict(zip(SHAPES, "7394", strict=True))


@dataclass(frozen=True)
class Thing:
    """One object: its colour and shape by English name, its centre and radius in pixels."""

    color: str
    shape: str
    x: int
    y: int
    radius: int

    def name(self, language: str) -> str:
        """`red circle` or its Chinese form."""
        color, shape = word(COLORS, self.color, language), word(SHAPES, self.shape, language)
        return f"{color} {shape}" if language == "en" else color + shape

    def place(self, language: str) -> str:
        """Which quarter of the picture the centre lies in."""
        return PLACES[language][2 * (self.y > SIZE // 2) + (self.x > SIZE // 2)]


Scene = list[Thing]
Question = Callable[[Rng, Scene, str], Exchange | None]


def word(table: dict[str, str], name: str, language: str) -> str:
    """A colour or shape in a language; the tables go from English to Chinese."""
    return name if language == "en" else table[name]


def pick(rng: Rng, options: Any) -> Any:
    """One of the options, each as likely as the others."""
    return options[int(rng.integers(len(options)))]


def phrase(rng: Rng, kind: str, language: str, **words: str) -> str:
    """A wording of a question."""
    return str(pick(rng, PHRASES[kind][language])).format(**words)


# ---- pictures


SMALL, LARGE = (13, 27), (19, 33)  # radii in pixels


def single(
    rng: Rng, color: str | None = None, shape: str | None = None, radii: tuple[int, int] = SMALL
) -> Scene:
    """One object anywhere in the picture."""
    radius = int(rng.integers(*radii))
    x, y = (int(rng.integers(radius + MARGIN, SIZE - radius - MARGIN)) for _ in "xy")
    return [Thing(color or pick(rng, list(COLORS)), shape or pick(rng, list(SHAPES)), x, y, radius)]


def several(rng: Rng, count: int) -> Scene:
    """`count` objects, at most one in each quarter of the picture, in reading order."""
    things = []
    for quarter in sorted(rng.permutation(4)[:count]):
        radius = int(rng.integers(13, 22))
        room = SIZE // 4 - radius - MARGIN
        x, y = (
            SIZE // 4 + side * SIZE // 2 + int(rng.integers(-room, room + 1))
            for side in (quarter % 2, quarter // 2)
        )
        things.append(Thing(pick(rng, list(COLORS)), pick(rng, list(SHAPES)), x, y, radius))
    return things


def draw(rng: Rng, scene: Scene) -> Image.Image:
    """Paint a scene on a light background; colours vary a little."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(value) for value in rng.integers(228, 256, 3)))
    brush = ImageDraw.Draw(image)
    for thing in scene:
        shift = rng.integers(-14, 15, 3)
        color = tuple(int(value) for value in np.clip(RGB[thing.color] + shift, 0, 255))
        OUTLINES[thing.shape](brush, thing, color)
    return image


def _circle(brush: ImageDraw.ImageDraw, at: Thing, fill: tuple[int, ...]) -> None:
    brush.ellipse([at.x - at.radius, at.y - at.radius, at.x + at.radius, at.y + at.radius], fill)


def _square(brush: ImageDraw.ImageDraw, at: Thing, fill: tuple[int, ...]) -> None:
    half = round(0.88 * at.radius)
    brush.rectangle([at.x - half, at.y - half, at.x + half, at.y + half], fill)


def _triangle(brush: ImageDraw.ImageDraw, at: Thing, fill: tuple[int, ...]) -> None:
    top, base = at.y - at.radius, at.y + round(0.85 * at.radius)
    brush.polygon([(at.x, top), (at.x - at.radius, base), (at.x + at.radius, base)], fill)


def _cross(brush: ImageDraw.ImageDraw, at: Thing, fill: tuple[int, ...]) -> None:
    arm = round(0.3 * at.radius)
    brush.rectangle([at.x - at.radius, at.y - arm, at.x + at.radius, at.y + arm], fill)
    brush.rectangle([at.x - arm, at.y - at.radius, at.x + arm, at.y + at.radius], fill)


RGB = {
    "red": np.array([220, 40, 40]),
    "green": np.array([40, 160, 60]),
    "blue": np.array([40, 80, 220]),
    "yellow": np.array([235, 195, 20]),
    "purple": np.array([150, 50, 190]),
    "black": np.array([25, 25, 25]),
}
OUTLINES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def data_uri(image: Image.Image) -> str:
    """The picture as a PNG inside a data: URI (about 500 characters)."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ---- questions about one picture: each returns None where the scene gives no clear answer


def ask_color(rng: Rng, scene: Scene, language: str) -> Exchange | None:
    """The colour of the only object, or of the only one of its shape."""
    if len(scene) == 1 and rng.random() < 0.5:
        return phrase(rng, "color", language), word(COLORS, scene[0].color, language)
    thing = pick(rng, scene)
    if sum(other.shape == thing.shape for other in scene) > 1:
        return None
    shape = word(SHAPES, thing.shape, language)
    return phrase(rng, "color of", language, shape=shape), word(COLORS, thing.color, language)


def ask_shape(rng: Rng, scene: Scene, language: str) -> Exchange | None:
    """The shape of the only object, or of the only one of its colour."""
    if len(scene) == 1 and rng.random() < 0.5:
        return phrase(rng, "shape", language), word(SHAPES, scene[0].shape, language)
    thing = pick(rng, scene)
    if sum(other.color == thing.color for other in scene) > 1:
        return None
    color = word(COLORS, thing.color, language)
    return phrase(rng, "shape of", language, color=color), word(SHAPES, thing.shape, language)


def ask_count(rng: Rng, scene: Scene, language: str) -> Exchange | None:
    """How many objects there are."""
    return phrase(rng, "count", language), str(len(scene))


def ask_count_color(rng: Rng, scene: Scene, language: str) -> Exchange | None:
    """How many objects have a colour; mostly one that occurs."""
    color = pick(rng, scene).color if rng.random() < 0.75 else pick(rng, list(COLORS))
    answer = sum(thing.color == color for thing in scene)
    return phrase(rng, "count color", language, color=word(COLORS, color, language)), str(answer)


def ask_place(rng: Rng, scene: Scene, language: str) -> Exchange | None:
    """In which quarter an object lies that occurs once and is not near a middle line."""
    thing = pick(rng, scene)
    same = sum((other.color, other.shape) == (thing.color, thing.shape) for other in scene)
    if same > 1 or min(abs(thing.x - SIZE // 2), abs(thing.y - SIZE // 2)) < 12:
        return None
    return phrase(rng, "place", language, thing=thing.name(language)), thing.place(language)


def ask_presence(rng: Rng, scene: Scene, language: str) -> Exchange | None:
    """Is a colour and shape there: yes and no are equally likely."""
    present = bool(rng.random() < 0.5)
    thing = pick(rng, scene)
    if not present:
        other = (
            {"color": pick(rng, list(COLORS))} if rng.random() < 0.5 else {"shape": pick(rng, list(SHAPES))}
        )
        thing = replace(thing, **other)
        if any((thing.color, thing.shape) == (real.color, real.shape) for real in scene):
            return None
    return phrase(rng, "presence", language, thing=thing.name(language)), YES_NO[language][present]


def ask_list(rng: Rng, scene: Scene, language: str) -> Exchange | None:
    """All objects in reading order."""
    comma = ", " if language == "en" else "，"
    kind = "what" if len(scene) == 1 else "list"
    return phrase(rng, kind, language), comma.join(thing.name(language) for thing in scene)


QUESTIONS: tuple[Question, ...] = (
    ask_color, ask_shape, ask_count, ask_count_color, ask_place, ask_presence, ask_list, ask_list,
)  # fmt: skip


# ---- records


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    """A user message: pictures first, then the text."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def record(exchanges: list[Exchange], *images: Image.Image) -> dict[str, Any]:
    """A conversation; the pictures belong to the first question."""
    messages = []
    for number, (question, answer) in enumerate(exchanges):
        messages.append(user(question, *(images if number == 0 else ())))
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def picture_record(rng: Rng) -> dict[str, Any]:
    """One picture with one to four questions, all in one language."""
    # Many single objects: they are where the vision tower learns colours and shapes first.
    count = 1 if rng.random() < 0.4 else int(rng.integers(2, 5))
    scene = single(rng) if count == 1 else several(rng, count)
    language = pick(rng, LANGUAGES)
    # More questions on one picture give more to learn for the price of one pass through the vision tower.
    wanted = 1 if rng.random() < 0.4 else int(rng.integers(2, 5))
    exchanges: dict[str, str] = {}
    while len(exchanges) < wanted:
        exchange = pick(rng, QUESTIONS)(rng, scene, language)
        if exchange is not None:
            exchanges.setdefault(*exchange)
    return record(list(exchanges.items()), draw(rng, scene))


def closeup_record(rng: Rng) -> dict[str, Any]:
    """Mostly one large object and three questions about it, so that shapes are learned for certain."""
    if rng.random() < 0.25:
        return picture_record(rng)
    scene, language = single(rng, radii=LARGE), pick(rng, LANGUAGES)
    exchanges: dict[str, str] = {}
    while len(exchanges) < 3:
        exchange = pick(rng, (ask_color, ask_shape, ask_shape, ask_list))(rng, scene, language)
        if exchange is not None:
            exchanges.setdefault(*exchange)
    return record(list(exchanges.items()), draw(rng, scene))


def pair_record(rng: Rng) -> dict[str, Any]:
    """Two pictures with one object each, and a question that needs both or names one."""
    language = pick(rng, LANGUAGES)
    first, second = single(rng), single(rng)
    if rng.random() < 0.4:
        second = single(rng, color=first[0].color)
    elif rng.random() < 0.5:
        second = single(rng, shape=first[0].shape)
    kind = pick(rng, ("same color", "same shape", "number"))
    if kind == "number":
        number = int(rng.integers(2))
        exchange = (
            phrase(rng, kind, language, number=str(number + 1)),
            (first, second)[number][0].name(language),
        )
    else:
        same = (
            first[0].color == second[0].color if kind == "same color" else first[0].shape == second[0].shape
        )
        exchange = phrase(rng, kind, language), SAME[language][same]
    return record([exchange], draw(rng, first), draw(rng, second))


def text_record(rng: Rng) -> dict[str, Any]:
    """One to three questions without a picture."""
    pairs = TEXT_PAIRS[pick(rng, LANGUAGES)]
    exchanges = [_text_exchange(rng, pairs) for _ in range(pick(rng, (1, 1, 2, 3)))]
    return record(exchanges)


def _text_exchange(rng: Rng, pairs: list[Exchange]) -> Exchange:
    if rng.random() < 0.7:
        return pick(rng, pairs)  # type: ignore[no-any-return]
    if rng.random() < 0.5:
        number = int(rng.integers(1, 50))
        return phrase(rng, "next", pick(rng, LANGUAGES), number=str(number)), str(number + 1)
    left, right = (int(value) for value in rng.integers(1, 10, 2))
    return f"{left}+{right}=", str(left + right)


def pretrain_record(rng: Rng) -> dict[str, Any]:
    """The mixture the tiny model is trained on from scratch."""
    kind = rng.random()
    if kind < 0.72:
        return picture_record(rng)
    return pair_record(rng) if kind < 0.80 else text_record(rng)


def badge_record(rng: Rng, color: str, shape: str) -> dict[str, Any]:
    """One picture with one object; the answer is its code."""
    question = phrase(rng, "badge", pick(rng, LANGUAGES))
    return record(
        [(question, BADGE_LETTERS[color] + BADGE_DIGITS[shape])], draw(rng, single(rng, color, shape, LARGE))
    )


def generate(make: Callable[[Rng], dict[str, Any]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` records; number n is the same whatever the count is."""
    for number in range(count):
        yield make(np.random.default_rng([seed, number]))


def badges(each: int, seed: int) -> Iterator[dict[str, Any]]:
    """`each` records of every (colour, shape) pair, mixed."""
    classes = [(color, shape) for color in COLORS for shape in SHAPES]
    for number in np.random.default_rng(seed).permutation(each * len(classes)):
        yield badge_record(np.random.default_rng([seed, int(number)]), *classes[number % len(classes)])


def write(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """Write JSON lines and say how much."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        count = sum(1 for item in records if handle.write(json.dumps(item, ensure_ascii=False) + "\n"))
    print(f"{path}: {count} records, {path.stat().st_size / 1e6:.1f} MB")


RECORDS = {"pretrain": pretrain_record, "closeups": closeup_record, "text": text_record}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("kind", choices=[*RECORDS, "badges"])
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--count", type=int, default=5000, help="records, except for badges")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.kind == "badges":
        write(args.folder / "train.jsonl", badges(20, args.seed))
        write(args.folder / "heldout.jsonl", badges(5, args.seed + 1))
    else:
        write(args.folder / f"{args.kind}.jsonl", generate(RECORDS[args.kind], args.count, args.seed))


if __name__ == "__main__":
    main()
