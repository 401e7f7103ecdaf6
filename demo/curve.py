# SPDX-License-Identifier: Apache-2.0
"""The CLS similarity curve of the feature layer: where its knee is, and what the patches before it show."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_vtprune.selection import inflection_counts
from vtprune_eval.scenes import Scene


@dataclass(frozen=True)
class Knee:
    """What keeping the patches before the knee does on a set of scenes.

    `curve` is the mean sorted similarity at 0, 5, ..., 100 % of the patches; `share_kept` the mean share
    kept; `object_recall` the share of all object patches that are kept; `object_share` how many patches are
    object patches; `content_correlation` Pearson's, between the kept count and the count of object patches;
    `shapes_correlation` the same with the number of shapes; `kept_by_shapes` the mean share kept by number
    of shapes.
    """

    curve: list[float]
    share_kept: float
    object_recall: float
    object_share: float
    content_correlation: float
    shapes_correlation: float
    kept_by_shapes: dict[int, float]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def similarity(states: Tensor) -> Tensor:
    """Cosine of CLS and each patch: [..., 1 + P, width] to [..., P]."""
    states = states.float()
    return F.cosine_similarity(states[..., :1, :], states[..., 1:, :], dim=-1)


def before_the_cut(scores: Tensor, aggressiveness: float = 0.5) -> Tensor:
    """Patches before the inflection point of one picture's curve, in raster order: float [P] to int64 [kept].

    The rule that serving cuts by.
    """
    order = scores.argsort(descending=True, stable=True)
    return order[: int(inflection_counts(scores[None], aggressiveness))].sort().values


def describe_knee(scenes: list[Scene], states: Tensor, aggressiveness: float = 0.5) -> Knee:
    """Measure the curve and its cut, given the feature layer's states [N, 1 + P, width], CLS first."""
    scores = similarity(states)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, picture in zip(kept, scores, strict=True):
        row[before_the_cut(picture, aggressiveness)] = True
    shown = torch.from_numpy(np.stack([scene.object_patches for scene in scenes]))
    counts, shapes = kept.sum(1).double(), torch.tensor([float(len(scene.shapes)) for scene in scenes])
    places = torch.linspace(0, scores.shape[1] - 1, 21).round().long()
    by_shapes = {
        number: kept[shapes == number].double().mean().item()
        for number in range(1, 7)
        if (shapes == number).any()
    }
    return Knee(
        curve=scores.sort(1, descending=True).values.mean(0)[places].tolist(),
        share_kept=kept.double().mean().item(),
        object_recall=(kept & shown).sum().item() / max(1, int(shown.sum())),
        object_share=shown.double().mean().item(),
        content_correlation=_correlation(counts, shown.sum(1).double()),
        shapes_correlation=_correlation(counts, shapes.double()),
        kept_by_shapes=by_shapes,
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
