# SPDX-License-Identifier: Apache-2.0
"""The inflection rule with a diverse choice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import cosines, pick_one_by_one
from vllm_vtprune.selection.ranked import take_first


class InflectionDiverse(SelectionMethod):
    """The inflection point decides how many; importance and diversity together decide which.

    The highest-scored token is kept and the scores of tokens like it are lowered, again and again: the
    pattern of ID-Selection (arXiv 2604.05601), with a suppression of our own. A token's score, scaled to [0,
    1] per image, is multiplied by 1 - c / 2, c the cosine to the pick most like it, at least 0, after the
    image's mean patch is taken away: the direction all patches share would otherwise make every pair look
    alike. Halved at most, and once: a product over all picks drives every token of an object to zero, and
    what is left to pick is background.
    """

    name = "inflection_diverse"
    ranks_by_score = True

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The first `counts[b]` picks, in raster order."""
        scores = pruning.scores
        lowest = scores.amin(dim=-1, keepdim=True)
        span = scores.amax(dim=-1, keepdim=True) - lowest
        importance = ((scores - lowest) / span).masked_fill(span == 0, 1.0)
        patches = pruning.features.patches.float()
        centred = patches - patches.mean(dim=1, keepdim=True)
        alike = cosines(centred, centred).clamp(min=0.0)
        nearest = torch.zeros_like(importance)
        image = torch.arange(scores.shape[0], device=scores.device)

        def lower(_values: Tensor, pick: Tensor) -> Tensor:
            torch.maximum(nearest, alike[image, pick], out=nearest)
            return importance * (1.0 - nearest / 2)

        picks = pick_one_by_one(importance, importance.argmax(dim=-1), lower, max(counts))
        return take_first(picks, counts)
