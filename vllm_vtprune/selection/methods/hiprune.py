# SPDX-License-Identifier: Apache-2.0
"""HiPrune."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod, required
from vllm_vtprune.selection.ops import best_first

# Share of the kept tokens that are anchors or buffers: the paper's alpha. An anchor and its buffers are a
# cross.
_ALPHA = (1, 10)
_CROSS = 5


class HiPrune(SelectionMethod):
    """Keeps anchors, buffers and registers, by the attention patches receive (arXiv 2508.00553).

    Needs no CLS token. Anchors are most attended in a middle, object-centred layer; buffers are their four
    neighbours; registers, nine tenths of the count, are the most attended of the rest in the feature layer.
    """

    name = "hiprune"
    needs: ClassVar[frozenset[str]] = frozenset({"received", "received_midway"})

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """Anchors first, then buffers, then registers, up to `counts[b]` tokens; in raster order."""
        features = pruning.features
        middle = best_first(required(features.received_midway)[:, -1])
        last = best_first(required(features.received)[:, -1])
        images = zip(middle, last, counts, strict=True)
        return [_keep(*image, pruning.features.grid) for image in images]


def _keep(middle: Tensor, last: Tensor, count: int, grid: tuple[int, int]) -> Selection:
    """One image's tokens, from its positions by falling attention in the object and the feature layer."""
    share, whole = _ALPHA
    anchors = middle[: -(-count * share // (whole * _CROSS))]
    tier = torch.zeros_like(last)
    tier = tier.index_fill(0, _neighbours(anchors, grid), 1).index_fill(0, anchors, 2)
    # Sorting by tier is stable, so inside a tier the feature layer's attention decides.
    order = last[best_first(tier[last])]
    return Selection(order[:count].sort().values)


def _neighbours(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches left, right, above and below; a patch at the border is its own neighbour on that side."""
    height, width = grid
    row, column = positions // width, positions % width
    return torch.cat(
        [
            (row - 1).clamp(min=0) * width + column,
            (row + 1).clamp(max=height - 1) * width + column,
            row * width + (column - 1).clamp(min=0),
            row * width + (column + 1).clamp(max=width - 1),
        ]
    )
