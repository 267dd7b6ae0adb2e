"""Image preprocessing against slow, independent statements of ERNIE's rule."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import math
import threading
from collections.abc import Iterator
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ernietune.errors import CheckpointError, DataError
from ernietune.media import image as module
from ernietune.media.image import (
    ImageLimits,
    image_to_patches,
    normalize,
    open_image,
    smart_resize,
)

LIMITS = ImageLimits()
RED = (200, 30, 40)


def png(image: Image.Image, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG", **options)
    return target.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


# --- size rule -------------------------------------------------------------------------------------------


def nearest_28(side: int) -> int:
    """Bankers' rounding to a multiple of 28 in exact decimals, at least 28."""
    return max(28, int((Decimal(side) / 28).quantize(Decimal(1), ROUND_HALF_EVEN)) * 28)


def slow_resize(height: int, width: int, low: int, high: int) -> tuple[int, int] | None:
    """The specified rule by search over multiples of 28 in exact arithmetic; None where it fails."""
    if max(height, width) > 200 * min(height, width):
        short = nearest_28(min(height, width))
        long = short * 200 // 28 * 28
        height, width = (short, long) if height < width else (long, short)
    sides = nearest_28(height), nearest_28(width)
    area = Fraction(height * width)
    if sides[0] * sides[1] > high:  # the largest k with (28 k)^2 <= side^2 * high / area
        squares = [Fraction(side**2) * high / area for side in (height, width)]
        sides = tuple(max(28 * k for k in range(4000) if (28 * k) ** 2 <= square) for square in squares)
    elif sides[0] * sides[1] < low:  # the smallest k with (28 k)^2 >= side^2 * low / area
        squares = [Fraction(side**2) * low / area for side in (height, width)]
        sides = tuple(min(28 * k for k in range(4000) if (28 * k) ** 2 >= square) for square in squares)
    return sides if low <= sides[0] * sides[1] <= high else None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([(3136, 4816896), (3136, 28 * 28 * 64)]))
def test_resize_equals_the_slow_rule(height: int, width: int, bounds: tuple[int, int]) -> None:
    # Where a side comes out as a whole multiple, the original's floating point falls on either side of it.
    exact = [Fraction(side**2 * bound, height * width * 784) for side in (height, width) for bound in bounds]
    assume(all(math.isqrt(int(square)) ** 2 != square for square in exact))
    expected = slow_resize(height, width, *bounds)
    limits = ImageLimits(*bounds)
    if expected is None:
        with pytest.raises(DataError, match="cannot be resized"):
            smart_resize(height, width, limits)
    else:
        assert smart_resize(height, width, limits) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((56, 56), (56, 56)),
        ((70, 98), (56, 112)),  # 2.5 -> 2 and 3.5 -> 4: halves go to even
        ((1, 1), (56, 56)),  # 28x28 is below the minimum
        ((10, 1900), (28, 1904)),  # a side never rounds to nothing
        ((1000, 2), (5600, 28)),  # ratio 500 cut to 200
        ((3000, 4000), (1876, 2520)),  # scaled down to at most 4816896
    ],
)
def test_resize_worked_cases(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, LIMITS) == expected


# --- patches ---------------------------------------------------------------------------------------------


def naive_patches(pixels: np.ndarray) -> np.ndarray:
    """Patch by patch: blocks row by row, in a block 2x2, in a patch channel, row, column."""
    rows = []
    height, width, _ = pixels.shape
    for top in range(0, height, 28):
        for left in range(0, width, 28):
            for dy in (0, 14):
                for dx in (0, 14):
                    patch = pixels[top + dy : top + dy + 14, left + dx : left + dx + 14]
                    rows.append([patch[y, x, c] for c in range(3) for y in range(14) for x in range(14)])
    return np.array(rows, dtype=np.uint8)


def test_patch_order_of_an_image_that_needs_no_resize() -> None:
    image = noise(112, 84)
    patches, grid = image_to_patches(image, LIMITS)
    assert grid == (1, 6, 8)
    assert patches.dtype == np.uint8
    assert patches.shape == (48, 588)
    assert np.array_equal(patches, naive_patches(np.asarray(image)))


def test_resize_is_bicubic_on_bytes() -> None:
    image = noise(100, 60)
    patches, grid = image_to_patches(image, LIMITS)
    height, width = smart_resize(60, 100, LIMITS)
    assert grid == (1, height // 14, width // 14)
    assert np.array_equal(patches, naive_patches(np.asarray(image.resize((width, height), Image.BICUBIC))))


def test_normalize_is_clip_in_fp32() -> None:
    patches, _ = image_to_patches(noise(56, 56), LIMITS)
    mean = np.repeat([0.48145466, 0.4578275, 0.40821073], 196)
    std = np.repeat([0.26862954, 0.26130258, 0.27577711], 196)
    result = normalize(patches)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, (patches / 255.0 - mean) / std, atol=1e-6)


# --- colour ----------------------------------------------------------------------------------------------


def test_alpha_is_laid_on_white() -> None:
    image = noise(20, 30, "RGBA")
    values = np.asarray(image).astype(np.float64)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    opened = open_image(Image.open(io.BytesIO(png(image))))
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened) - expected).max() <= 1.0


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putdata([0, 1])
    opened = open_image(Image.open(io.BytesIO(png(image, transparency=1))))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]


def test_16_bit_grey_is_divided_by_256() -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    opened = open_image(Image.open(io.BytesIO(png(Image.fromarray(values)))))
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened)[..., 0], values // 256)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "I"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert open_image(Image.new(mode, (8, 9))).mode == "RGB"


def test_exif_orientation_turns_the_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must turn by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(str(tmp_path / "turned.png"))
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5)) == RED
    assert opened.getpixel((10, 35)) == (255, 255, 255)


# --- sources ---------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(png(Image.new("RGB", (8, 8), RED)))
    return path


def test_paths_and_file_urls(picture: Path) -> None:
    for url, base in [
        (str(picture), None),
        (picture.name, picture.parent),
        (picture.as_uri(), None),
        (f"file://{picture}", None),
    ]:
        assert open_image(url, base).getpixel((0, 0)) == RED


def test_data_uri(picture: Path) -> None:
    data = base64.b64encode(picture.read_bytes()).decode()
    assert open_image(f"data:image/png;base64,{data}").getpixel((0, 0)) == RED


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(picture: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(picture.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_http(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_image(f"{server}/a%20picture.png").getpixel((0, 0)) == RED
    with pytest.raises(DataError, match="404"):
        open_image(f"{server}/missing.png")
    monkeypatch.setattr(module, "HTTP_MAX_BYTES", 10)
    with pytest.raises(DataError, match="larger than"):
        open_image(f"{server}/a%20picture.png")


def test_http_without_a_server() -> None:
    with pytest.raises(DataError, match="download failed"):
        open_image("http://127.0.0.1:9/picture.png")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere.png", "no file"),
        ("file:///nowhere/at/all.png", "no file"),
        ("ftp://host/picture.png", "cannot open ftp"),
        ("data:image/png,abc", "bad data URI"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "not a readable image"),
        ("http://", "download failed"),
    ],
)
def test_unreadable_urls(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_image(url, tmp_path)


def test_a_directory_and_a_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable image"):
        open_image(str(tmp_path))
    path = tmp_path / "half.png"
    data = png(noise(64, 64))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"half\.png: damaged or truncated"):
        open_image(str(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("suffix", "advice"),
    [("gif", "as a video"), ("webp", "make it a gif"), ("png", "make it a gif"), ("tif", "pages")],
)
def test_one_picture_is_read_and_several_are_refused(tmp_path: Path, suffix: str, advice: str) -> None:
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue", "lime")]
    alone, moving = tmp_path / f"one.{suffix}", tmp_path / f"many.{suffix}"
    frames[0].save(alone)
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    assert open_image(str(alone)).getpixel((9, 9))[0] > 250
    with pytest.raises(DataError, match=f"{moving}.*holds several pictures; .*{advice}"):
        open_image(str(moving))


@pytest.mark.parametrize("limit", [50, 10])  # pillow warns at the first and raises at the second
def test_too_many_pixels(picture: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match="scale it down"):
        open_image(str(picture))


def test_a_long_data_uri_is_not_quoted_whole() -> None:
    with pytest.raises(DataError) as caught:
        open_image("data:image/png;base64," + "A" * 100_000)
    assert len(str(caught.value)) < 400


# --- limits ----------------------------------------------------------------------------------------------


def test_limits_of_a_folder(tmp_path: Path) -> None:
    assert ImageLimits.from_folder(tmp_path) == ImageLimits(3136, 4816896, 14, 2)
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({"max_pixels": 200704, "patch_size": 14, "do_resize": True}))
    assert ImageLimits.from_folder(tmp_path) == ImageLimits(max_pixels=200704)
    config.write_text(json.dumps({"max_pixels": "big"}))
    with pytest.raises(CheckpointError, match="max_pixels is 'big'"):
        ImageLimits.from_folder(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ImageLimits.from_folder(tmp_path)
