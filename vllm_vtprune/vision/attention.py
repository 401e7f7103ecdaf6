# SPDX-License-Identifier: Apache-2.0
"""Reads the attention that patches receive out of any vision tower of transformers, without slowing it down.

Hook: `transformers.AttentionInterface`, through which the towers call their attention with queries and keys
after rotary embedding and normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The attention implementation to build a tower with.
READABLE = "vtprune_readable"
_SEEN = "vtprune_seen"
#: Elements of an attention matrix held at once, over all heads: 256 MB in float32 on a device. On a CPU 4 MB,
#: which stay in a core's cache: three times as fast as what goes through memory.
_ELEMENTS, _ELEMENTS_ON_CPU = 2**26, 2**20


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[B, N]: attention each of the N tokens receives, mean over heads and queries, in float32.

    Args:
        query: [B, heads, N, head].
        key: [B, heads, N, head].
        scaling: of their products.
    """
    query, keys = query.float(), (key.float() * scaling).transpose(-1, -2).contiguous()
    if query.device.type != "cpu":
        return _received(query, keys, _ELEMENTS)
    # one image at a time: parts of a size that company does not change, and so no rounding either
    alone = zip(query.split(1), keys.split(1), strict=True)
    return torch.cat([_received(*one, _ELEMENTS_ON_CPU) for one in alone])


def _received(query: Tensor, keys: Tensor, elements: int) -> Tensor:
    """`received_attention`, with scaled keys [B, heads, head, N] and at most so many logits at once."""
    batch, heads, tokens, _ = query.shape
    received = torch.zeros((batch, tokens), dtype=torch.float32, device=query.device)
    # a large picture's whole matrix would take gigabytes
    for rows in query.split(max(1, elements // (batch * heads * tokens)), dim=2):
        received += (rows @ keys).softmax(-1).sum((1, 2))
    return received / (heads * tokens)


def read_layers(outputs: frozenset[str], depth: int, readable: Sequence[int] = ()) -> dict[str, int]:
    """In which layer each of the wanted `received` and `received_midway` is read.

    `received` is of the last layer. `received_midway` is of HiPrune's object-centred one, the ninth of CLIP
    ViT-L's 24 (arXiv 2508.00553), which is 9/24 of another tower's depth.

    Args:
        outputs: of `families.base.OPTIONAL_OUTPUTS`.
        depth: layers of the tower.
        readable: those that attend over the whole picture, ascending; all where none is named.
    """
    layers = readable or range(depth)
    middle = max(round(depth * 9 / 24) - 1, 0)
    found = {
        "received": layers[-1],
        # of two that are as near the deeper one
        "received_midway": min(layers, key=lambda layer: (abs(layer - middle), -layer)),
    }
    return {name: layer for name, layer in found.items() if name in outputs}


@contextmanager
def reading(attentions: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """By name, what each call of its attention module in here lets each patch receive: [B, N]."""
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in attentions.values()}
    for module, calls in seen.items():
        setattr(module, _SEEN, calls)
    try:
        yield {name: seen[module] for name, module in attentions.items()}
    finally:
        for module in seen:
            delattr(module, _SEEN)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    calls: list[Tensor] | None = getattr(module, _SEEN, None)
    if calls is not None:
        calls.append(received_attention(query, key, kwargs["scaling"]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(READABLE, _attention)
AttentionMaskInterface.register(READABLE, sdpa_mask)
