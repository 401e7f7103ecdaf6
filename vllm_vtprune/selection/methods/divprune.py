# SPDX-License-Identifier: Apache-2.0
"""DivPrune."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import cosines, pick_one_by_one
from vllm_vtprune.selection.ranked import take_first


class DivPrune(SelectionMethod):
    """Keeps tokens as unlike each other as can be: greedy max-min cosine distance (arXiv 2503.02175).

    Starts with the token farthest from its nearest neighbour; each next one is the token farthest from all
    picked. The paper measures after the projector; here before it, so that only kept tokens are projected.
    """

    name = "divprune"

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The first `counts[b]` picks, in raster order."""
        patches = pruning.features.patches
        distance = 1.0 - cosines(patches, patches)
        itself = torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)
        nearest_other = distance.masked_fill(itself, torch.inf).amin(dim=-1)
        image = torch.arange(distance.shape[0], device=distance.device)

        def lower(gap: Tensor, pick: Tensor) -> Tensor:
            return torch.minimum(gap, distance[image, pick])

        gap = torch.full_like(nearest_other, torch.inf)
        picks = pick_one_by_one(gap, nearest_other.argmax(dim=-1), lower, max(counts))
        return take_first(picks, counts)
