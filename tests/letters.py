"""A template of one token per letter, so that tests can write expected ids by hand."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ernietune.data.dataset import Dataset, Encoder, VisionTokens
from ernietune.data.sources import open_source
from ernietune.media.image import ImageLimits
from ernietune.text.messages import Conversation
from ernietune.text.template import IGNORE, Rendered

BEGIN, END_OF_TURN, STOP, PLACEHOLDER, START, END = 1, 3, 2, 4, 5, 6
VISION = VisionTokens(PLACEHOLDER, frozenset([PLACEHOLDER, START, END]))
LIMITS = ImageLimits(min_pixels=3136, max_pixels=50176)


class LetterTemplate:
    """begin, then the letters (a picture: start, placeholders, end); an answer ends in a stop label."""

    def render(self, conversation: Conversation, image_tokens: Sequence[int], **options: Any) -> Rendered:
        ids, labels, media = [BEGIN], [IGNORE], []
        counts = iter(image_tokens)
        for message in conversation.messages:
            for part in message.parts:
                if part.kind == "image":
                    count = next(counts)
                    media.append((len(ids) + 1, count))
                    piece = [START, *[PLACEHOLDER] * count, END]
                else:
                    piece = [ord(letter) for letter in part.text]
                trained = message.role == "assistant" and message.trained
                ids += piece
                labels += piece if trained else [IGNORE] * len(piece)
            if message.role == "assistant":
                ids.append(END_OF_TURN)
                labels.append(STOP if message.trained else IGNORE)
        return Rendered(ids, labels, media)


def picture(color: str, width: int = 56, height: int = 56) -> str:
    """A plain PNG as a data: URI; 56 x 56 pixels are 4 x 4 patches, so 4 tokens."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def turn(question: str, answer: str, *images: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    parts.append({"type": "text", "text": question})
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def letter_dataset(path: Path, max_length: int = 32, on_error: str = "error", **options: Any) -> Dataset:
    options = {"vision": VISION, "limits": LIMITS, **options}
    return Dataset([open_source(path)], Encoder(LetterTemplate(), max_length, **options), on_error)
