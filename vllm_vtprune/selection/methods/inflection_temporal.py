# SPDX-License-Identifier: Apache-2.0
"""The rule that sees time."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vllm_vtprune.selection.base import Pruning
from vllm_vtprune.selection.ops import ranks
from vllm_vtprune.selection.ranked import RankedMethod

#: More than any change, which is at most 2.
_AHEAD = 4.0


class InflectionTemporal(RankedMethod):
    """A token that did not change since the frame before goes first; of a picture it is `inflection`.

    Change is that of Efficient Video Sampling (EVS, arXiv 2510.14624): one minus the cosine with the token of
    the same place in the frame before; everything in the first frame is new. EVS ranks by it alone, over the
    whole video, and keeps the first frame whole. Here it is multiplied with the share of the frame's tokens
    that score no higher, so that the first frame competes too, and of what changed the best stays.

    The settings decide how many tokens of each frame stay, and so how many of the video; these are then given
    to the video's best, whichever frame they are in. Each frame keeps `min_tokens`.
    """

    name = "inflection_temporal"
    ranks_by_score = True

    def spread(self, counts: Tensor, pruning: Pruning) -> Tensor:
        """[B]: of each video as many tokens as before, of each frame those among its video's best."""
        values, least = self.rank(pruning), pruning.settings.min_tokens
        tokens = values.shape[1]
        # each frame's first ones are ahead of all others
        values = torch.where(ranks(values) < least, values + _AHEAD, values)
        sizes = pruning.features.frames or (1,) * len(counts)
        found = []
        for of_video, asked in zip(values.split(sizes), counts.split(sizes), strict=True):
            stays = ranks(of_video.flatten()) < asked.sum()
            found.append(stays.view(-1, tokens).sum(dim=1))
        return torch.cat(found)

    def rank(self, pruning: Pruning) -> Tensor:
        """[B, N] change since the frame before, times the share of the frame that scores no higher."""
        scores = pruning.scores
        share = 1.0 - ranks(scores).double() / scores.shape[1]
        return changes(pruning.features.patches, pruning.features.frames) * share


def changes(patches: Tensor, frames: tuple[int, ...] = ()) -> Tensor:
    """[B, N] in [0, 2]: one minus the cosine with the frame before; 1 in the first frame, and of a picture.

    Args:
        patches: [B, N, D].
        frames: as in `VisionFeatures`.
    """
    found = []
    for video in normalize(patches.float(), dim=-1).split(frames or (1,) * len(patches)):
        new = torch.ones_like(video[:1, :, 0])
        found += [new, 1.0 - (video[1:] * video[:-1]).sum(dim=-1)]
    return torch.cat(found).clamp(min=0.0)
