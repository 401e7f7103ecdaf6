# SPDX-License-Identifier: Apache-2.0
"""LLaVA-PruMerge+."""

import torch
from torch import Tensor

from vllm_vtprune.selection.methods.prumerge import PruMerge
from vllm_vtprune.selection.ops import complement, evenly


class PruMergePlus(PruMerge):
    """PruMerge with three evenly spaced tokens for every outlier, so that the whole image is covered.

    A quarter of the anchors are the most attended patches; the others lie at an even stride over the rest
    (arXiv 2403.15388, section on PruMerge+). Under `aggressiveness` four times the outliers stay, and the
    summary.
    """

    name = "prumerge_plus"
    density = 4

    def anchors(self, order: Tensor, count: int) -> Tensor:
        """[count] positions: the most attended first, then the evenly spaced."""
        attended = order[: -(-count // self.density)]
        rest = complement(attended, order.shape[0])
        spread = evenly(count - attended.shape[0], rest.shape[0], order.device)
        return torch.cat([attended, rest[spread]])
