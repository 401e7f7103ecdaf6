# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 in the engine."""

from __future__ import annotations

from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from vllm_vtprune.models.pruned import PrunedModel, pruned


@pruned
class PrunedLlava(PrunedModel, LlavaForConditionalGeneration):
    """`vllm.model_executor.models.llava.LlavaForConditionalGeneration`, without its tower and projector."""
