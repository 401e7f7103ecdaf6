# SPDX-License-Identifier: Apache-2.0
"""VisPruner."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import best_first, cosines
from vllm_vtprune.selection.scores import cls_attention

# Duplicates removed in each round, as in the paper's released code.
_PER_ROUND = 8


class VisPruner(SelectionMethod):
    """Half of the tokens by CLS attention, half by taking duplicates away (arXiv 2412.01818, VisPruner).

    The tokens left after the most attended are halved alternately, over and over: in each round the eight of
    the first half that are most like some token of the second are removed (at most half of them, so that of
    few tokens no unlike one is lost). A round's survivors of the first half come before the second half in
    the next round, the most alike first; the first round is by falling attention. An odd token goes to
    attention (the released code gives it to the other half).
    """

    name = "vispruner"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The attended half and the distinct half, in raster order."""
        order = best_first(cls_attention(pruning.features))
        images = zip(order, pruning.features.patches, counts, strict=True)
        return [Selection(_keep(*image)) for image in images]


def _keep(order: Tensor, patches: Tensor, count: int) -> Tensor:
    """[count] of one image's positions `order` [N], which is by falling attention."""
    attended, rest = order[: -(-count // 2)], order[-(-count // 2) :]
    alike = cosines(patches, patches)
    wanted = count - attended.shape[0]
    while rest.shape[0] > max(wanted, 1):
        first, second = rest[::2], rest[1::2]
        fewer = min(_PER_ROUND, rest.shape[0] - wanted, -(-first.shape[0] // 2))
        nearest = alike[first.unsqueeze(1), second].amax(dim=-1)
        rest = torch.cat([first[best_first(nearest)[fewer:]], second])
    return torch.cat([attended, rest[:wanted]]).sort().values
