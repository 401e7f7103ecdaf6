# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL, Qwen3-VL and Qwen3.5 in the engine. Kept tokens keep their true three-dimensional positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models import qwen3_5, qwen3_vl, qwen3_vl_moe
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from vllm_vtprune.families.qwen_vl import Qwen3VL
from vllm_vtprune.models.pruned import PrunedModel, pruned

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@pruned
class PrunedQwen2_5VL(PrunedModel, Qwen2_5_VLForConditionalGeneration):
    """Its rotary table holds four times the longest prompt (`vllm...rotary_embedding.mrope`)."""


@pruned
class PrunedQwen3VL(PrunedModel, Qwen3VLForConditionalGeneration):
    """Deepstack levels come side by side with the embeddings, as the class's own tower returns them."""


@pruned
class PrunedQwen3VLMoe(PrunedModel, Qwen3VLMoeForConditionalGeneration):  # type: ignore[misc]
    """As the dense one."""


@pruned
class PrunedQwen3_5(PrunedModel, Qwen3_5ForConditionalGeneration):
    """Gated DeltaNet layers between those with attention: the second stage is refused."""


@pruned
class PrunedQwen3_5Moe(PrunedModel, Qwen3_5MoeForConditionalGeneration):  # type: ignore[misc]
    """As the dense one."""


_vllms_factor = qwen3_vl.mrope_positions_factor


def _positions_factor(vllm_config: VllmConfig) -> int:
    model = vllm_config.model_config
    ours = Qwen3VL.table_factor(model.max_model_len, model.hf_text_config.max_position_embeddings)
    return max(ours, _vllms_factor(vllm_config))


# Hook: `qwen3_vl.mrope_positions_factor`, by which these decoders size their rotary table. vLLM answers 1, as
# its positions never exceed the tokens unless its own video pruning is on. Ours do: dropped tokens leave gaps
# behind them.
qwen3_vl.mrope_positions_factor = _positions_factor
qwen3_vl_moe.mrope_positions_factor = _positions_factor
qwen3_5.mrope_positions_factor = _positions_factor
