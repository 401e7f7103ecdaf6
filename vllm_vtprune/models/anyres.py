# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and LLaVA-OneVision in the engine."""

from __future__ import annotations

from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from vllm_vtprune.models.pruned import PrunedModel, pruned


@pruned
class PrunedLlavaNext(PrunedModel, LlavaNextForConditionalGeneration):
    """`image_newline` stays a parameter of the class, on no device and unused: the embeddings hold it."""


@pruned
class PrunedLlavaOnevision(PrunedModel, LlavaOnevisionForConditionalGeneration):
    """As LLaVA-NeXT; where videos may be asked for, the engine keeps its tower for them."""
