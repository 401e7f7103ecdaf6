# SPDX-License-Identifier: Apache-2.0
"""The start-up check: reads the operator's policy, refuses what cannot work, hands the policy on.

vLLM runs `PruneConfig.verify_and_update_config` once while it builds `VllmConfig`
(`VllmConfig.try_verify_and_update_config`), before any process of the engine starts. The multimodal
processor sees the `ModelConfig` alone, so what it needs is attached to that.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, cast

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from vllm_vtprune.context import PluginContext, attach_context
from vllm_vtprune.errors import CheckpointError, PolicyError, SettingsError, UnsupportedConfigError
from vllm_vtprune.families.base import Family
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.kv_drop.hooks.config import install, special_token_ids, with_schedule
from vllm_vtprune.policy import CONFIG_KEY, PrunePolicy
from vllm_vtprune.policy_fields import AUTO_METHOD
from vllm_vtprune.settings import AUTO_SCORE
from vllm_vtprune.vision.checkpoint import check_vision_weights
from vllm_vtprune.vision.features import check_servable, servable_methods
from vllm_vtprune.vision.gpu_budget import place_tower
from vllm_vtprune.vision.placement import check_encoder
from vllm_vtprune.vision.question import check_text_tower
from vllm_vtprune.vision.shared.channel import SUPPORTED
from vllm_vtprune.vision.shared.client import tower_folder
from vllm_vtprune.weight_updates import refuse_weight_transfer

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)


class PruneConfig(VerifyAndUpdateConfig):
    """Start-up check of every architecture in `families.registry`.

    Attributes:
        vllms: vLLM's own entry for the architecture, which runs first.
    """

    vllms: ClassVar[type[VerifyAndUpdateConfig]] = VerifyAndUpdateConfig

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the configuration and attach the plugin's context.

        Raises:
            PolicyError: `additional_config["vtprune"]` cannot work, with this model or at all.
            UnsupportedConfigError: an option of vLLM's, or a prune layer, that cannot work with this model.
            CheckpointError: the operator asks for pruning, and this checkpoint cannot be pruned.
        """
        cls.vllms.verify_and_update_config(vllm_config)
        model_config = vllm_config.model_config
        policy = PrunePolicy.from_config(vllm_config.additional_config)
        try:
            family = family_of(model_config.hf_config)
        except CheckpointError as error:
            if policy.asks_for_pruning:
                raise
            logger.warning("vtprune: %s It is served as by vLLM alone.", error)
            attach_context(model_config, PluginContext(policy=policy, prunes=False))
            return
        _refuse_conflicts(model_config, vllm_config)
        refuse_weight_transfer(vllm_config)
        device, dtype = check_encoder(policy, model_config)
        if policy.text_tower:
            check_text_tower(policy.text_tower, family)
        dummy = vllm_config.load_config.load_format == "dummy"
        if not dummy:
            check_vision_weights(
                model_config.model,
                family.rename,
                family.prefixes,
                revision=model_config.revision,
                download_dir=vllm_config.load_config.download_dir,
            )
        policy = policy_for(policy, family)
        special_ids = frozenset[int]()
        if policy.has_prune_layer:
            policy = with_schedule(
                policy,
                model_config,
                dummy_weights=dummy,
                download_dir=vllm_config.load_config.download_dir,
            )
            cast(dict[str, Any], vllm_config.additional_config)[CONFIG_KEY] = policy.to_config()
            install(vllm_config, policy)
            special_ids = special_token_ids(model_config)
        if policy.shares_tower:
            if not SUPPORTED:
                raise PolicyError(
                    "vtprune: tower 'shared' needs Linux, whose memfd_create shares memory between "
                    "processes: use in-process."
                )
            # before API processes are started, which inherit the variable that names it
            tower_folder()
        place = place_tower(vllm_config, policy, family, device, dtype)
        context = PluginContext(
            policy=policy,
            encoder_device=place.device,
            first_process=vllm_config.parallel_config._api_process_rank <= 0,
            video_gpu_gb=place.video_gpu_gb,
            dummy_weights=dummy,
            download_dir=vllm_config.load_config.download_dir,
            special_ids=special_ids,
        )
        attach_context(model_config, context)
        places = family.places()
        if places is not None and policy.min_tokens >= places:
            logger.warning(
                "vtprune: min_tokens is %d, and an image has %d vision tokens: none will be pruned.",
                policy.min_tokens,
                places,
            )

    @classmethod
    def verify_and_update_model_config(cls, model_config: ModelConfig) -> None:
        """VLLM's own entry's."""
        cls.vllms.verify_and_update_model_config(model_config)


def register_check(architecture: str) -> None:
    """Put the check into `MODELS_CONFIG_MAP`, before whatever vLLM has there. Idempotent."""
    vllms = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
    if not issubclass(vllms, PruneConfig):
        check = type(f"PruneConfig{architecture}", (PruneConfig,), {"vllms": vllms})
        MODELS_CONFIG_MAP[architecture] = check


def policy_for(policy: PrunePolicy, family: Family) -> PrunePolicy:
    """The policy with what this family's tower can serve.

    Raises:
        PolicyError: the operator names a score or methods that it cannot.
    """
    score = family.default_score if policy.score == AUTO_SCORE else policy.score
    # who named no methods means those that work
    every = policy.methods == PrunePolicy().methods
    methods = servable_methods(family) if every else policy.methods
    try:
        named = () if policy.default_method == AUTO_METHOD else (policy.default_method,)
        check_servable(family, score, (*methods, *named))
    except SettingsError as error:
        raise PolicyError(f"vtprune: {error}") from error
    policy = PrunePolicy(**{**policy.to_config(), "score": score, "methods": methods})
    method = policy.method_named_by_none(family.default_method)
    return PrunePolicy(**{**policy.to_config(), "default_method": method})


def _refuse_conflicts(model_config: ModelConfig, vllm_config: VllmConfig) -> None:
    mm_config = model_config.get_multimodal_config()
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        raise UnsupportedConfigError(
            "vtprune: cudagraph_mm_encoder captures the engine's vision tower, and with vtprune it has none; "
            "leave it out."
        )
    if mm_config.is_multimodal_pruning_enabled():
        raise UnsupportedConfigError(
            "vtprune: vLLM's own video pruning changes the embeddings of images too; leave out "
            "--video-pruning-rate, or set VLLM_PLUGINS='' to run without vtprune."
        )
