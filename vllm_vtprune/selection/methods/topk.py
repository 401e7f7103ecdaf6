# SPDX-License-Identifier: Apache-2.0
"""The k best tokens."""

from torch import Tensor

from vllm_vtprune.selection.base import Pruning
from vllm_vtprune.selection.ranked import RankedMethod


class TopK(RankedMethod):
    """Keeps the k tokens of highest score: with `keep_ratio`, the fixed-share counterpart of `inflection`.

    The count is the settings' for every method, so under `aggressiveness` this keeps what `inflection` keeps.
    """

    name = "topk"
    ranks_by_score = True

    def rank(self, pruning: Pruning) -> Tensor:
        """[B, N] the request's score."""
        return pruning.scores
