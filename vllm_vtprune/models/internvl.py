# SPDX-License-Identifier: Apache-2.0
"""InternVL in the engine, in Hugging Face and in chat format."""

from __future__ import annotations

from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.internvl import InternVLChatModel

from vllm_vtprune.models.pruned import PrunedModel, pruned


@pruned
class PrunedInternVL(PrunedModel, InternS1ForConditionalGeneration):
    """The class that vLLM serves `InternVLForConditionalGeneration` with."""


@pruned
class PrunedInternVLChat(PrunedModel, InternVLChatModel):
    """The format that InternVL is published in, whose configuration class comes with the checkpoint."""
