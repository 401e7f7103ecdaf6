# SPDX-License-Identifier: Apache-2.0
"""A real engine configuration with a prune layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.helpers.model_inspection import inspect_here
from vllm_vtprune import engine_kwargs
from vllm_vtprune.plugin import register_with_vllm


def config(checkpoint: Path, *, policy: dict[str, Any] | None = None, **kwargs: Any) -> VllmConfig:
    inspect_here()
    register_with_vllm()
    asked = {"prune_layer": 2, **(policy or {})}
    arguments = EngineArgs(model=str(checkpoint), max_model_len=1024, **engine_kwargs(**asked), **kwargs)
    return arguments.create_engine_config()
