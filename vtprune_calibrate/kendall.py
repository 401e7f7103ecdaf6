# SPDX-License-Identifier: Apache-2.0
"""How alike decoder layers rank a picture's tokens: Kendall's tau-b (Kendall, Biometrika 1938 and 1945).

G-Search rests on it: where layers agree, what a deep layer needs is among what a shallow one needs. scipy
computes tau for two rankings at a time and is not among the pinned dependencies; for all pairs of layers at
once it is one product of matrices of signs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def tau(scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Tau-b between all pairs of rankings.

    Args:
        scores: what each layer gives each token, [layers, tokens].

    Returns:
        [layers, layers]; NaN where a layer ranks nothing.
    """
    first, second = np.triu_indices(scores.shape[1], 1)
    signs = np.sign(scores[:, first] - scores[:, second]).astype(np.float32)
    length = np.sqrt(np.square(signs).sum(1, dtype=np.float64))
    agreeing = signs @ signs.T
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = agreeing.astype(np.float64) / np.outer(length, length)
    return found


def mean_tau(prompts: Iterable[NDArray[np.floating[Any]]]) -> NDArray[np.float64]:
    """The mean over prompts of `tau`, [layers, layers]."""
    mean: NDArray[np.float64] = np.nanmean(np.stack([tau(scores) for scores in prompts]), axis=0)
    return mean
