# SPDX-License-Identifier: Apache-2.0
"""HoloV."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import best_first, cosines
from vllm_vtprune.selection.scores import cls_attention

# The paper's settings: crops of a picture, and the weight of the variance beside attention.
_CROPS = 16
_VARIANCE = 0.09
_SMALLEST = 1e-12


class HoloV(SelectionMethod):
    """Every part of the picture keeps tokens in proportion to its worth (HoloV, arXiv 2510.02912).

    The patches are cut, in raster order, into 16 crops. A token's worth is its CLS attention plus 0.09 times
    the variance of its similarities to the others of its crop, brought to the scale of the crop's attention.
    Crops keep tokens in proportion to their mean worth, by largest remainders, and never more than they have;
    inside a crop the worthiest stay. The released code ranks inside a crop by attention alone, and gives what
    a full crop cannot take to nobody.
    """

    name = "holov"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The quota of every crop, in raster order."""
        patches, attention = pruning.features.patches, cls_attention(pruning.features)
        sizes = _sizes(pruning.features.tokens)
        crops = zip(patches.split(sizes, dim=1), attention.split(sizes, dim=1), strict=True)
        worth = [_worth(*crop) for crop in crops]
        share = torch.stack([crop.mean(dim=1) for crop in worth], dim=1)
        share = share / share.sum(dim=1, keepdim=True).clamp(min=_SMALLEST)
        # each token's own rank in its crop, and its crop's share, side by side in raster order
        rank = torch.cat([best_first(crop).argsort(dim=1) for crop in worth], dim=1)
        share = torch.cat([share[:, c : c + 1].expand(-1, size) for c, size in enumerate(sizes)], dim=1)
        return [Selection(_keep(*image)) for image in zip(share, rank, counts, strict=True)]


def _keep(share: Tensor, rank: Tensor, count: int) -> Tensor:
    """[count] positions by largest remainders.

    A crop's tokens of rank below the whole part of its quota come first, being at least 1 under it; then one
    token of each crop by the quota's remainder; then, where crops are full, a second of the others.
    """
    under = share.double() * count - rank
    return best_first(under)[:count].sort().values


def _sizes(tokens: int) -> list[int]:
    """Patches of each crop; the first ones hold one more where they do not divide evenly."""
    crops = min(_CROPS, tokens)
    return [tokens // crops + (crop < tokens % crops) for crop in range(crops)]


def _worth(patches: Tensor, attention: Tensor) -> Tensor:
    """[B, n] of one crop's patches [B, n, D] and attention [B, n]."""
    size = patches.shape[1]
    others = 1.0 - torch.eye(size, device=patches.device)
    alike = cosines(patches, patches)
    mean = (alike * others).sum(dim=-1, keepdim=True) / max(size - 1, 1)
    variance = ((alike - mean).square() * others).sum(dim=-1) / max(size - 1, 1)
    scale = attention.mean(dim=1, keepdim=True) / variance.mean(dim=1, keepdim=True).clamp(min=_SMALLEST)
    return attention + _VARIANCE * scale * variance
