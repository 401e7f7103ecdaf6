# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 for vLLM without a vision tower of its own: the processor delivers projected embeddings.

The decoder is the one vLLM builds; with a prune layer, `vllm_vtprune.models.decoder` cuts it there.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.context import plugin_context
from vllm_vtprune.vision.processor import PrunedLlavaMultiModalProcessor


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaMultiModalProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`vllm.model_executor.models.llava.LlavaForConditionalGeneration`, language model only.

    The vision tower and the projector live in the API process (`vllm_vtprune.vision`); this class builds
    neither and skips their weights.
    """

    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # not LlavaForConditionalGeneration.__init__, which builds the tower
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        self.configure_mm_token_handling(
            vocab_size=config.text_config.vocab_size, mm_token_ids=[config.image_token_index]
        )
        with self._mark_language_model(vllm_config):
            self.language_model = initialize_model(
                vllm_config.with_hf_config(config.text_config),
                prefix=maybe_prefix(prefix, "language_model"),
            )
        if plugin_context(vllm_config.model_config).policy.has_prune_layer:
            from vllm_vtprune.models.decoder import add_prune_layers

            add_prune_layers(self, vllm_config)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """The processor's embeddings as they are: per image [k, hidden]."""
        embeddings = kwargs.get("image_embeds")
        return [] if embeddings is None else list(embeddings)  # type: ignore[call-overload]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the language model; the tower's and the projector's weights are the processor's."""
        loader = AutoWeightsLoader(
            self, ignore_unexpected_prefixes=["vision_tower.", "multi_modal_projector."]
        )
        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Module prefixes: there is no tower and no connector here."""
        return MultiModelKeys.from_string_field(language_model="language_model", connector=[], tower_model=[])
