# SPDX-License-Identifier: Apache-2.0
"""Videos of the families that prune them, by the processor that vLLM builds, without an engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from tests.families.conftest import Checkpoint
from tests.families.test_positions import positions_of
from tests.helpers.family_cases import (
    CLIP,
    LANDSCAPE,
    TALL_CLIP,
    TWO_VIDEOS,
    VIDEO_FAMILIES,
    VIDEOS_PRUNED,
    WITH_VIDEO,
    clip,
)
from tests.helpers.family_oracle import Oracle, Request, frames_stay
from vllm_vtprune import request_kwargs
from vllm_vtprune.families import anyres, qwen_vl
from vllm_vtprune.vision.placeholders import FIELDS

NAMES = FIELDS["video"]
CLIPS = [CLIP, TALL_CLIP, clip(9, 60, 60, fps=1.0)]
SETTINGS: list[dict[str, Any]] = [
    {"keep_ratio": 0.35},
    {"aggressiveness": 0.5},
    {"keep_ratio": 0.01},
    {"keep_ratio": 0.35, "method": "inflection_temporal"},
    {"aggressiveness": 0.5, "method": "inflection_temporal"},
    {"keep_ratio": 0.01, "method": "inflection_temporal"},
]
families = pytest.mark.parametrize("name", VIDEO_FAMILIES)


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Callable[[str], Oracle]:
    return cache(lambda name: Oracle(checkpoint(name)))


def is_llava(processor: Any) -> bool:
    return type(processor.family).__name__ == "LlavaOnevision"


def data(processor: Any, videos: list[Any]) -> dict[str, Any]:
    """A picture and some videos, of which OneVision takes the frames alone."""
    frames = [video[0] for video in videos] if is_llava(processor) else videos
    return {"image": [LANDSCAPE], "video": frames}


def process(processor: Any, videos: list[Any], *, vllms: bool = False, **settings: Any) -> Any:
    """A prompt about them, by our processor or by vLLM's own behind it."""
    image = "<image>" if is_llava(processor) else "<|vision_start|><|image_pad|><|vision_end|>"
    prompt = f"Look {image} watch" + f" {image.replace('image', 'video')} and" * len(videos) + " what?"
    items = processor.info.parse_mm_data(data(processor, videos))
    if vllms:
        own = type(processor).__mro__[2](processor.info, processor.dummy_inputs)
        return own(prompt, items, hf_processor_mm_kwargs={})
    kwargs, _ = request_kwargs(**settings)
    return processor(prompt, items, hf_processor_mm_kwargs=kwargs)


def keyed(processor: Any, videos: list[Any], kwargs: dict[str, Any] | None = None) -> Any:
    """The videos as the processor hands them on."""
    items = processor.info.parse_mm_data({"video": data(processor, videos)["video"]})
    return processor.keys.keyed(ProcessorInputs([], items, hf_processor_mm_kwargs=kwargs or {}))["video"]


@torch.inference_mode()
def reference(oracle: Oracle, video: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Units [F, N, D], scores [F, N] and embeddings [T, E]."""
    family = oracle.family
    if family.placeholder == "<image>":
        return family.video([video], 0)
    return family.video(family.inputs(Request("<video>", videos=(video,))), 0)


@families
def test_unpruned_embeddings_are_those_of_transformers(
    name: str, processor: Callable[[str], Any], oracle: Callable[[str], Oracle]
) -> None:
    result = process(processor(name), CLIPS)
    for item, video in zip(result["mm_kwargs"]["video"], CLIPS, strict=True):
        _, _, expected = reference(oracle(name), video)
        mine = item[NAMES.embeddings].data
        assert mine.shape == expected.shape
        assert (mine - expected).abs().max() < 1e-5 * expected.abs().max()


@families
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_of_each_frame_stays_what_the_reference_says(
    name: str, settings: dict[str, Any], processor: Callable[[str], Any], oracle: Callable[[str], Oracle]
) -> None:
    result = process(processor(name), CLIPS, **settings)
    for item, video in zip(result["mm_kwargs"]["video"], CLIPS, strict=True):
        units, scores, rows = reference(oracle(name), video)
        expected = frames_stay(units, scores, Request("", **settings))
        newline = torch.ones(len(rows) - len(expected), dtype=torch.bool)
        kept = item[NAMES.kept].data
        assert torch.equal(kept, torch.cat((expected, newline)))
        mine = item[NAMES.embeddings].data
        assert (mine - rows[kept]).abs().max() < 1e-5 * rows.abs().max()


@families
@pytest.mark.parametrize("request_", [*VIDEOS_PRUNED, *WITH_VIDEO, TWO_VIDEOS], ids=lambda r: r.text[:20])
def test_the_language_model_is_given_what_the_reference_gives_it(
    name: str, request_: Request, processor: Callable[[str], Any], oracle: Callable[[str], Oracle]
) -> None:
    """Embeddings of the whole prompt, and where positions have three dimensions, those too."""
    ours, judge = processor(name), oracle(name)
    mark = judge.family.placeholder
    text = request_.text.format(*[mark] * len(request_.images)).replace(
        "<video>", mark.replace("image", "video")
    )
    found = {"image": list(request_.images), "video": data(ours, list(request_.videos))["video"]}
    items = ours.info.parse_mm_data({modality: media for modality, media in found.items() if media})
    kwargs, _ = request_kwargs(
        method=request_.method,
        keep_ratio=request_.keep_ratio,
        aggressiveness=request_.aggressiveness or None,
    )
    result = ours(text, items, hf_processor_mm_kwargs=kwargs)
    with torch.inference_mode():
        expected, positions, *_ = judge.family.prompt(request_)
        of_text = judge.model.get_input_embeddings()(torch.tensor(result["prompt_token_ids"]))
    mine = of_text.clone()
    assert mine.shape == expected.shape
    width = mine.shape[1]
    for modality, places in result["mm_placeholders"].items():
        for item, place in zip(result["mm_kwargs"][modality], places, strict=True):
            where = torch.arange(place.offset, place.offset + place.length)
            where = where if place.is_embed is None else where[place.is_embed]
            mine[where] = item[FIELDS[modality].embeddings].data[:, :width]
    assert torch.allclose(mine, expected, atol=1e-5 * float(expected.abs().max()))
    if not is_llava(ours):
        assert torch.equal(positions_of(ours, result)[0], positions)


@families
def test_placeholders_agree_with_embeddings_for_videos_of_many_sizes_and_lengths(
    name: str, processor: Callable[[str], Any]
) -> None:
    """What takes no embedding, as a frame's time, stays in its order; the places are vLLM's own."""
    rng, ours = random.Random(3), processor(name)
    for _ in range(25):
        videos = [
            clip(rng.randint(2, 12), rng.randint(50, 200), rng.randint(50, 200), rng.choice([1.0, 2.0, 3.0]))
            for _ in range(rng.randint(1, 2))
        ]
        settings = rng.choice([{}, {"keep_ratio": 0.3, "method": "random"}, *SETTINGS])
        result, whole = process(ours, videos, **settings), process(ours, videos, vllms=True)
        places = [p.get_num_embeds() for found in whole["mm_placeholders"].values() for p in found]
        assert result["vtprune_vision_tokens"] == sum(places)
        for item, mine, theirs in zip(
            result["mm_kwargs"]["video"],
            result["mm_placeholders"]["video"],
            whole["mm_placeholders"]["video"],
            strict=True,
        ):
            kept = item[NAMES.kept].data
            assert len(kept) == theirs.get_num_embeds() and bool(kept.all()) is not bool(settings)
            assert mine.get_num_embeds() == len(item[NAMES.embeddings].data) == int(kept.sum())
            before = whole["prompt_token_ids"][theirs.offset : theirs.offset + theirs.length]
            after = result["prompt_token_ids"][mine.offset : mine.offset + mine.length]
            stays = torch.ones(theirs.length, dtype=torch.bool)
            stays[stays.clone() if theirs.is_embed is None else theirs.is_embed] = kept
            assert after == [token for token, stay in zip(before, stays.tolist(), strict=True) if stay]


@families
def test_a_long_video_is_computed_in_parts(
    name: str, processor: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = processor(name)
    encoder = ours.vision.encoder
    items = ours.preprocessing.items(keyed(ours, [clip(10, 112, 84)]))

    def passes() -> tuple[Any, int]:
        """The tower's output, and how often its modules were called for it."""
        tower = encoder.modules["tower"] if is_llava(ours) else encoder.modules
        calls: list[int] = []
        with monkeypatch.context() as patch:
            target, method = (encoder.family._fixed, "run") if is_llava(ours) else (tower, "forward")
            run = getattr(target, method)
            patch.setattr(target, method, lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
            (output,) = encoder.encode(items, frozenset({"received"}))
        return output, len(calls)

    whole, once = passes()
    monkeypatch.setattr(qwen_vl, "_MOST_PATCHES", 100)
    monkeypatch.setattr(anyres, "_MOST_FRAMES", 3)
    parts, often = passes()
    assert once == 1 and often > 1
    assert whole.views == parts.views
    assert torch.allclose(whole.patches, parts.patches, atol=1e-5)
    assert torch.allclose(whole.received, parts.received, atol=1e-6)


@families
def test_a_videos_key_follows_its_frames_its_times_and_the_setting(
    name: str, processor: Callable[[str], Any]
) -> None:
    ours = processor(name)

    def key(video: Any, **settings: Any) -> str:
        found: str = process(ours, [video], **settings)["mm_hashes"]["video"][0]
        return found

    other = CLIP[0].copy()
    other[-1, 0, 0] ^= 1
    keys = [key(CLIP), key((other, CLIP[1])), key(CLIP, keep_ratio=0.5), key(CLIP, keep_ratio=0.3)]
    keys.append(key(CLIP, keep_ratio=0.3, method="inflection_temporal"))
    assert len(set(keys)) == len(keys)
    assert key(CLIP, keep_ratio=0.5) == keys[2]
    later = (CLIP[0], {**CLIP[1], "fps": 4.0})
    assert (key(later) == keys[0]) is is_llava(ours)  # which is not told the times


@families
def test_outputs_are_cached_by_video_and_not_by_setting(name: str, processor: Callable[[str], Any]) -> None:
    ours, video = processor(name), clip(4, 100, 100)
    (medium,) = keyed(ours, [video])
    assert ours.vision.available([medium.key]) == 0
    first = ours.prefetch(data(ours, [video]), request_kwargs(keep_ratio=0.5)[0], None, None)
    assert sum(first) == 2 and ours.vision.available([medium.key]) == 1
    assert ours.prefetch(data(ours, [video]), request_kwargs(keep_ratio=0.2)[0], None, None) == (2, 0)


def test_videos_with_a_rate_each_are_sampled_by_their_own(processor: Callable[[str], Any]) -> None:
    """Where the operator trusts a request's `mm_processor_kwargs`."""
    ours = processor("qwen3_vl")
    frames, told = clip(16, 64, 64, fps=4.0)
    sampled = (frames, {**told, "do_sample_frames": True})
    media = keyed(ours, [sampled, sampled], {"fps": [1.0, 2.0]})
    assert media[0].key != media[1].key
    items = ours.preprocessing.items(media)
    assert [int(item.inputs["video_grid_thw"][0]) for item in items] == [2, 4]


@families
def test_a_video_without_frames_is_refused_in_a_sentence(name: str, processor: Callable[[str], Any]) -> None:
    empty = (np.zeros((0, 64, 64, 3), np.uint8), {**CLIP[1], "total_num_frames": 0, "frames_indices": []})
    with pytest.raises(VLLMValidationError, match="Video 1 has no frames: send a whole one"):
        process(processor(name), [CLIP, empty], keep_ratio=0.5)


@families
def test_a_video_of_one_frame_works_or_is_refused_in_a_sentence(
    name: str, processor: Callable[[str], Any]
) -> None:
    ours, short = processor(name), clip(1, 112, 84)
    if name == "qwen3_vl":
        with pytest.raises(
            VLLMValidationError, match=r"has 1 frame, .* have 2 at least: send it as an image"
        ):
            process(ours, [short], keep_ratio=0.5)
        return
    (item,) = process(ours, [short], keep_ratio=0.5)["mm_kwargs"]["video"]
    assert 1 <= int(item[NAMES.kept].data.sum()) < len(item[NAMES.kept].data)


@families
def test_the_dummy_videos_that_size_vllms_buffers_run_no_tower(
    name: str, processor: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count unpruned: the most tokens that a video can have."""
    ours = processor(name)
    inputs = ours.get_dummy_inputs(2048, {"image": 1, "video": 1}, {})

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(ours.vision, "encode", never)
    result = ours.apply(inputs, TimingContext(enabled=False))
    ((item,), (place,)) = result["mm_kwargs"]["video"], result["mm_placeholders"]["video"]
    assert place.get_num_embeds() == len(item[NAMES.embeddings].data) == int(item[NAMES.kept].data.sum())
    assert bool(item[NAMES.kept].data.all())
