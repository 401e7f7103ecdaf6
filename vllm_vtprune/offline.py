# SPDX-License-Identifier: Apache-2.0
"""Offline use with vLLM's `LLM` class: the settings of operator and request, by the contract's names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_vtprune.contract import AUTO, KWARG
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.settings import Controls


def engine_kwargs(**policy: Any) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` (or `EngineArgs`) that carry the operator's settings.

    Example::

        llm = LLM(model, **engine_kwargs(prune_layer=8))

    Args:
        **policy: fields of `vllm_vtprune.policy.PrunePolicy`.

    Raises:
        vllm_vtprune.policy.PolicyError: an unknown field or a value that cannot work.
    """
    from vllm_vtprune.policy import CONFIG_KEY, PrunePolicy

    settings = PrunePolicy.from_config({CONFIG_KEY: policy})
    return {"additional_config": {CONFIG_KEY: settings.to_config()}}


def request_kwargs(
    question: str = "", first_turn: int = 0, **controls: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One request's settings: `mm_processor_kwargs` of its prompt and `extra_args` of its `SamplingParams`.

    Example::

        mm_kwargs, extra_args = request_kwargs(aggressiveness=0.5, kv_keep=0.5)

    `kv_keep` has an effect on an engine with a prune layer only; the caps of a server's policy do not apply,
    since the caller is the operator.

    Args:
        question: the text of the prompt's last turn, for a method that reads it (`cdpruner`); without it such
            a method goes by the picture alone.
        first_turn: on an engine with `kv_reuse`, of a later turn of a conversation: how many tokens the
            prompt of its first turn had, the placeholders of pictures counted as the engine does.
        **controls: `preset`, `aggressiveness`, `keep_ratio`, `method`, `kv_keep`, `kv_scope`,
            `kv_gate`, `kv_reuse`.

    Raises:
        vllm_vtprune.settings.SettingsError: an unknown field, a bad value, or two that exclude each other.
    """
    from vllm_vtprune.policy import PrunePolicy
    from vllm_vtprune.selection.registry import get_method

    asked = Controls.from_mapping(controls, where="request_kwargs")
    if asked.get("preset") == AUTO:
        name = asked.name("preset")
        raise SettingsError(
            f"{name} cannot be auto, which follows a server's load: name another preset.", name
        )
    # the engine's prune layers are not known here: resolve as if there were as many as may be
    settings = PrunePolicy(prune_layers="1,2,3,4").resolve(asked)
    vision = settings.vision
    if get_method(vision.method).reads_question:
        vision = vision.asking(question)
    return {KWARG: vision.canonical()}, replace(settings.kv, first_turn=first_turn).extra_args()
