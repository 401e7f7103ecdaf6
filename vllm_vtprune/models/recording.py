# SPDX-License-Identifier: Apache-2.0
"""Queries and keys of the layer below a prune layer, copied where the prune layer reads them.

They are taken at the input of `vllm.model_executor.layers.attention.Attention.forward`, the one place
that every decoder of vLLM passes: after q/k norms, (M-)RoPE and Mistral's scaling. A forward hook would be
a side effect that a full-graph trace may lose, and a wrapper module would rename the layer's weights; so the
layer changes its class, and a custom operator that says what it writes does the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, library, nn
from vllm.utils.torch_utils import direct_register_custom_op

_LIBRARY = library.Library("vtprune", "FRAGMENT")


def record(query: Tensor, key: Tensor, into_query: Tensor, into_key: Tensor) -> None:
    """Copy a batch's queries and keys, [rows, ...] each, into the first rows of two buffers."""
    rows = query.shape[0]
    into_query[:rows].copy_(query.reshape(rows, -1))
    into_key[:rows].copy_(key.reshape(rows, -1))


direct_register_custom_op("record", record, mutates_args=["into_query", "into_key"], target_lib=_LIBRARY)


@cache
def _recording_attention(base: type[nn.Module]) -> type[nn.Module]:
    class RecordingAttention(base):  # type: ignore[misc, valid-type]
        """The attention layer, which first records what it is given."""

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            torch.ops.vtprune.record(query, key, self.recorded_query, self.recorded_key)
            output: Tensor = super().forward(query, key, value, *args, **kwargs)
            return output

    return RecordingAttention


@cache
def _recording_rotary(base: type[nn.Module]) -> type[nn.Module]:
    class RecordingRotary(base):  # type: ignore[misc, valid-type]
        """The rotary embedding, which first records what it is given: it may write in place."""

        def forward(self, positions: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            torch.ops.vtprune.record(query, key, self.recorded_query, self.recorded_key)
            return super().forward(positions, query, key, *args, **kwargs)

    return RecordingRotary


class Recorder:
    """What a prune layer knows of the decoder layer below it.

    Attributes:
        attention: that layer's `Attention`.
        query: its queries of the last batch, [max_tokens, heads, head_size]; this rank's heads.
        key: its keys, [max_tokens, kv_heads, head_size].
    """

    def __init__(
        self,
        layer: nn.Module,
        attention: Any,
        *,
        rotary: bool,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Have the layer record.

        Args:
            layer: a decoder layer of vLLM with `self_attn.rotary_emb`.
            attention: the `Attention` in it.
            rotary: record queries and keys after rotary embedding, as attention uses them; before it
                otherwise.
            max_tokens: rows of the largest batch.
            dtype: of queries and keys.
            device: of queries and keys.
        """
        self.attention = attention
        self.scale = float(attention.impl.scale)
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        with torch.inference_mode(False):
            query = torch.zeros(max_tokens, heads * size, dtype=dtype, device=device)
            key = torch.zeros(max_tokens, kv_heads * size, dtype=dtype, device=device)
        self.query, self.key = query.view(-1, heads, size), key.view(-1, kv_heads, size)
        if rotary:
            attention.recorded_query, attention.recorded_key = query, key
            attention.__class__ = _recording_attention(cast(Hashable, type(attention)))
        else:
            owner: Any = layer.self_attn
            # vLLM shares one rotary embedding between all layers (`get_rope`)
            own = copy.copy(owner.rotary_emb)
            own.recorded_query, own.recorded_key = query, key
            own.__class__ = _recording_rotary(cast(Hashable, type(own)))
            owner.rotary_emb = own
