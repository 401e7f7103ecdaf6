# SPDX-License-Identifier: Apache-2.0
"""DART."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod, required
from vllm_vtprune.selection.ops import best_first, complement, cosines

# The paper's pivots are four vision and four text tokens; before the language model there are no text tokens.
_PIVOTS = 8


class Dart(SelectionMethod):
    """Keeps a few pivots and what duplicates them least (DART, arXiv 2502.11494).

    Pivots are the tokens whose attention keys are longest (by the sum of magnitudes). Pivot after pivot, an
    equal share of the count is filled with those left whose cosine to it is least. The paper chooses inside
    the language model, four of its eight pivots among the text; here all eight are the picture's, with the
    keys of the tower's feature layer.
    """

    name = "dart"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """Pivots and the least alike, in raster order."""
        order = best_first(required(pruning.features.keys).float().abs().sum(dim=-1))
        images = zip(order, pruning.features.patches, counts, strict=True)
        return [Selection(_keep(*image)) for image in images]


def _keep(order: Tensor, patches: Tensor, count: int) -> Tensor:
    """[count] of one image's positions, `order` [N] being by falling length of their keys."""
    pivots = order[: min(_PIVOTS, count)]
    kept, left = pivots, complement(pivots, patches.shape[0])
    alike = cosines(patches[pivots], patches)
    for done, row in enumerate(alike):
        # what is still to fill, in equal shares over the pivots still to come
        share = -(-(count - kept.shape[0]) // (pivots.shape[0] - done))
        if share == 0:
            break
        least = best_first(-row[left])
        kept = torch.cat([kept, left[least[:share]]])
        left = left[least[share:].sort().values]
    return kept.sort().values
