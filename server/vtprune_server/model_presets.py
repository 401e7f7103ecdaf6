# SPDX-License-Identifier: Apache-2.0
"""Presets by model name, for clients that can send no headers: `MODEL:balanced`, `MODEL--balanced`, ...

The second form is for what takes a colon for a tag or a port of its own.

Each is one more name of the base model (`OpenAIServingModels.base_model_paths`), so `/v1/models` lists it and
vLLM accepts it wherever it accepts the model; every other name, `ADAPTER:balanced` included, stays a 404.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from vllm_vtprune.contract import AUTO, PRESETS
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.settings import Controls

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels


_SEPARATORS = (":", "--")


def add_preset_models(models: OpenAIServingModels, policy: PrunePolicy) -> dict[str, str]:
    """Add the names of the presets that the policy allows.

    Args:
        models: vLLM's; its list of base models is extended in place.
        policy: presets beyond its caps are left out, and all of them where clients may not choose.

    Returns:
        The preset of each added name.
    """
    taken = {path.name for path in models.base_model_paths} | set(models.lora_requests)
    added: dict[str, str] = {}
    for path, separator, preset in product(tuple(models.base_model_paths), _SEPARATORS, (*PRESETS, AUTO)):
        name = f"{path.name}{separator}{preset}"
        # where nothing is pruned by default, MODEL itself is MODEL:off
        redundant = preset == "off" and policy.default_preset == "off"
        if redundant or name in taken or not _allowed(preset, policy):
            continue
        models.base_model_paths.append(type(path)(name=name, model_path=path.model_path))
        added[name] = preset
    return added


def _allowed(preset: str, policy: PrunePolicy) -> bool:
    try:
        policy.resolve(Controls.from_mapping({"preset": preset}))
    except SettingsError:
        return False
    return True
