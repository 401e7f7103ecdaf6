# SPDX-License-Identifier: Apache-2.0
"""SCOPE."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import cosines, pick_one_by_one
from vllm_vtprune.selection.ranked import take_first
from vllm_vtprune.selection.scores import cls_attention


class Scope(SelectionMethod):
    """Keeps tokens that cover the picture, the more attended first (SCOPE, arXiv 2510.24214).

    A picture is covered as far as each of its patches is like some kept token: a set S covers sum_i max(0,
    max_{j in S} cos_ij). The next token kept is always the one whose gain in coverage, times its CLS
    attention (the paper's exponent alpha = 1), is largest. Smaller choices are part of larger ones. Work
    grows with the kept tokens times the square of all.
    """

    name = "scope"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The first `counts[b]` picks, in raster order."""
        picks = cover(pruning.features.patches, cls_attention(pruning.features), max(counts))
        return take_first(picks, counts)


def cover(patches: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Greedy weighted coverage.

    Args:
        patches: [B, N, D].
        weights: [B, N], not negative: what a token's gain is multiplied by.
        steps: how many tokens to pick.

    Returns:
        [B, steps] int64, in the order they were picked.
    """
    alike = cosines(patches, patches)
    covered = torch.zeros_like(weights)
    image = torch.arange(patches.shape[0], device=patches.device)

    def gains() -> Tensor:
        return weights * (alike - covered.unsqueeze(1)).clamp(min=0.0).sum(dim=-1)

    def lower(_values: Tensor, pick: Tensor) -> Tensor:
        torch.maximum(covered, alike[image, pick], out=covered)
        return gains()

    first = gains()
    return pick_one_by_one(first, first.argmax(dim=-1), lower, steps)
