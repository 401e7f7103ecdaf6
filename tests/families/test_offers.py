# SPDX-License-Identifier: Apache-2.0
"""What `/vtprune/config` says of every family, and which methods it refuses, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.family_checkpoints import CHECKPOINTS
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.families.base import Family
from vllm_vtprune.selection.registry import METHODS
from vllm_vtprune.settings import AUTO_SCORE, VisionSettings
from vllm_vtprune.vision.features import for_family, servable_methods, servable_scores
from vtprune_server.inspection import show_config


def tells_what_it_offers(config: dict[str, Any], family: Family) -> None:
    """The configuration is the family's."""
    model = config["model"]
    assert model["architecture"] == family.config.architectures[0]
    assert model["scores"] == list(servable_scores(family))
    assert model["default_score"] == family.default_score == config["policy"]["score"]
    assert model["default_method"] == family.default_method == config["policy"]["default_method"]
    assert model["presets_calibrated"] is False
    assert model["modalities"] == list(family.modalities)
    assert config["methods"] == list(servable_methods(family))
    grid = family.unpruned_grid()
    assert model["grid"] == (None if grid is None else list(grid))
    assert model["vision_tokens_per_image"] == family.places()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_tells_what_the_family_offers(name: str, processor: Callable[[str], Any]) -> None:
    ours = processor(name)
    engine = SimpleNamespace(
        renderer=SimpleNamespace(mm_processor=ours), model_config=ours.info.ctx.model_config
    )
    state = SimpleNamespace(
        engine_client=engine,
        openai_serving_models=SimpleNamespace(model_name=lambda: "m"),
        vtprune_auto=SimpleNamespace(level="off", levels=("off",)),
    )
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))
    tells_what_it_offers(asyncio.run(show_config(request)), ours.family)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_method_that_the_tower_cannot_serve_is_refused_with_those_it_can(
    name: str, processor: Callable[[str], Any]
) -> None:
    family = processor(name).family
    for method in METHODS:
        settings = VisionSettings(method=method, score=AUTO_SCORE, aggressiveness=None, keep_ratio=0.25)
        if method in servable_methods(family):
            assert for_family(settings, family).method == method
        else:
            with pytest.raises(SettingsError, match=f"{method}.*inflection"):
                for_family(settings, family)
