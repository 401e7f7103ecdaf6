# SPDX-License-Identifier: Apache-2.0
"""The conditional determinantal point process of CDPruner."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import cosines, pick_one_by_one
from vllm_vtprune.selection.ranked import take_first

# The least relevant token keeps a little, as in the paper's released code.
_LEAST = 1e-6
# Added to each token's similarity to itself: patches of D dimensions span at most D, and what is picked
# beyond that must not hang on rounding.
_JITTER = 1e-3


class CDPruner(SelectionMethod):
    """Keeps the tokens of largest conditional volume: relevant ones that are unlike (arXiv 2506.10967).

    A determinantal point process with the kernel r_i cos_ij r_j, r the relevance scaled to [0, 1] per image:
    its most probable set, found greedily by Cholesky updates (Chen, Zhang and Zhou, NeurIPS 2018). Smaller
    choices are part of larger ones. The relevance is that to the request's question; without a question it is
    the request's score. The paper measures similarity between projected tokens, this before the projector.
    How many stay is the settings' alone, so a question changes which tokens stay and not their number.
    """

    name = "cdpruner"
    ranks_by_score = True
    reads_question = True

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The first `counts[b]` picks, in raster order."""
        asked = pruning.features.relevance
        relevance = unit_range(pruning.scores if asked is None else asked.float())
        picks = most_volume(pruning.features.patches, relevance, max(counts))
        return take_first(picks, counts)


def unit_range(scores: Tensor) -> Tensor:
    """[B, N] scaled to at most 1, and a little above 0, per image; all ones where an image's are equal."""
    lowest = scores.amin(dim=-1, keepdim=True)
    span = scores.amax(dim=-1, keepdim=True) - lowest
    return ((scores - lowest) / span + _LEAST).masked_fill(span == 0, 1.0)


def most_volume(patches: Tensor, relevance: Tensor, steps: int) -> Tensor:
    """Greedy MAP of the determinantal point process.

    The relevance of a token scales its row of the Cholesky factor and nothing else, so it is left out of the
    factor and put on the gains, where it cannot cost precision.

    Args:
        patches: [B, N, D].
        relevance: [B, N], above 0.
        steps: how many tokens to pick.

    Returns:
        [B, steps] int64, in the order they were picked.
    """
    alike = cosines(patches, patches)
    volume = torch.diagonal(alike, dim1=1, dim2=2) + _JITTER
    weight = relevance.square()
    image = torch.arange(patches.shape[0], device=patches.device)
    rows: list[Tensor] = []

    def lower(_gains: Tensor, pick: Tensor) -> Tensor:
        nonlocal volume
        row = alike[image, pick]
        if rows:
            factor = torch.stack(rows, dim=1)
            row = row - torch.einsum("bt,btn->bn", factor[image, :, pick], factor)
        row = row / volume[image, pick].clamp(min=_JITTER / 2).sqrt().unsqueeze(1)
        rows.append(row)
        volume = (volume - row.square()).clamp(min=0.0)
        return weight * volume

    gains = weight * volume
    return pick_one_by_one(gains, gains.argmax(dim=-1), lower, steps)
