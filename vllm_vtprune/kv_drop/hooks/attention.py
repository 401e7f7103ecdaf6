# SPDX-License-Identifier: Apache-2.0
"""Attention metadata above the prune layer, by wrapping whichever backend vLLM picked.

Hooks of vLLM 0.32: `subclass_attention_backend`, made for this, and `AttentionMetadataBuilder.build`. The
layers and their kernels are vLLM's own; only the batch they are told about is the compacted one.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from vllm_vtprune.kv_drop.step import KVDropState

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

_ATTRIBUTE = "kv_drop_state"


@cache
def dropping_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The same backend with a metadata builder that compacts each batch. One class per backend."""
    base: Any = backend.get_builder_cls()

    class KVDropBuilder(base):  # type: ignore[misc]
        """The backend's builder, given the batch as the layers above the prune layer see it."""

        def __init__(
            self,
            kv_cache_spec: AttentionSpec,
            layer_names: list[str],
            vllm_config: VllmConfig,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            self._state: KVDropState = getattr(layer, _ATTRIBUTE)
            self._names = list(layer_names)
            if self._state.gated:
                # Model Runner V1 would copy another group's metadata, which nothing could make again
                self.supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> Any:
            """At most decode-only batches: where a prompt is pruned, shapes change midway."""
            support: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda s: s.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            """Metadata for the rows that reach these layers; made again where a gate changes them."""

            def made() -> Any:
                compacted = self._state.compact(common_attn_metadata)
                return super(KVDropBuilder, self).build(common_prefix_len, compacted, *args, **kwargs)

            if self._state.repeatable:
                self._state.built.append(lambda: (self._names, made()))
            return made()

    return subclass_attention_backend("KVDrop", backend, KVDropBuilder)


def adopt_layer(layer: nn.Module, state: KVDropState) -> None:
    """Have a `vllm.model_executor.layers.attention.Attention` above the prune layer use the compacted batch.

    vLLM asks the layer for its backend when it sets up metadata builders (`Attention.get_attn_backend`).
    """
    setattr(layer, _ATTRIBUTE, state)
    layer.attn_backend = dropping_backend(layer.attn_backend)  # type: ignore[assignment]
