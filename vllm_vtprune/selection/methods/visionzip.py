# SPDX-License-Identifier: Apache-2.0
"""VisionZip."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod, required
from vllm_vtprune.selection.ops import best_first, complement, cosines, evenly, membership
from vllm_vtprune.selection.scores import cls_attention

# Dominant tokens of a budget: the paper's 54 of 64, 108 of 128, 162 of 192.
_DOMINANT = (27, 32)


class VisionZip(SelectionMethod):
    """Keeps dominant tokens and merges the others into a few contextual ones (arXiv 2412.04467).

    Dominant: the most attended by the CLS token, 27 of every 32 kept. Contextual: targets at an even stride
    over the rest, each the mean of itself and of the dropped tokens whose attention keys are most like its
    own. The contextual tokens follow the dominant ones. The paper counts the CLS token as a dominant one;
    here only patches are passed on.
    """

    name = "visionzip"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention", "keys"})
    adds_tokens = True

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """Dominant tokens as anchors, contextual tokens as summaries."""
        order = best_first(cls_attention(pruning.features))
        patches, keys = pruning.features.patches, required(pruning.features.keys)
        return [_zip(*image) for image in zip(order, patches, keys, counts, strict=True)]


def _zip(order: Tensor, patches: Tensor, keys: Tensor, count: int) -> Selection:
    share, whole = _DOMINANT
    dominant = order[: -(-count * share // whole)].sort().values
    rest = complement(dominant, patches.shape[0])
    contextual = count - dominant.shape[0]
    if contextual == 0:
        return Selection(dominant, patches[dominant])
    at = evenly(contextual, rest.shape[0], rest.device)
    targets, dropped = rest[at], rest[complement(at, rest.shape[0])]
    nearest = cosines(keys[dropped], keys[targets]).argmax(dim=-1)
    members = membership(nearest, contextual)
    merged = patches[targets].float() + members @ patches[dropped].float()
    merged = merged / (1.0 + members.sum(dim=1, keepdim=True))
    return Selection(dominant, torch.cat([patches[dominant], merged.to(patches.dtype)]))
