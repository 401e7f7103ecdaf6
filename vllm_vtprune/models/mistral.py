# SPDX-License-Identifier: Apache-2.0
"""Mistral-Small 3.x in Hugging Face format in the engine."""

from __future__ import annotations

from vllm.model_executor.models.mistral3 import Mistral3ForConditionalGeneration

from vllm_vtprune.models.pruned import PrunedModel, pruned


@pruned
class PrunedMistral3(PrunedModel, Mistral3ForConditionalGeneration):
    """`[IMG_BREAK]` and `[IMG_END]` of the placeholder are the language model's own tokens and all stay."""
