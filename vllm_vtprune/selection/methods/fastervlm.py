# SPDX-License-Identifier: Apache-2.0
"""FasterVLM."""

from typing import ClassVar

from torch import Tensor

from vllm_vtprune.selection.base import Pruning
from vllm_vtprune.selection.ranked import RankedMethod
from vllm_vtprune.selection.scores import cls_attention


class FasterVLM(RankedMethod):
    """Keeps the patches the CLS token attends to most in the feature layer (arXiv 2412.01818)."""

    name = "fastervlm"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def rank(self, pruning: Pruning) -> Tensor:
        """[B, N] CLS attention, mean over heads, whatever the request's score."""
        return cls_attention(pruning.features)
