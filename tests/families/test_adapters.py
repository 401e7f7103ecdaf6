# SPDX-License-Identifier: Apache-2.0
"""Each family's tower and projector beside transformers' own model, by the processor that vLLM builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vllm.transformers_utils.config import get_config

from tests.families.conftest import Checkpoint
from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_oracle import Oracle
from tests.helpers.family_processor import placeholder_of, processor_of
from tests.helpers.kv_config import config
from vllm_vtprune import request_kwargs
from vllm_vtprune.engine_config import policy_for
from vllm_vtprune.errors import CheckpointError, PolicyError, SettingsError
from vllm_vtprune.families.base import Kept
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.explain import tower_output
from vllm_vtprune.vision.features import everything, for_family, servable_methods
from vllm_vtprune.vision.outcomes import Decided
from vllm_vtprune.vision.placeholders import FIELDS
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
        output, _ = tower_output(ours, image, VisionSettings(score="received"))
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
    batch = ours.encode(
        [Decided(*one) for one in zip("abcde", pictures, strict=True)], frozenset({"received"})
    )
    for key, image, together in zip("fghij", pictures, batch, strict=True):
        (alone,) = ours.encode([Decided(key, image)], frozenset({"received"}))
        assert torch.allclose(alone.patches, together.patches, atol=1e-5)
        assert torch.allclose(alone.received, together.received, atol=1e-6)
        assert alone.views == together.views


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_score_is_the_attention_that_units_receive(
    name: str, processor: Callable[[str], Any], oracle: Callable[[str], Oracle]
) -> None:
    """In float64, in the last layer that compares all units of a view."""
    for size in SIZES:
        output, _ = tower_output(processor(name), picture(size), VisionSettings(score="received"))
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
            result = ours(placeholder_of(ours, 3), items, hf_processor_mm_kwargs=kwargs)
            for item, found in zip(
                result["mm_kwargs"]["image"], result["mm_placeholders"]["image"], strict=True
            ):
                assert item["image_embeds"].data.shape[0] == found.get_num_embeds() >= 1
                assert bool(item["image_embeds"].data.isfinite().all())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl_chat"])
@pytest.mark.parametrize("kind", ["fp8", "int8", "scales"])
def test_a_quantised_tower_is_refused_and_a_quantised_language_model_is_not(
    name: str, kind: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(name)
    hf_config = get_config(str(source), trust_remote_code=True)
    family = family_of(hf_config)

    def quantised(tower: bool) -> Path:
        folder = tmp_path / str(tower)
        folder.mkdir()
        tensors = load_file(source / "model.safetensors")
        for key, tensor in list(tensors.items()):
            if tensor.ndim != 2 or (family.rename(key) is not None) is not tower:
                continue
            if kind == "scales":
                tensors[key.replace(".weight", ".weight_scale")] = torch.ones(1)
            else:
                tensors[key] = tensor.to(torch.float8_e4m3fn if kind == "fp8" else torch.int8)
        save_file(tensors, folder / "model.safetensors")
        return folder

    def load(folder: Path) -> None:
        VisionEncoder.load(hf_config, str(folder), device=torch.device("cpu"), dtype=torch.float32)

    load(quantised(tower=False))
    with pytest.raises(CheckpointError, match=r"is quantised .*quantises the language model only"):
        load(quantised(tower=True))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_a_clients_pixel_limits_count_and_have_entries_of_their_own(
    name: str, processor: Callable[[str], Any]
) -> None:
    """Where the operator trusts a request's `mm_processor_kwargs`: they change pixels, and so every key."""
    limits: dict[str, dict[str, Any]] = {
        "qwen2_5_vl": {"max_pixels": 28 * 28 * 20},
        "qwen3_vl": {"max_pixels": 32 * 32 * 20},
        "mistral3": {"size": {"longest_edge": 112}},
    }
    ours, (image,) = processor(name), [picture((640, 480), seed=9)]
    kwargs, _ = request_kwargs(keep_ratio=0.5)
    found = []
    for given in ({}, limits[name], {}):
        items = ours.info.parse_mm_data({"image": [image]})
        result = ours(placeholder_of(ours), items, hf_processor_mm_kwargs={**kwargs, **given})
        found.append((result["vtprune_vision_tokens"], result["mm_hashes"]["image"][0]))
    assert found[0] == found[2]
    assert found[1][0] < found[0][0] and found[1][1] != found[0][1]


def test_embeddings_that_the_caller_gives_pass_as_they_are(
    checkpoint: Checkpoint, oracle: Callable[[str], Oracle]
) -> None:
    """They are not thinned, and count as vision tokens that all stay."""
    ours = processor_of(checkpoint("qwen3_vl"), enable_mm_embeds=True)
    rows = oracle("qwen3_vl").embeddings(picture((200, 200)))
    grid = torch.tensor([[1, 12, 12]])
    assert len(rows) == 36
    kwargs, _ = request_kwargs(keep_ratio=0.1)
    items = ours.info.parse_mm_data({"image": {"image_embeds": rows, "image_grid_thw": grid}})
    result = ours(placeholder_of(ours), items, hf_processor_mm_kwargs=kwargs)
    (place,), (item,) = result["mm_placeholders"]["image"], result["mm_kwargs"]["image"]
    assert place.get_num_embeds() == result["vtprune_vision_tokens"] == 36
    assert torch.equal(item["image_embeds"].data, rows) and FIELDS["image"].kept not in item


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"score": "cosine"}, "'cosine' needs cls, which this model's vision tower does not give"),
        ({"methods": ("inflection", "vispruner")}, "method 'vispruner' does not work with this model's"),
        ({"default_method": "prumerge"}, "method 'prumerge' does not work with this model's"),
    ],
)
def test_what_the_tower_cannot_serve_is_refused_of_the_operator_and_of_a_request_alike(
    asked: dict[str, Any], sentence: str, checkpoint: Checkpoint
) -> None:
    family = family_of(get_config(str(checkpoint("qwen3_vl")), trust_remote_code=True))
    with pytest.raises(PolicyError, match=sentence):
        policy_for(PrunePolicy(**asked), family)
    method = asked.get("default_method") or asked.get("methods", ("inflection",))[-1]
    settings = VisionSettings(method=method, score=asked.get("score", "auto"), keep_ratio=0.5)
    with pytest.raises(SettingsError, match=sentence):
        for_family(settings, family)


def test_the_second_stage_is_refused_before_a_hybrid_decoder(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="cannot be used with a qwen3_5_text decoder; the supported"):
        config(checkpoint("qwen3_5"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_familys_defaults_are_what_its_tower_can_serve(name: str, checkpoint: Checkpoint) -> None:
    family = family_of(get_config(str(checkpoint(name)), trust_remote_code=True))
    policy = policy_for(PrunePolicy(), family)
    assert policy.score == family.default_score and policy.default_method == family.default_method
    assert policy.methods == servable_methods(family) and family.default_method in policy.methods
    for_family(VisionSettings(method=policy.default_method, score="auto", keep_ratio=0.5), family)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_question_rates_every_unit_by_its_own_embedding(name: str, processor: Callable[[str], Any]) -> None:
    ours = processor(name)
    output, _ = tower_output(ours, picture((640, 480)), VisionSettings(score="received"))
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
