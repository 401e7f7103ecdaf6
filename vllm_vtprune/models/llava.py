# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 for vLLM without a vision tower of its own: the processor delivers projected embeddings.

The decoder is the one vLLM builds; with a prune layer, `vllm_vtprune.models.decoder` cuts it there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

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

if TYPE_CHECKING:
    from vllm_vtprune.kv_drop.bands import KVDropBands
    from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState


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
        if plugin_context(vllm_config.model_config).policy.prune_layer is not None:
            from vllm_vtprune.models.decoder import split

            split(self.language_model.model, vllm_config)
            # on the instance: vLLM takes the attribute's presence for a model with a state of its own
            self.get_model_state_cls = _model_state_class
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @property
    def kv_drop(self) -> KVDropBands:
        """The second stage's present step, where there is a prune layer."""
        return cast("KVDropBands", self.language_model.model.kv_drop)

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


def _model_state_class() -> type[KVDropModelState]:
    """The seam in Model Runner V2 (`vllm.v1.worker.gpu.model_states.resolve_model_state_cls`)."""
    from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState

    return KVDropModelState
