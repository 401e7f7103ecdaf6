# SPDX-License-Identifier: Apache-2.0
"""What `/vtprune/explain` says of pictures of any shape, in every family, without a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from tests.helpers.family_cases import LANDSCAPE, PORTRAIT, SMALL
from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_processor import placeholder_of
from vllm_vtprune import request_kwargs
from vllm_vtprune.settings import AUTO_SCORE, VisionSettings
from vllm_vtprune.vision.explain import explain

_AMOUNTS: list[dict[str, float | None]] = [
    {},
    {"keep_ratio": 0.3, "aggressiveness": None},
    {"aggressiveness": 0.6},
]
SETTINGS = [VisionSettings(score=AUTO_SCORE, **amount) for amount in _AMOUNTS]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("image", [LANDSCAPE, PORTRAIT, SMALL], ids=["landscape", "portrait", "small"])
def test_every_view_lies_in_the_picture_and_the_tiles_do_not_overlap(
    name: str, image: Image.Image, processor: Callable[[str], Any]
) -> None:
    told = explain(processor(name), image, SETTINGS[1])
    views = [told, *told.more_views]
    for view in views:
        crop = view.crop
        assert crop["left"] >= 0 and crop["left"] + crop["width"] <= 1 + 1e-6
        assert crop["top"] >= 0 and crop["top"] + crop["height"] <= 1 + 1e-6
        assert len(view.scores) == len(view.kept) == view.grid[0] * view.grid[1]
        assert 1 <= sum(view.kept) <= len(view.kept)
    tiles = [view.crop for view in views if view.crop["width"] < 1 or view.crop["height"] < 1]
    covered = sum(crop["width"] * crop["height"] for crop in tiles)
    # a square crop of the middle is one view alone; tiles make up the whole picture
    assert not tiles or len(views) == 1 or covered == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_counts_what_serving_keeps(
    name: str, settings: VisionSettings, processor: Callable[[str], Any]
) -> None:
    ours = processor(name)
    told = explain(ours, LANDSCAPE, settings)
    fields = {"keep_ratio": settings.keep_ratio, "aggressiveness": settings.aggressiveness or None}
    kwargs, _ = request_kwargs(**fields)
    items = ours.info.parse_mm_data({"image": [LANDSCAPE]})
    result = ours(placeholder_of(ours), items, hf_processor_mm_kwargs=kwargs)
    assert told.vision_tokens == result["vtprune_vision_tokens"]
    assert told.vision_tokens_kept == result["mm_placeholders"]["image"][0].get_num_embeds()
