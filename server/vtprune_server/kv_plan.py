# SPDX-License-Identifier: Apache-2.0
"""What the second stage does to a rendered prompt, as scheduler and worker will decide it too."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_vtprune.kv_drop import metrics
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.hooks.requests import embedded_ranges
from vllm_vtprune.kv_drop.plan import KVDropConfig, PromptPlan, plan_prompt
from vllm_vtprune.kv_drop.schedule import band_groups, band_sizes
from vllm_vtprune.settings import KVSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class KVPlanner:
    """The second stage of a server with a prune layer.

    Attributes:
        config: as every process reads it.
        block_size: tokens of a KV-cache block.
        groups: KV-cache groups of the band above each prune layer.
    """

    config: KVDropConfig
    block_size: int
    groups: tuple[int, ...]

    @staticmethod
    def of(vllm_config: VllmConfig) -> KVPlanner:
        """Read it off the engine's configuration, which must have a prune layer."""
        config = kv_drop_config(vllm_config)
        layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        groups, _ = band_groups(band_sizes(layers, config.prune_layers))
        return KVPlanner(config, vllm_config.cache_config.block_size, tuple(groups[1:]))

    def plan(
        self, engine_input: Mapping[str, Any], settings: KVSettings, prompt_logprobs: int | None
    ) -> PromptPlan:
        """The plan of a prompt as vLLM's renderer returns it."""
        placeholders = (engine_input.get("mm_placeholders") or {}).values()
        return plan_prompt(
            engine_input.get("prompt_token_ids"),
            embedded_ranges(itertools.chain.from_iterable(placeholders)),
            settings,
            self.config,
            prompt_logprobs=prompt_logprobs,
            has_prompt_embeds="prompt_embeds" in engine_input,
        )

    def by_layer(self, plan: PromptPlan) -> tuple[int, ...]:
        """Tokens of a prompt above each prune layer; all of them where it is served whole."""
        layers = len(self.config.schedule)
        kept = plan.kept_by_layer if len(plan.kept_by_layer) == layers else (plan.kept,) * layers
        return tuple(tokens + plan.behind for tokens in kept)

    def count(self, plan: PromptPlan) -> None:
        """Count a prompt that was answered."""
        metrics.count(plan, block_size=self.block_size, groups=self.groups)
        for layer, kept in zip(self.config.prune_layers, self.by_layer(plan), strict=True):
            metrics.BAND_TOKENS.labels(str(layer)).inc(kept)
