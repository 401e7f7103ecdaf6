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


def clip(frames: int, width: int, height: int, fps: float = 2.0) -> tuple[Any, dict[str, Any]]:
    """A video of one noisy background before which a square moves, and what a decoder tells of it."""
    random = np.random.default_rng(frames)
    pixels = random.integers(0, 255, (1, height, width, 3)).astype(np.uint8).repeat(frames, axis=0)
    for number in range(frames):
        pixels[number, 10:40, 10 + 5 * number : 40 + 5 * number] = random.integers(0, 255, (30, 1, 3))
    told = {"fps": fps, "duration": frames / fps, "total_num_frames": frames, "video_backend": "opencv"}
    return pixels, {**told, "frames_indices": list(range(frames)), "do_sample_frames": False}


LANDSCAPE = picture(1, 330, 120)
PORTRAIT = picture(2, 90, 400)
SQUARE = picture(3, 200, 200)
SMALL = picture(4, 70, 60)

CLIP = clip(6, 112, 84)
#: Pictures that are half a second and less apart, an odd number of them.
TALL_CLIP = clip(5, 84, 168, fps=3.0)
#: Of videos after or before pictures, in one prompt: the family's placeholder stands for "<video>".
WITH_VIDEO = [
    Request("Watch: <video> What moves?", videos=(CLIP,)),
    Request("Look: {} then watch <video> What moves?", (LANDSCAPE,), videos=(CLIP,)),
    Request("Watch <video> then look: {} Which is it?", (PORTRAIT,), videos=(CLIP,)),
]
TWO_VIDEOS = Request("Watch <video> then {} and <video> What differs?", (SMALL,), videos=(TALL_CLIP, CLIP))
#: The same of families whose videos are pruned.
VIDEOS_PRUNED = [
    *(replace(request, keep_ratio=0.35) for request in (*WITH_VIDEO, TWO_VIDEOS)),
    replace(TWO_VIDEOS, aggressiveness=0.5),
    replace(WITH_VIDEO[0], keep_ratio=0.02),
    replace(WITH_VIDEO[0], keep_ratio=0.35, method="inflection_temporal"),
    replace(TWO_VIDEOS, aggressiveness=0.5, method="inflection_temporal"),
]
#: Families whose videos are pruned.
VIDEO_FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
#: One whose videos pass through vLLM's own tower.
UNPRUNED_VIDEO_FAMILY = "internvl_chat"
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


def cases(name: str) -> tuple[list[Request], list[Request]]:
    """What a family is asked: requests that prune, and such that do not."""
    videos = name in VIDEO_FAMILIES
    return [*PRUNED, *VIDEOS_PRUNED * videos], [*UNPRUNED, *[*WITH_VIDEO, TWO_VIDEOS] * videos]
