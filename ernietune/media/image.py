"""Images -> patches by ERNIE's rule: open, make RGB, resize to whole merge blocks, cut, normalise."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ernietune.errors import CheckpointError, DataError
from ernietune.media.fetch import Download, locate, short

Grid: TypeAlias = tuple[int, int, int]
"""(frames, patch rows, patch columns); an image has one frame."""

MAX_RATIO = 200
HTTP_MAX_BYTES = 64 * 2**20
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
_STILL = "or give a single frame of it as the image"
# Formats of several pictures that are all meant to be seen (the second one of an MPO, a photo's, is not).
_ADVICE = {
    "GIF": f"give it as a video (video_url), {_STILL}",
    "PNG": f"make it a gif or mp4 and give that as a video (video_url), {_STILL}",
    "WEBP": f"make it a gif or mp4 and give that as a video (video_url), {_STILL}",
    "TIFF": "give its pages as images of their own",
}
# What pillow's decoders raise for damaged files.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


@dataclass(frozen=True)
class ImageLimits:
    """The bounds of a resized image, in pixels, and the sides of a patch and of a merge block."""

    min_pixels: int = 3136
    max_pixels: int = 4816896
    patch_size: int = 14
    merge_size: int = 2

    @property
    def factor(self) -> int:
        """Both sides of a resized image are multiples of this."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageLimits:
        """Read a folder's preprocessor_config.json; without that file the published values hold."""
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            return cls()
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); download the file again") from error
        names = ("min_pixels", "max_pixels", "patch_size", "merge_size")
        values = {name: config[name] for name in names if config.get(name) is not None}
        for name, value in values.items():
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{path}: {name} is {value!r}; expected a positive whole number")
        return cls(**values)


def open_image(
    url: str | Image.Image,
    base_dir: str | Path | None = None,
    download: Download | None = None,
) -> Image.Image:
    """Open a path, file://, http(s):// or data: URL, or take a PIL image; return it upright and in RGB.

    A relative path is looked up in `base_dir`; `download` fetches http(s):// in its own way. DataError:
    missing, unreachable, not an image, an animation or several pages, truncated or larger than pillow's
    limit against decompression bombs.
    """
    if isinstance(url, Image.Image):
        return _decoded(url, "the given image")
    name = short(url)
    source = locate(url, "image", base_dir, HTTP_MAX_BYTES, download)
    try:
        with Image.open(source) as image:
            _check_single(image, name)
            return _decoded(image, name)
    except FileNotFoundError as error:
        raise DataError(f"image {name}: there is no file {source}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"image {name}: not a readable image (no format that is known)") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name}: {error}; scale it down") from error
    except BROKEN as error:
        raise DataError(f"image {name}: not a readable image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB version: EXIF orientation applied, alpha on white, 16-bit grey scaled down."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _grey_from_16_bit(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode[:-1] + "A")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def smart_resize(height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
    """The size to resize to: both sides multiples of 28, the area within the limits, the shape nearly kept.

    Rounds halves to even, as the original does. A side ratio above 200 is cut down to 200. DataError when no
    size within the limits comes out.
    """
    factor = limits.factor
    height, width = _clamp_ratio(height, width, factor)
    rows, columns = _nearest(height, factor), _nearest(width, factor)
    if rows * columns > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        rows, columns = (math.floor(side / shrink / factor) * factor for side in (height, width))
    elif rows * columns < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    if not limits.min_pixels <= rows * columns <= limits.max_pixels:
        raise DataError(
            f"an image of {width}x{height} pixels cannot be resized to between {limits.min_pixels} and "
            f"{limits.max_pixels} pixels in blocks of {factor}x{factor}; crop it or widen the limits"
        )
    return rows, columns


def image_to_patches(image: Image.Image, limits: ImageLimits) -> tuple[npt.NDArray[np.uint8], Grid]:
    """Resize and cut an image: uint8 [P, 3 * 14 * 14] and its grid (1, gh, gw), P = gh * gw.

    Patches stand in the order of their 2x2 merge blocks; a row holds one patch, channel by channel.
    """
    image = to_rgb(image)
    height, width = smart_resize(image.height, image.width, limits)
    return cut(image, height, width, limits), (1, height // limits.patch_size, width // limits.patch_size)


def cut(image: Image.Image, height: int, width: int, limits: ImageLimits) -> npt.NDArray[np.uint8]:
    """Resize an RGB image and cut it into patches uint8 [P, 3 * 14 * 14]."""
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    side, merge = limits.patch_size, limits.merge_size
    rows, columns = height // side, width // side
    blocks = pixels.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3 * side * side)
    return np.ascontiguousarray(patches)


def normalize(patches: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale uint8 patches [P, 3 * n] to 0..1 and apply CLIP's mean and deviation per channel, in fp32."""
    channels = patches.reshape(len(patches), 3, -1).astype(np.float32) / np.float32(255)
    scaled: npt.NDArray[np.float32] = (channels - _MEAN[:, None]) / _STD[:, None]
    return scaled.reshape(patches.shape)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    # Pillow only warns up to twice its limit; a warning protects nobody.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(f"image {name}: {image.width}x{image.height} pixels are too many; scale it down")
    if image.width == 0 or image.height == 0:
        raise DataError(f"image {name}: has no pixels ({image.width}x{image.height})")
    try:
        image.load()
        return to_rgb(image)
    except BROKEN as error:
        raise DataError(f"image {name}: damaged or truncated ({error})") from error


def _check_single(image: Image.Image, name: str) -> None:
    """Which of several pictures is meant cannot be known, and the first one alone would be a silent loss."""
    if image.format not in _ADVICE:
        return
    try:
        image.seek(1)
    except EOFError:
        image.seek(0)
        return
    raise DataError(f"image {name}: this {image.format} holds several pictures; {_ADVICE[image.format]}")


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, which some pillow versions open as 32-bit, to 8 bits: divide by 256."""
    values = np.clip(np.asarray(image), 0, 0xFFFF) >> 8
    return Image.fromarray(values.astype(np.uint8))


def _nearest(side: int, factor: int) -> int:
    return max(factor, round(side / factor) * factor)


def _clamp_ratio(height: int, width: int, factor: int) -> tuple[int, int]:
    short, long = sorted((height, width))
    if long / short <= MAX_RATIO:
        return height, width
    short = _nearest(short, factor)
    long = math.floor(short * MAX_RATIO / factor) * factor
    return (short, long) if height < width else (long, short)
