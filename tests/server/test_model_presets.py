# SPDX-License-Identifier: Apache-2.0
"""Presets by model name, where the operator's names collide with ours or an adapter is loaded."""

from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry

from vllm_vtprune.policy import PrunePolicy
from vtprune_server.model_presets import add_preset_models


def serving(*names: str, adapters: tuple[str, ...] = ()) -> Any:
    paths = [BaseModelPath(name=name, model_path="/model") for name in names]
    return SimpleNamespace(base_model_paths=paths, lora_requests=dict.fromkeys(adapters))


def is_base_model(models: Any, name: str) -> bool:
    return bool(OpenAIModelRegistry.is_base_model(models, name))


def test_an_adapters_name_takes_no_preset() -> None:
    models = serving("m", adapters=("tuned",))
    assert add_preset_models(models, PrunePolicy()) == {
        "m:light": "light",
        "m:balanced": "balanced",
        "m:aggressive": "aggressive",
        "m:auto": "auto",
        "m--light": "light",
        "m--balanced": "balanced",
        "m--aggressive": "aggressive",
        "m--auto": "auto",
    }
    assert is_base_model(models, "m:balanced")
    assert not is_base_model(models, "tuned:balanced")
    assert not is_base_model(models, "m:thorough")


def test_a_name_the_operator_gave_stays_the_operators() -> None:
    models = serving("m", "m:light", adapters=("m:balanced",))
    added = add_preset_models(models, PrunePolicy())
    assert "m:light" not in added
    assert "m:balanced" not in added
    assert added["m:aggressive"] == "aggressive"
    assert added["m:light:balanced"] == added["m--balanced"] == "balanced"
