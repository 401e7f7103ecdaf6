# SPDX-License-Identifier: Apache-2.0
"""Clustering by density peaks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import best_first, membership

# Nearest neighbours, the token itself among them, whose distances make its density.
_NEIGHBOURS = 5
_SMALLEST = 1e-12


class DensityPeaks(SelectionMethod):
    """Every kept token is the mean of one cluster; clusters grow around peaks of density.

    After SeTok's tokenizer (arXiv 2406.05127), without what is trained in it: DPC-KNN (Du, Ding and Jia,
    2016). A token's density is exp(-mean squared distance to its nearest), its distance delta that to the
    nearest denser token; those of largest density times delta are centres, and every token joins the nearest.
    SeTok lets a threshold say how many; here the budget does. Its k is 64, and 2-D positions are added to the
    features; here k is 5, as in DPC-KNN's use for vision tokens (TCFormer, arXiv 2204.08680), and distances
    are in units of their mean over the picture, which makes the choice independent of the features' scale.
    Of equally dense tokens the earlier counts as the denser. A cluster stands where its centre stands.
    """

    name = "density_peaks"

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The means of `counts[b]` clusters; `indices` are their centres."""
        patches = pruning.features.patches
        distance = _distances(patches.float())
        order = best_first(_peaks(distance))
        images = zip(order, distance, patches, counts, strict=True)
        return [_means(*image) for image in images]


def _distances(patches: Tensor) -> Tensor:
    """[B, N, N] Euclidean, in units of each image's mean."""
    # by products, as is usual; rounding can make a small square negative
    squares = patches.square().sum(dim=-1)
    products = patches @ patches.transpose(1, 2)
    distance = (squares.unsqueeze(1) + squares.unsqueeze(2) - 2 * products).clamp(min=0.0).sqrt()
    itself = torch.eye(patches.shape[1], dtype=torch.bool, device=patches.device)
    distance = distance.masked_fill(itself, 0.0)
    return distance / distance.mean(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST)


def _peaks(distance: Tensor) -> Tensor:
    """[B, N] density times the distance to the nearest denser token (of the densest: to the farthest)."""
    tokens = distance.shape[1]
    nearest = distance.topk(min(_NEIGHBOURS, tokens), dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()
    place = best_first(density).argsort(dim=-1)
    denser = place.unsqueeze(1) < place.unsqueeze(2)
    farthest = distance.amax(dim=(1, 2))
    delta = distance.masked_fill(~denser, torch.inf).amin(dim=-1)
    return density * torch.minimum(delta, farthest.unsqueeze(1))


def _means(order: Tensor, distance: Tensor, patches: Tensor, count: int) -> Selection:
    centres = order[:count].sort().values
    # a centre is its own, even beside another at distance 0
    own = torch.arange(patches.shape[0], device=patches.device).unsqueeze(0) == centres.unsqueeze(1)
    cluster = distance[centres].masked_fill(own, -1.0).argmin(dim=0)
    members = membership(cluster, count)
    means = members @ patches.float() / members.sum(dim=1, keepdim=True)
    return Selection(centres, means.to(patches.dtype))
