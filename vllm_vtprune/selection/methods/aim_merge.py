# SPDX-License-Identifier: Apache-2.0
"""The merging stage of AIM."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import best_first, cosines, membership


class AimMerge(SelectionMethod):
    """Merges the most similar tokens, round by round, until the count is reached (AIM, arXiv 2412.03248).

    Each round is ToMe's bipartite matching (arXiv 2210.09461): every other token is a source, its partner the
    most similar of the others, and the most similar pairs are averaged, at most half of the tokens per round.
    An average counts every patch once. A merged token stands where its last-round target stood. AIM merges
    after the projector; here before it, so that only kept tokens are projected. Its pruning inside the
    language model is not part of this method.
    """

    name = "aim_merge"

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """Every kept token is a mean of patches; `indices` are where they stand."""
        return [_merge_to(*image) for image in zip(pruning.features.patches, counts, strict=True)]


def _merge_to(patches: Tensor, count: int) -> Selection:
    tokens = patches.float()
    sizes = torch.ones_like(tokens[:, :1])
    places = torch.arange(patches.shape[0], device=patches.device)
    while tokens.shape[0] > count:
        fewer = min(tokens.shape[0] - count, tokens.shape[0] // 2)
        tokens, sizes, places = _round(tokens, sizes, places, fewer)
    return Selection(places, tokens.to(patches.dtype))


def _round(tokens: Tensor, sizes: Tensor, places: Tensor, fewer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the `fewer` most similar pairs of tokens [n, D], sizes [n, 1], places [n]; raster order stays."""
    sources, targets = slice(0, None, 2), slice(1, None, 2)
    similarity = cosines(tokens[sources], tokens[targets])
    order = best_first(similarity.amax(dim=-1))
    merged, kept = order[:fewer], order[fewer:]
    members = membership(similarity.argmax(dim=-1)[merged], similarity.shape[1])
    target_sizes = sizes[targets] + members @ sizes[sources][merged]
    sums = (tokens * sizes)[targets] + members @ (tokens * sizes)[sources][merged]
    remaining = torch.cat([places[sources][kept], places[targets]])
    raster = remaining.argsort()
    return (
        torch.cat([tokens[sources][kept], sums / target_sizes])[raster],
        torch.cat([sizes[sources][kept], target_sizes])[raster],
        remaining[raster],
    )
