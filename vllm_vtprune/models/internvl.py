# SPDX-License-Identifier: Apache-2.0
"""InternVL in Hugging Face format in the engine."""

from __future__ import annotations

from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration

from vllm_vtprune.models.pruned import PrunedModel, pruned


@pruned
class PrunedInternVL(PrunedModel, InternS1ForConditionalGeneration):
    """The class that vLLM serves `InternVLForConditionalGeneration` with."""
