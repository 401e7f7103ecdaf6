# SPDX-License-Identifier: Apache-2.0
"""The default method."""

from torch import Tensor

from vllm_vtprune.selection.base import Pruning
from vllm_vtprune.selection.ranked import RankedMethod


class Inflection(RankedMethod):
    """Keeps the tokens before the inflection point of the image's sorted scores.

    After arXiv 2409.01162, whose code is not public: the rule is our reading. The image decides how many: see
    `selection.inflection`. The score is the request's.
    """

    name = "inflection"
    ranks_by_score = True

    def rank(self, pruning: Pruning) -> Tensor:
        """[B, N] the request's score."""
        return pruning.scores
