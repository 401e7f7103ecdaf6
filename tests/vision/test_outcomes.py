# SPDX-License-Identifier: Apache-2.0
"""One identifier, one outcome: what vLLM's caches know of a picture whose selection depends on rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache

from tests.conftest import DEMO_MODEL
from tests.helpers.engine_process import saved_by
from tests.helpers.family_processor import processor_of
from tests.helpers.noisy_tower import ROUNDING, SETTING, forget, other_rounding
from tests.helpers.pictures import scene
from vllm_vtprune import request_kwargs
from vllm_vtprune.vision.outcomes import Outcomes, outcome_of
from vllm_vtprune.vision.processor import PrunedProcessor

BLOCK = 32


def test_equal_outcomes_have_equal_names_and_others_others() -> None:
    names = [
        outcome_of(torch.tensor(units, dtype=torch.int64), tokens)
        for units, tokens in (([0, 1, 2], 3), ([0, 1, 3], 3), ([0, 1], 2), ([0, 1], 3), ([], 0), ([0], 1))
    ]
    assert len(set(names)) == len(names)
    assert outcome_of(torch.tensor([0, 1, 3]), 3) == names[1]


def test_the_longest_unused_outcome_is_forgotten_first() -> None:
    outcomes = Outcomes(limit=2)
    outcomes.put("a", "s", "1")
    outcomes.put("b", "s", "2")
    assert outcomes.get("a", "s") == "1" and outcomes.get("a", "t") is None
    outcomes.put("c", "s", "3")
    assert outcomes.get("b", "s") is None and outcomes.get("a", "s") == "1"
    outcomes.clear()
    assert outcomes.get("a", "s") is None


@pytest.fixture(scope="module")
def processor() -> PrunedProcessor:
    made: PrunedProcessor = processor_of(DEMO_MODEL, max_model_len=None)
    return made


def processed(
    processor: PrunedProcessor,
    picture: int,
    fields: dict[str, Any],
    cache: MultiModalProcessorOnlyCache | None = None,
) -> tuple[str, torch.Tensor]:
    """An image's key, and which of its tokens stay."""
    items = processor.info.parse_mm_data({"image": [scene(picture)]})
    kwargs, _ = request_kwargs(**fields)
    result: Any = processor("<image> ?", items, hf_processor_mm_kwargs=kwargs, cache=cache)
    return result["mm_hashes"]["image"][0], result["mm_kwargs"]["image"][0]["vtprune_kept"].data


# the share of pictures of which this noise changes what stays lies well between none and all
@pytest.mark.parametrize(("fields", "noise"), [(SETTING, ROUNDING), ({"keep_ratio": 0.3}, 4 * ROUNDING)])
def test_two_processes_share_a_key_exactly_where_they_keep_the_same(
    processor: PrunedProcessor, fields: dict[str, Any], noise: float
) -> None:
    shared = 0
    for picture in range(12):
        forget(processor.vision)
        key, kept = processed(processor, picture, fields)
        forget(processor.vision)
        with other_rounding(processor.vision, seed=picture, noise=noise):
            other_key, other_kept = processed(processor, picture, fields)
        assert (key == other_key) is torch.equal(kept, other_kept)
        shared += key == other_key
    assert 0 < shared < 12  # otherwise this proved nothing


def test_where_nothing_is_dropped_the_key_is_the_pictures(processor: PrunedProcessor) -> None:
    key, _ = processed(processor, 0, {})
    processor.vision.cache.clear()
    with other_rounding(processor.vision, seed=0):
        assert processed(processor, 0, {})[0] == key


def test_a_known_picture_runs_no_tower_while_vllms_cache_holds_it(processor: PrunedProcessor) -> None:
    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config)
    first = processed(processor, 40, SETTING, cache)
    passes: list[int] = []
    processor.vision.observer = lambda count, _: passes.append(count)
    try:
        processor.vision.cache.clear()
        again = processed(processor, 40, SETTING, cache)
        assert again[0] == first[0] and torch.equal(again[1], first[1]) and not passes
        # it left vLLM's cache, and the tower rounds otherwise by now: what it keeps now is what its key says
        cache.clear_cache()
        with other_rounding(processor.vision, seed=3):
            later = processed(processor, 40, SETTING, cache)
        assert passes == [1] and (later[0] == first[0]) is torch.equal(later[1], first[1])
    finally:
        processor.vision.observer = None


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("noisy") / "out.pt"
    return saved_by("tests.helpers.noisy_tower", str(out), out=out, env={"VLLM_PLUGINS": "vtprune"})


@pytest.mark.engine
def test_an_engine_serves_two_processes_that_keep_different_tokens(
    answers: dict[str, list[dict[str, Any]]],
) -> None:
    """No request fails, and each is answered as if the other process were not there."""
    assert {a["finish"] for told in answers.values() for a in told} == {"length"}
    plain, other = answers["plain"], answers["other"]
    differ = [a["prompt_tokens"] != b["prompt_tokens"] for a, b in zip(plain, other, strict=True)]
    assert 3 <= sum(differ) < len(differ)  # otherwise the caches were not put to the test
    for shared, alone in (("plain again", "plain"), ("other", "other alone")):
        for mine, expected in zip(answers[shared], answers[alone], strict=True):
            assert mine["tokens"] == expected["tokens"]
            # where both keep the same tokens the engine may use either's embeddings: they differ by noise
            assert mine["logprobs"] == pytest.approx(expected["logprobs"], abs=2e-2)


@pytest.mark.engine
def test_prefix_blocks_are_shared_exactly_where_processes_keep_the_same(
    answers: dict[str, list[dict[str, Any]]],
) -> None:
    for first, second in zip(answers["plain"], answers["plain again"], strict=True):
        # whole blocks, but for the last token, which is always computed
        assert second["cached"] == (first["prompt_tokens"] - 1) // BLOCK * BLOCK > 0
    for first, second in zip(answers["plain"], answers["other"], strict=True):
        if first["prompt_tokens"] != second["prompt_tokens"]:
            assert second["cached"] == 0
