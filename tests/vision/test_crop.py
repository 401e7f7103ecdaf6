# SPDX-License-Identifier: Apache-2.0
"""What part of a picture CLIP's preprocessing looks at, compared with the preprocessing itself."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor

from vllm_vtprune.vision.crop import MAX_ASPECT, bounded, crop_of

SIDE = 56


def clip(**changes: object) -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        **changes,
    )


def seen(image: Image.Image) -> np.ndarray:
    """[3, SIDE, SIDE] in [0, 1]."""
    return np.asarray(clip()(images=[image], return_tensors="np")["pixel_values"][0])


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 300), st.integers(30, 300))
def test_the_corners_of_the_grid_are_where_crop_says(width: int, height: int) -> None:
    """A picture whose red and green are its own coordinates tells where a pixel came from."""
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)[None, :]
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels = seen(Image.fromarray(ramp))
    crop = crop_of((width, height), clip())
    middle = SIDE // 2
    left, right = pixels[0, middle, 2], pixels[0, middle, -3]
    top, bottom = pixels[1, 2, middle], pixels[1, -3, middle]
    inset = 2.5 / SIDE
    for found, start, size in ((left, "left", "width"), (top, "top", "height")):
        assert found == pytest.approx(crop[start] + inset * crop[size], abs=0.04)
    for found, start, size in ((right, "left", "width"), (bottom, "top", "height")):
        assert found == pytest.approx(crop[start] + (1 - inset) * crop[size], abs=0.04)


def test_a_processor_that_pads_reaches_beyond_the_picture() -> None:
    padding = SimpleNamespace(do_pad=True, do_center_crop=True, do_resize=True, size={"shortest_edge": SIDE},
                              crop_size={"height": SIDE, "width": SIDE})  # fmt: skip
    crop = crop_of((200, 100), padding)
    assert crop == pytest.approx({"left": 0, "top": -0.5, "width": 1, "height": 2})
    with pytest.raises(ValueError, match="crop it first"):
        bounded(Image.new("RGB", (MAX_ASPECT * 2 + 1, 2)), padding)


def test_a_processor_that_stretches_covers_all() -> None:
    processor = CLIPImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False)
    assert crop_of((300, 100), processor) == {"left": 0, "top": 0, "width": 1, "height": 1}


@pytest.mark.parametrize("size", [(1, 1), (MAX_ASPECT, 1), (100, 100), (10, 10 * MAX_ASPECT)])
def test_ordinary_pictures_are_not_touched(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    assert bounded(image, clip()) is image


@pytest.mark.parametrize("size", [(3, 2000), (2001, 4), (7, 3001), (1, 10_000), (5000, 16)])
def test_long_pictures_are_cut_where_nobody_looks(size: tuple[int, int]) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    cut = bounded(image, clip())
    assert max(cut.size) <= 10 * min(cut.size) + 1 and min(cut.size) == min(size)
    difference = np.abs(seen(image) - seen(cut))
    # the long side's scale is rounded to whole pixels, so samples may shift by a fraction of one
    assert difference.mean() < 0.02
