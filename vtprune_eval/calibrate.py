# SPDX-License-Identifier: Apache-2.0
"""Which aggressiveness keeps a wanted share of the vision tokens on average, and what the cut keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_vtprune.selection import get_score, inflection_counts, score_curve
from vllm_vtprune.settings import VisionSettings
from vtprune_eval.pictures import EncodedPictures
from vtprune_eval.setting import Setting

_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """Mean share kept by aggressiveness 0.01, 0.02, ..., 0.99, and the value for each wanted share.

    Attributes:
        shares: aggressiveness to mean share kept.
        chosen: wanted share to the aggressiveness whose mean share is nearest.
    """

    shares: dict[float, float]
    chosen: dict[float, float]


def calibrate(pictures: Sequence[Sequence[Tensor]], wanted: Iterable[float]) -> Calibration:
    """Find the aggressiveness for mean shares kept; on pictures that no result is reported on.

    Args:
        pictures: each picture's views, of each the score of its units, [N]; a view has a curve of its own,
            and N may differ.
        wanted: mean shares.
    """
    tokens = torch.tensor([sum(len(view) for view in picture) for picture in pictures], dtype=torch.float64)
    # views of one length are cut together
    alike: dict[int, list[tuple[int, Tensor]]] = {}
    for number, picture in enumerate(pictures):
        for view in picture:
            alike.setdefault(len(view), []).append((number, view))
    batches = [
        (torch.tensor([n for n, _ in same]), torch.stack([v for _, v in same])) for same in alike.values()
    ]
    shares = {}
    for step in range(1, _STEPS):
        kept = torch.zeros_like(tokens)
        for numbers, batch in batches:
            kept.index_add_(0, numbers, inflection_counts(batch, step / _STEPS).double())
        shares[step / _STEPS] = float((kept / tokens).mean())
    chosen = {target: min(shares, key=lambda a: abs(shares[a] - target)) for target in wanted}
    return Calibration(shares, chosen)


def view_scores(pictures: EncodedPictures, score: str = "cosine") -> list[list[Tensor]]:
    """Each picture's one view as `calibrate` takes it."""
    return [[row] for batch in pictures.batches for row in get_score(score)(batch).cpu()]


def mean_curves(
    pictures: EncodedPictures, groups: dict[str, NDArray[np.bool_]], score: str = "cosine"
) -> dict[str, list[float]]:
    """The sorted scores, averaged over the pictures of each group, [N] each.

    Args:
        pictures: P of them.
        groups: name to members, [P].
        score: whose curve.
    """
    ranked = torch.cat([score_curve(get_score(score)(batch)).scores for batch in pictures.batches])
    curves = ranked.cpu().numpy()
    return {name: curves[members].mean(0).tolist() for name, members in groups.items() if members.any()}


def objects_kept(
    pictures: EncodedPictures, vision: VisionSettings, owner: NDArray[np.int64]
) -> dict[str, float]:
    """How much of what the pictures show a choice keeps.

    Args:
        pictures: P of them.
        vision: stage 1.
        owner: the number of the object that each patch shows, negative where none, [P, N].

    Returns:
        `patches`, the share of object patches kept; `seen` and `half_seen`, the share of objects of which at
        least one patch, and at least half of the patches, stay.
    """
    kept = np.zeros(owner.shape, dtype=bool)
    for row, selection in zip(kept, pictures.select(Setting(vision)), strict=True):
        row[selection.indices.cpu().numpy()] = True
    # one number for every object of every picture
    picture, patch = np.nonzero(owner >= 0)
    _, number = np.unique(picture * (owner.max() + 1) + owner[picture, patch], return_inverse=True)
    size, stayed = np.bincount(number), np.bincount(number, weights=kept[picture, patch])
    return {
        "patches": round(float(stayed.sum() / size.sum()), 4),
        "seen": round(float((stayed > 0).mean()), 4),
        "half_seen": round(float((2 * stayed >= size).mean()), 4),
    }
