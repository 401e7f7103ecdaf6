# SPDX-License-Identifier: Apache-2.0
"""VTC-CLS."""

from typing import ClassVar

from torch import Tensor

from vllm_vtprune.selection.base import Pruning, required
from vllm_vtprune.selection.ranked import RankedMethod


class VtcCls(RankedMethod):
    """Keeps the patches of highest CLS attention summed over the last layers (arXiv 2412.05819).

    The paper chooses the first of those layers by hand for each model; here it is the middle of the tower.
    """

    name = "vtc_cls"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def rank(self, pruning: Pruning) -> Tensor:
        """[B, N] CLS attention, mean over heads, summed from the middle layer to the feature layer."""
        attention = required(pruning.features.cls_attention)
        return attention[:, attention.shape[1] // 2 :].float().sum(dim=1)
