"""What a file is that somebody hands over without saying it: on the web page or in the terminal."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Literal

from PIL import Image

from ernietune.media.image import BROKEN

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_VIDEOS = {".mp4", ".webm", ".mkv", ".mov", ".avi"}


def kind_of(file: str | Path) -> Literal["image", "video"] | None:
    """By the name, and for a gif by its frames: one that moves is a video. None for other files."""
    path = Path(file)
    suffix = path.suffix.lower()
    if suffix == ".gif":
        return "video" if _moves(path) else "image"
    if suffix in _PICTURES:
        return "image"
    if suffix in _VIDEOS or (mimetypes.guess_type(path.name)[0] or "").startswith("video/"):
        return "video"
    return None


def _moves(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.seek(1)
    except BROKEN:  # there is no second frame; of a damaged file whoever opens it says what is wrong
        return False
    return True
