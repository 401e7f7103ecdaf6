# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 in the engine.

With a prune layer the decoder is the one of `vllm_vtprune.models.llama`; without one it is vLLM's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from vllm_vtprune.context import plugin_context
from vllm_vtprune.models.pruned import PrunedModel, pruned

if TYPE_CHECKING:
    from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState
    from vllm_vtprune.kv_drop.step import KVDropState
    from vllm_vtprune.models.llama import KVDropLlamaModel

_DECODER = "KVDropLlamaForCausalLM"


@pruned
class PrunedLlava(PrunedModel, LlavaForConditionalGeneration):
    """`vllm.model_executor.models.llava.LlavaForConditionalGeneration`, without its tower and projector."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        drops = plugin_context(vllm_config.model_config).policy.prune_layer is not None
        if drops:
            # the decoder in two halves: `init_vllm_registered_model` builds what the text's config names
            ModelRegistry.register_model(_DECODER, f"vllm_vtprune.models.llama:{_DECODER}")
            vllm_config.model_config.hf_config.text_config.architectures = [_DECODER]
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if drops:
            # on the instance: vLLM takes the attribute's presence for a model with a state of its own
            self.get_model_state_cls = _model_state_class

    @property
    def kv_drop(self) -> KVDropState:
        """The second stage's present step, where there is a prune layer."""
        return cast("KVDropLlamaModel", self.language_model.model).kv_drop


def _model_state_class() -> type[KVDropModelState]:
    """The seam in Model Runner V2 (`vllm.v1.worker.gpu.model_states.resolve_model_state_cls`)."""
    from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState

    return KVDropModelState
