# SPDX-License-Identifier: Apache-2.0
"""Three-dimensional positions of prompts with pictures and videos, by vLLM's classes, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec

from tests.families.conftest import Checkpoint
from tests.helpers.family_cases import CLIP, LANDSCAPE, PORTRAIT, TALL_CLIP
from tests.helpers.family_processor import placeholder_of, processor_of
from vllm_vtprune import request_kwargs
from vllm_vtprune.families.registry import ARCHITECTURES
from vllm_vtprune.models.positions import _unpruned
from vllm_vtprune.vision.placeholders import FIELDS

IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
PROMPTS = [
    (f"Look: {IMAGE} What is it?", 1),
    (f"{IMAGE}{IMAGE} then {VIDEO} and?", 2),
    (f"{VIDEO} then {IMAGE} then {VIDEO} and {IMAGE} Which?", 2),
    (f"{VIDEO}{VIDEO} Which?", 0),
]


def positions(processor: Any, prompt: str, images: int, **settings: Any) -> tuple[Any, Any, int]:
    """The processed prompt, its positions [3, n] and what is added to the number of a token behind it."""
    videos = [TALL_CLIP, CLIP][: prompt.count("video_pad")]
    data = {"image": [LANDSCAPE, PORTRAIT][:images], "video": videos}
    items = processor.info.parse_mm_data({modality: given for modality, given in data.items() if given})
    kwargs, _ = request_kwargs(**settings)
    result = processor(prompt, items, hf_processor_mm_kwargs=kwargs)
    return result, *positions_of(processor, result)


def positions_of(processor: Any, result: Any) -> tuple[torch.Tensor, int]:
    """By our class in the engine."""
    entry = ARCHITECTURES[processor.family.config.architectures[0]]
    module, name = entry.model.split(":")
    cls = getattr(import_module(f"vllm_vtprune.models.{module}"), name)
    model = cls.__new__(cls)  # positions are computed from the configuration alone
    model.__dict__["config"] = processor.family.config
    features = [
        MultiModalFeatureSpec(data=item, modality=modality, identifier=str(i), mm_position=place)
        for modality, places in result["mm_placeholders"].items()
        for i, (item, place) in enumerate(zip(result["mm_kwargs"][modality], places, strict=True))
    ]
    found: tuple[torch.Tensor, int] = model.get_mrope_input_positions(result["prompt_token_ids"], features)
    return found


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize(("prompt", "images"), PROMPTS)
def test_kept_tokens_stand_where_they_do_in_the_unpruned_prompt(
    name: str, prompt: str, images: int, processor: Callable[[str], Any]
) -> None:
    """And what follows, a generated token too, goes on where it would."""
    whole, expected, after = positions(processor(name), prompt, images)
    pruned, mine, delta = positions(processor(name), prompt, images, keep_ratio=0.3)
    stays = torch.ones(len(whole["prompt_token_ids"]), dtype=torch.bool)
    for modality, names in FIELDS.items():
        places = whole["mm_placeholders"].get(modality, ())
        for item, place in zip(pruned["mm_kwargs"].get(modality, ()), places, strict=True):
            where = torch.arange(place.offset, place.offset + place.length)
            where = where if place.is_embed is None else where[place.is_embed]
            assert not bool(item[names.kept].data.all())
            stays[where] = item[names.kept].data
    assert not bool(stays.all())
    assert torch.equal(mine, expected[:, stays])
    assert len(pruned["prompt_token_ids"]) + delta == len(whole["prompt_token_ids"]) + after
    assert len(pruned["prompt_token_ids"]) + delta == int(expected.max()) + 1


@given(st.lists(st.booleans(), min_size=1, max_size=30).filter(any), st.data())
def test_the_unpruned_tokens_come_back_whatever_stayed(layout: list[bool], data: Any) -> None:
    """Text before, between and behind the places, runs of places of which none stayed included."""
    count = sum(layout)
    kept = data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    places = torch.tensor(layout)
    stays = ~places
    stays[places] = torch.tensor(kept)
    whole = [7 if place else 100 + i for i, place in enumerate(layout)]
    thinned = [token for token, stay in zip(whole, stays.tolist(), strict=True) if stay]
    assert _unpruned(thinned, torch.tensor(kept), places) == (whole, stays.tolist())
    if all(layout):
        assert _unpruned(thinned, torch.tensor(kept), None) == (whole, stays.tolist())


def test_gaps_that_the_rotary_table_has_no_room_for_are_refused(checkpoint: Checkpoint) -> None:
    """An index past the table would end the engine. Half of the longest prompt is left to gaps here."""
    ours = processor_of(checkpoint("qwen3_vl"), limit_mm_per_prompt={"image": 40})
    assert ours.family.table(2048) == 2 * 2048
    tall = Image.effect_noise((32, 3200), 80).convert("RGB")  # 100 units, one above the other
    kwargs, _ = request_kwargs(keep_ratio=0.01)

    def process(images: int) -> Any:
        items = ours.info.parse_mm_data({"image": [tall] * images})
        return ours(placeholder_of(ours, images), items, hf_processor_mm_kwargs=kwargs)

    # each leaves 99 positions behind its one token
    assert process(20)["vtprune_vision_tokens"] == 2000
    with pytest.raises(VLLMValidationError, match=r"gaps of 2079 positions.*prune less, or send"):
        process(21)
