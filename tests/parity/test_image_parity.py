"""Pixels of pictures against the image processor of transformers (its pillow version)."""

import numpy as np
import pytest
from PIL import Image

from ernietune.media.image import ImageLimits, image_to_patches, normalize

processing = pytest.importorskip("transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-6
LIMITS = ImageLimits()  # the published 3136 to 4816896 pixels
# width, height: multiples, odd sizes, halves that round to even, tall, wide, too small, too large
SIZES = [
    (56, 56),
    (97, 61),
    (70, 98),
    (42, 154),
    (28, 280),
    (1500, 31),
    (33, 900),
    (10, 12),
    (1, 1),
    (2600, 2111),
]


def noise(width, height):
    """Smooth colours with noise, so that resizing has to interpolate and to clip."""
    random = np.random.default_rng(width * 7919 + height)
    slope = np.linspace(0, 255, height)[:, None, None] + np.linspace(0, 128, width)[None, :, None]
    return Image.fromarray(
        (slope + random.integers(-90, 90, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def reference(image, limits):
    size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    out = processing.Ernie4_5_VLMoeImageProcessorPil(size=size)(image, return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"][0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches(size):
    compare(noise(*size), LIMITS)


def test_patches_within_narrow_limits():
    """Both bounds in force: a picture is made smaller, or larger, than it is."""
    compare(noise(640, 480), ImageLimits(3136, 50176))
    compare(noise(90, 60), ImageLimits(100352, 200704))


def compare(image, limits):
    expected, grid = reference(image, limits)
    patches, own_grid = image_to_patches(image, limits)
    assert own_grid == tuple(grid)
    error = float(np.abs(normalize(patches) - expected).max())
    print(f"{image.size} -> grid {own_grid}: max abs difference {error:.2e}")
    assert error <= TOLERANCE
