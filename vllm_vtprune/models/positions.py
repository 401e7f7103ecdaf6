# SPDX-License-Identifier: Apache-2.0
"""Three-dimensional positions of a thinned prompt: those its tokens have in the unpruned one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_vtprune.vision.placeholders import FIELDS

Ask = Callable[[list[int], list[MultiModalFeatureSpec]], tuple[Tensor, int]]


def restore_positions(
    ask: Ask, input_tokens: list[int], mm_features: Sequence[MultiModalFeatureSpec]
) -> tuple[Tensor, int]:
    """Put the dropped placeholders back, ask the model's own class, and keep the columns that stayed.

    Args:
        ask: `SupportsMRoPE.get_mrope_input_positions` of the model's own class in vLLM.
        input_tokens: the thinned prompt, with generated tokens behind it when a preempted request resumes.
        mm_features: its images and videos, of which a prefix-cache hit leaves the CPU fields only.

    Returns:
        Positions [3, n] of the n tokens, and what to add to a token's number for those that follow: the next
        one comes after the unpruned prompt.
    """
    tokens: list[int] = []
    stays: list[bool] = []
    features: list[MultiModalFeatureSpec] = []
    at = 0
    for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
        start, length = feature.mm_position.offset, feature.mm_position.length
        tokens += input_tokens[at:start]
        stays += [True] * (start - at)
        at = start + length
        whole, stayed = input_tokens[start:at], [True] * length
        kept, layout = _masks(feature)
        if kept is not None and not bool(kept.all()):
            whole, stayed = _unpruned(whole, kept, layout)
        features.append(dataclasses.replace(feature, mm_position=PlaceholderRange(len(tokens), len(whole))))
        tokens += whole
        stays += stayed
    tokens += input_tokens[at:]
    stays += [True] * (len(input_tokens) - at)
    positions, delta = ask(tokens, features)
    if len(tokens) == len(input_tokens):
        return positions, delta
    return positions[:, torch.tensor(stays)], delta + len(tokens) - len(input_tokens)


def _unpruned(thinned: list[int], kept: Tensor, layout: Tensor | None) -> tuple[list[int], list[bool]]:
    """The tokens of an item before pruning, and which of them stayed.

    Args:
        thinned: those that stayed.
        kept: bool [T] over its places.
        layout: bool [tokens], which of the unpruned tokens are places; None: all.
    """
    places = torch.ones(len(kept), dtype=torch.bool) if layout is None else layout
    stays = ~places
    stays[places] = kept
    tokens = torch.tensor(thinned)
    # one token stands for all places
    whole = torch.full((len(places),), int(tokens[places[stays]][0]))
    whole[stays] = tokens
    return whole.tolist(), stays.tolist()


def _masks(feature: MultiModalFeatureSpec) -> tuple[Tensor | None, Tensor | None]:
    """Of an item, which places stayed, and which tokens are places; None where nothing says."""
    names, data = FIELDS.get(feature.modality), feature.data
    if names is None or data is None or names.kept not in data:
        return None, None
    kept: Any = data[names.kept].data
    layout: Any = data[names.layout].data if names.layout in data else None
    return kept, layout
