# SPDX-License-Identifier: Apache-2.0
"""Three-dimensional positions of a thinned prompt: those its tokens have in the unpruned one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_vtprune.vision.placeholders import KEPT

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
        kept = _mask(feature)
        if kept is not None and not bool(kept.all()):
            # ranges of these families hold embeddings only, and one token stands for all of them
            whole, stayed = [input_tokens[start]] * len(kept), kept.tolist()
        features.append(dataclasses.replace(feature, mm_position=PlaceholderRange(len(tokens), len(whole))))
        tokens += whole
        stays += stayed
    tokens += input_tokens[at:]
    stays += [True] * (len(input_tokens) - at)
    positions, delta = ask(tokens, features)
    if len(tokens) == len(input_tokens):
        return positions, delta
    return positions[:, torch.tensor(stays)], delta + len(tokens) - len(input_tokens)


def _mask(feature: MultiModalFeatureSpec) -> Tensor | None:
    if feature.data is None or KEPT not in feature.data:
        return None
    kept = feature.data[KEPT].data
    assert isinstance(kept, Tensor)
    return kept
