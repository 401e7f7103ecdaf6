# SPDX-License-Identifier: Apache-2.0
"""LLaVA-PruMerge."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod, required
from vllm_vtprune.selection.inflection import score_curve
from vllm_vtprune.selection.ops import best_first, complement, cosines
from vllm_vtprune.selection.scores import cls_attention

# Tokens added to each anchor, as in the paper's experiments.
_NEIGHBOURS = 32


class PruMerge(SelectionMethod):
    """Keeps the outliers of CLS attention, merges the rest into them, adds a summary (arXiv 2403.15388).

    Anchors are the patches whose attention lies above Q3 + 1.5 IQR. To each are added the 32 other tokens,
    kept or dropped, whose keys are most like its own, weighted by their attention; last comes the
    attention-weighted sum of all dropped tokens. The paper's attention is that of one softmax over all heads
    together, at the tower's last layer, and its tokens stand by falling attention; here it is the mean over
    heads at the feature layer, and they stand in raster order.

    `keep_ratio` fixes the count, the summary included. `aggressiveness` a replaces 1.5 by 1.5 a / (1 - a):
    the paper's rule at 0.5, fewer anchors above, and at most a quarter of the tokens however little above 0.
    Equal attention has no outliers: everything stays.
    """

    name = "prumerge"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention", "keys"})
    adds_tokens = True

    # Tokens kept for every outlier.
    density: ClassVar[int] = 1

    def counts(self, pruning: Pruning) -> Tensor:
        """Under `aggressiveness` the outliers and the summary, within min_tokens and N."""
        settings, tokens = pruning.settings, pruning.features.tokens
        if settings.keep_ratio is not None or settings.aggressiveness is None:
            return super().counts(pruning)
        outliers = outlier_counts(cls_attention(pruning.features), settings.aggressiveness)
        return (self.density * outliers + 1).clamp(min(settings.min_tokens, tokens), tokens)

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """Anchors with what was merged into them, and the summary; a count of 1 is one anchor."""
        attention = cls_attention(pruning.features)
        anchors = [
            self.anchors(order, max(count - 1, 1)).sort().values
            for order, count in zip(best_first(attention), counts, strict=True)
        ]
        keys = required(pruning.features.keys)
        images = zip(anchors, pruning.features.patches, attention, keys, counts, strict=True)
        return [_merge(*image) for image in images]

    def anchors(self, order: Tensor, count: int) -> Tensor:
        """[count] of one image's positions `order` [N], which is by falling attention."""
        return order[:count]


def outlier_counts(scores: Tensor, aggressiveness: float) -> Tensor:
    """[B] int64: how many of `scores` [B, N] exceed Q3 + 1.5 lambda IQR; N where all are equal.

    Quartiles are interpolated linearly. Multiplied by 1 - a, as lambda = a / (1 - a) may be infinite.
    """
    ranked = score_curve(scores).scores
    upper, lower = _from_top(ranked, 0.25), _from_top(ranked, 0.75)
    above = (1.0 - aggressiveness) * (ranked - upper) > 1.5 * aggressiveness * (upper - lower)
    constant = ranked[:, 0] == ranked[:, -1]
    return above.sum(dim=-1).masked_fill(constant, scores.shape[-1])


def _from_top(ranked: Tensor, share: float) -> Tensor:
    """[B, 1] the value below which 1 - `share` of the descending `ranked` [B, N] lie."""
    position = share * (ranked.shape[-1] - 1)
    at = int(position)
    after = min(at + 1, ranked.shape[-1] - 1)
    return torch.lerp(ranked[:, at : at + 1], ranked[:, after : after + 1], position - at)


def _merge(anchors: Tensor, patches: Tensor, attention: Tensor, keys: Tensor, count: int) -> Selection:
    tokens = patches.shape[0]
    values = patches.float()
    itself = torch.arange(tokens, device=patches.device).unsqueeze(0) == anchors.unsqueeze(1)
    alike = cosines(keys[anchors], keys).masked_fill(itself, -torch.inf)
    nearest = best_first(alike)[:, : min(_NEIGHBOURS, tokens - 1)]
    weights = torch.zeros(anchors.shape[0], tokens, device=patches.device)
    weights = weights.scatter(1, nearest, attention[nearest])
    merged = values[anchors] + weights @ values
    if count > anchors.shape[0]:
        dropped = complement(anchors, tokens)
        merged = torch.cat([merged, (attention[dropped] @ values[dropped]).unsqueeze(0)])
    return Selection(anchors, merged.to(patches.dtype))
