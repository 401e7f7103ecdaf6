# SPDX-License-Identifier: Apache-2.0
"""What the plugin tells vLLM about itself: the model classes and the configuration check."""

from __future__ import annotations

import logging

from vllm_vtprune.compat import check_front_end, check_hooks, check_vllm_version
from vllm_vtprune.error_text import withhold_in_engine

logger = logging.getLogger(__name__)


def register_with_vllm() -> None:
    """Register model classes and configuration check. vLLM calls this in every process, maybe repeatedly.

    Hooks: `vllm.ModelRegistry.register_model` (replaces the built-in class of each architecture) and
    `vllm.model_executor.models.config.MODELS_CONFIG_MAP` (`VllmConfig.try_verify_and_update_config` runs
    the entry once, before an engine exists).
    """
    withhold_in_engine()
    try:
        check_vllm_version()
        check_front_end()
        check_hooks()

        from vllm import ModelRegistry

        from vllm_vtprune.engine_config import register_check
        from vllm_vtprune.families.registry import ARCHITECTURES, REFUSED
        from vllm_vtprune.weight_updates import refuse_reload_in_workers

        refuse_reload_in_workers()
        for architecture, entry in ARCHITECTURES.items():
            ModelRegistry.register_model(architecture, f"vllm_vtprune.models.{entry.model}")
            register_check(architecture)
        for architecture in REFUSED:
            register_check(architecture)
    except Exception:
        logger.exception("vtprune could not be registered with vLLM")
        raise
