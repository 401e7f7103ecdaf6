# SPDX-License-Identifier: Apache-2.0
"""Each family's tower and projector beside transformers' own model, by the processor that vLLM builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families.conftest import Checkpoint
from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_oracle import Oracle
from vllm_vtprune import request_kwargs
from vllm_vtprune.families.base import Kept
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.features import everything, servable_methods
from vllm_vtprune.vision.processor import PrunedProcessor

SIZES = [(330, 120), (90, 400), (200, 200), (70, 60), (640, 480)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Coloured blocks with noise: every patch differs from every other."""
    random = np.random.default_rng(seed + size[0])
    blocks = Image.fromarray(random.integers(0, 255, (8, 8, 3)).astype(np.uint8))
    pixels = np.asarray(blocks.resize(size, Image.Resampling.NEAREST), np.int16)
    return Image.fromarray(np.clip(pixels + random.integers(-30, 30, pixels.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Callable[[str], Oracle]:
    return cache(lambda name: Oracle(checkpoint(name)))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_unpruned_embeddings_are_those_of_transformers(
    name: str, processor: Callable[[str], Any], oracle: Callable[[str], Oracle]
) -> None:
    pictures = [picture(size) for size in SIZES]
    ours = processor(name)
    assert isinstance(ours, PrunedProcessor)
    for size, image in zip(SIZES, pictures, strict=True):
        output, _ = ours.tower_output(image, VisionSettings(score="received"))
        ((embeddings, places),) = ours.vision.encoder.project([everything(output)])
        expected = oracle(name).embeddings(image)
        assert embeddings.shape == expected.shape, size
        assert places.tolist() == list(range(len(expected)))
        assert (embeddings - expected).abs().max() < 1e-5 * expected.abs().max(), size


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_batch_of_pictures_computes_what_each_alone_does(
    name: str, processor: Callable[[str], Any]
) -> None:
    ours = processor(name)
    pictures = [picture(size, seed=5) for size in SIZES]
    batch = ours._encode(pictures, list("abcde"), frozenset({"received"}), {})
    for key, image, together in zip("fghij", pictures, batch, strict=True):
        (alone,) = ours._encode([image], [key], frozenset({"received"}), {})
        assert torch.allclose(alone.patches, together.patches, atol=1e-5)
        assert torch.allclose(alone.received, together.received, atol=1e-6)
        assert alone.views == together.views


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_score_is_the_attention_that_units_receive(
    name: str, processor: Callable[[str], Any], oracle: Callable[[str], Oracle]
) -> None:
    """In float64, in the last layer that compares all units of a view."""
    for size in SIZES:
        output, _ = processor(name).tower_output(picture(size), VisionSettings(score="received"))
        expected = oracle(name).received(picture(size))
        assert [view.grid for view in output.views] == [tuple(grid) for grid, _ in expected]
        for view, (_, scores) in zip(output.views, expected, strict=True):
            assert torch.allclose(
                output.received[-1, view.units].double(), scores.flatten(), rtol=1e-4, atol=1e-8
            )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_servable_method_serves(name: str, processor: Callable[[str], Any]) -> None:
    ours = processor(name)
    for method in servable_methods(ours.family):
        for fields in ({"keep_ratio": 0.2}, {"aggressiveness": 0.5}, {"aggressiveness": 1.0}):
            kwargs, _ = request_kwargs(method=method, **fields)
            items = ours.info.parse_mm_data({"image": [picture(size) for size in SIZES[:3]]})
            result = ours(ours_prompt(ours, 3), items, hf_processor_mm_kwargs=kwargs)
            for item, found in zip(
                result["mm_kwargs"]["image"], result["mm_placeholders"]["image"], strict=True
            ):
                assert item["image_embeds"].data.shape[0] == found.get_num_embeds() >= 1
                assert bool(item["image_embeds"].data.isfinite().all())


def ours_prompt(processor: Any, images: int) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": "What is it?"}]
    tokenizer = processor.info.get_tokenizer()
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_question_rates_every_unit_by_its_own_embedding(name: str, processor: Callable[[str], Any]) -> None:
    ours = processor(name)
    output, _ = ours.tower_output(picture((640, 480)), VisionSettings(score="received"))
    encoder, units = ours.vision.encoder, output.patches.shape[0]
    ((embeddings, _),) = encoder.project([everything(output)])
    rows = ours.family.of_units(output, embeddings)
    assert rows.shape == (units, ours.family.config.get_text_config().hidden_size)
    for unit in (0, units // 2, units - 1):
        ((alone, _),) = encoder.project([Kept(output, torch.tensor([unit]), output.patches[unit : unit + 1])])
        # among the newlines, where the family has them
        distances = (alone[:, : rows.shape[1]] - rows[unit]).abs().amax(dim=1)
        assert distances.min() < 1e-4 * rows.abs().max()
    rated = ours.rater.rate(output, "what is it ?")
    assert rated.shape == (units,) and bool(rated.isfinite().all())
    assert not torch.equal(rated, ours.rater.rate(output, "something else"))
