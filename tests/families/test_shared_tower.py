# SPDX-License-Identifier: Apache-2.0
"""Each family's processor with its tower behind a channel: the same embeddings, keys and placeholders."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.test_adapters import picture
from tests.helpers.family_cases import CLIP, VIDEO_FAMILIES
from tests.helpers.family_checkpoints import CHECKPOINTS
from vllm_vtprune import request_kwargs
from vllm_vtprune.vision import processor as module
from vllm_vtprune.vision.shared.client import SharedTower
from vllm_vtprune.vision.shared.process import Recipe, TowerProcess

SIZES = [(330, 120), (90, 400), (200, 200)]
SETTINGS: list[dict[str, Any]] = [{}, {"keep_ratio": 0.3}, {"keep_ratio": 0.3, "method": "random"}]
SETTINGS.append({"keep_ratio": 0.3, "method": "inflection_temporal"})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_tower_behind_a_channel_gives_what_one_here_does(
    name: str, processor: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = processor(name)
    service = ours.vision
    data: dict[str, Any] = {"image": [picture(size, seed=9) for size in SIZES]}
    if name in VIDEO_FAMILIES:
        # of which OneVision takes the frames alone
        data["video"] = [CLIP[0] if name == "llava_onevision" else CLIP]
    items = ours.info.parse_mm_data(data)
    text = ours.dummy_inputs.get_dummy_text({modality: len(media) for modality, media in data.items()})

    def run(settings: dict[str, Any]) -> Any:
        kwargs, _ = request_kwargs(**settings)
        return ours(text, items, hf_processor_mm_kwargs=kwargs)

    expected = [run(settings) for settings in SETTINGS]
    service.cache.clear()
    process = TowerProcess(lambda _: service)
    thread = threading.Thread(target=process.listen, args=(tmp_path / "cpu.sock", 0.2), daemon=True)
    thread.start()
    recipe = Recipe(None, "", {"device": service.device, "dtype": service.dtype}, 0, True, 16, 0)
    while not (tmp_path / "cpu.sock").exists():
        pass
    tower = SharedTower(tmp_path, "cpu", recipe)
    monkeypatch.setattr(module, "vision_service", lambda _: tower)
    found = [run(settings) for settings in SETTINGS]
    for was, now in zip(expected, found, strict=True):
        assert now["prompt_token_ids"] == was["prompt_token_ids"]
        assert now["mm_hashes"] == was["mm_hashes"]
        pairs = [zip(was["mm_kwargs"][m], now["mm_kwargs"][m], strict=True) for m in data]
        for left, right in itertools.chain(*pairs):
            assert left.keys() == right.keys()
            for key in left:
                assert torch.equal(torch.as_tensor(left[key].data), torch.as_tensor(right[key].data)), key
    tower._forget()
    thread.join(10)
    assert not thread.is_alive()
