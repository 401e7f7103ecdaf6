# SPDX-License-Identifier: Apache-2.0
"""The evaluation gets the same replies from the real server as from transformers."""

from __future__ import annotations

import httpx
import pytest

from tests.conftest import DEMO_MODEL
from vllm_vtprune.settings import KVSettings, VisionSettings
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.setting import Setting
from vtprune_eval.tasks import drawn_questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner

SETTINGS = [
    Setting(),
    Setting(VisionSettings(aggressiveness=0.5)),
    Setting(VisionSettings(method="divprune", aggressiveness=None, keep_ratio=0.22)),
    Setting(kv=KVSettings(0.5)),
    Setting(VisionSettings(aggressiveness=0.4), KVSettings(0.5, "vision")),
]


@pytest.mark.engine
def test_the_server_answers_as_transformers_does(server: str) -> None:
    model = LocalModel(str(DEMO_MODEL))
    questions = drawn_questions("test", 4, model.image_size)
    local, remote = LocalRunner(model, questions, frozenset()), RemoteRunner(server, questions)
    config = httpx.get(f"{server}/vtprune/config", timeout=60).json()
    layer = config["policy"]["prune_layer"]
    for setting in SETTINGS:
        here = Setting(setting.vision, setting.kv, layer if setting.kv.drops else None)
        assert remote.answer(setting) == local.answer(here), setting.label
    baseline = SETTINGS[1].baseline("uniform")
    assert remote.answer(baseline) == local.answer(baseline)
