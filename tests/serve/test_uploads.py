"""What becomes of files that are handed over without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ernietune.serve.uploads import kind_of

CLIP = Path(__file__).parents[2] / "data" / "samples" / "clip.gif"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "image"),
        ("a.JPG", "image"),
        ("b.mp4", "video"),
        ("c.MOV", "video"),
        ("d.mkv", "video"),
        ("notes.txt", None),
    ],
)
def test_names_say_what_a_file_is(name: str, kind: str | None) -> None:
    assert kind_of(f"/t/{name}") == kind


def test_a_gif_is_a_video_when_it_moves(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "still.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    assert kind_of(CLIP) == "video"
    assert kind_of(tmp_path / "still.gif") == kind_of(tmp_path / "broken.gif") == "image"
