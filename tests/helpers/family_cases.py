# SPDX-License-Identifier: Apache-2.0
"""The requests that the families' engine tests ask, shared by the engine's process and the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.family_oracle import Request


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured blocks with noise: every patch differs from every other."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 255, (8, 8, 3)).astype(np.uint8))
    pixels = np.asarray(blocks.resize((width, height), Image.Resampling.NEAREST), np.int16)
    return Image.fromarray(np.clip(pixels + random.integers(-30, 30, pixels.shape), 0, 255).astype(np.uint8))


def clip(frames: int, width: int, height: int) -> tuple[Any, dict[str, Any]]:
    """A video of noise with a square that moves, and what a decoder tells of it."""
    random = np.random.default_rng(frames)
    pixels = random.integers(0, 255, (frames, height, width, 3)).astype(np.uint8)
    for number in range(frames):
        pixels[number, 10:40, 10 + 5 * number : 40 + 5 * number] = (220, 40, 40)
    told = {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "video_backend": "opencv"}
    return pixels, {**told, "frames_indices": list(range(frames)), "do_sample_frames": False}


LANDSCAPE = picture(1, 330, 120)
PORTRAIT = picture(2, 90, 400)
SQUARE = picture(3, 200, 200)
SMALL = picture(4, 70, 60)

CLIP = clip(6, 112, 84)
#: Of a video after or before a picture, in one prompt: the family's placeholder stands for "<video>".
WITH_VIDEO = [
    Request("Watch: <video> What moves?", videos=(CLIP,)),
    Request("Look: {} then watch <video> What moves?", (LANDSCAPE,), videos=(CLIP,)),
    Request("Watch <video> then look: {} Which is it?", (PORTRAIT,), videos=(CLIP,)),
]
UNPRUNED = [
    Request("Look: {} What is this?", (LANDSCAPE,)),
    Request("{} And this?", (PORTRAIT,)),
    Request("Describe {}", (SQUARE,)),
    Request("First {} then {} and at last {} Which is the odd one?", (PORTRAIT, SMALL, LANDSCAPE)),
    Request("{}{} Equal?", (SQUARE, SQUARE)),
    Request("Tell me something about vision tokens, at some length please."),
]
PRUNED = [
    replace(request, **setting)
    for setting in ({"keep_ratio": 0.35}, {"aggressiveness": 0.5}, {"keep_ratio": 0.02})
    for request in UNPRUNED
    if request.images
]
