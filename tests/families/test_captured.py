# SPDX-License-Identifier: Apache-2.0
"""Which families' passes are captured as CUDA graphs, and that a captured pass is the pass."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.families.conftest import Checkpoint
from tests.families.test_adapters import SIZES, picture
from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.recorded_passes import Recorder
from vllm_vtprune.families.base import OPTIONAL_OUTPUTS, TowerOutput
from vllm_vtprune.vision.encoder import VisionEncoder

CAPTURED = ("llava_next", "llava_onevision", "llava_siglip", "internvl", "internvl_chat")


def assert_same(found: TowerOutput, expected: TowerOutput) -> None:
    assert found.views == expected.views and found.outputs == expected.outputs
    for name in ("patches", "cls", *sorted(found.outputs)):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) is (theirs is None)
        if mine is not None:
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_captured_tower_gives_what_it_gives_uncaptured(
    name: str, checkpoint: Checkpoint, processor: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, recorder = processor(name), Recorder()
    plain = ours.vision.encoder
    with caplog.at_level(logging.INFO, logger="vllm_vtprune"):
        captured = VisionEncoder.load(
            ours.info.ctx.model_config.hf_config,
            str(checkpoint(name)),
            device=plain.device,
            dtype=plain.dtype,
            graphs=3,
            record=recorder,
        )
    assert ("without CUDA graphs: its pictures differ in size" in caplog.text) is (name not in CAPTURED)
    items = ours.preprocessing.together("image", [picture(size, seed=9) for size in SIZES], {})
    for outputs in (*captured.family.usual_outputs(), OPTIONAL_OUTPUTS & captured.family.outputs):
        first = captured.encode(items[:2], outputs)
        before = recorder.replays
        for batch in (items, items[3:4]):
            for found, expected in zip(
                captured.encode(batch, outputs), plain.encode(batch, outputs), strict=True
            ):
                assert_same(found, expected)
        # tiles and pictures beyond the largest graph take several
        usual = outputs in captured.family.usual_outputs()
        assert (recorder.replays - before > 2) is (name in CAPTURED and usual)
        # what an earlier pass gave is as it was
        for found, expected in zip(first, plain.encode(items[:2], outputs), strict=True):
            assert_same(found, expected)
