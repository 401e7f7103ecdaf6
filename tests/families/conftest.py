# SPDX-License-Identifier: Apache-2.0
"""One tiny checkpoint of each family, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.family_checkpoints import CHECKPOINTS

Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A family's checkpoint by its name in `CHECKPOINTS`."""

    @cache
    def made(name: str) -> Path:
        return CHECKPOINTS[name](tmp_path_factory.mktemp(name) / name)

    return made


@pytest.fixture(scope="session")
def processor(checkpoint: Checkpoint) -> Callable[[str], Any]:
    """The processor that vLLM builds for a family's checkpoint, with the plugin loaded."""

    @cache
    def built(name: str) -> Any:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.multimodal import MULTIMODAL_REGISTRY
        from vllm.plugins import load_general_plugins
        from vllm.tokenizers import get_tokenizer

        load_general_plugins()
        folder = str(checkpoint(name))
        config = EngineArgs(
            folder, dtype="float32", max_model_len=2048, limit_mm_per_prompt={"image": 16}
        ).create_engine_config()
        return MULTIMODAL_REGISTRY.create_processor(config.model_config, tokenizer=get_tokenizer(folder))

    return built
