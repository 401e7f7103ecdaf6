# SPDX-License-Identifier: Apache-2.0
"""The start-up check: reads the operator's policy, refuses what cannot work, hands the policy on.

vLLM runs `LlavaPruneConfig.verify_and_update_config` once while it builds `VllmConfig`
(`VllmConfig.try_verify_and_update_config`), before any process of the engine starts. The multimodal
processor sees the `ModelConfig` alone, so what it needs is attached to that.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from transformers import LlavaConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_vtprune.context import PluginContext, attach_context
from vllm_vtprune.kv_drop.hooks.config import install, special_token_ids
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.vision.encoder import feature_layer_index, patch_grid
from vllm_vtprune.vision.service import check_encoder

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class LlavaPruneConfig(VerifyAndUpdateConfig):
    """Start-up check for `LlavaForConditionalGeneration`."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the configuration and attach the plugin's context.

        Raises:
            PolicyError: `additional_config["vtprune"]` cannot work.
            UnsupportedConfigError: a prune layer that cannot work with this model or configuration.
            CheckpointError: the tower is not a CLIP tower, or its feature layers are not supported.
        """
        model_config = vllm_config.model_config
        hf_config = cast(LlavaConfig, model_config.hf_config)
        rows, columns = patch_grid(hf_config)
        feature_layer_index(hf_config)
        policy = PrunePolicy.from_config(vllm_config.additional_config)
        check_encoder(policy)
        special_ids = frozenset[int]()
        if policy.prune_layer is not None:
            install(vllm_config, policy)
            special_ids = special_token_ids(model_config)
        context = PluginContext(
            policy=policy,
            dummy_weights=vllm_config.load_config.load_format == "dummy",
            download_dir=vllm_config.load_config.download_dir,
            # "full" hands CLS to the language model too
            vision_tokens=rows * columns + (hf_config.vision_feature_select_strategy == "full"),
            special_ids=special_ids,
        )
        attach_context(model_config, context)
        if policy.min_tokens >= context.vision_tokens:
            logger.warning(
                "vtprune: min_tokens is %d, and an image has %d vision tokens: none will be pruned.",
                policy.min_tokens,
                context.vision_tokens,
            )
