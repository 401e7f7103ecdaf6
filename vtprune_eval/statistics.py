# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals at 95 %.

Questions about one picture stand or fall together, so pictures and not questions are resampled (the cluster
bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997). Comparisons are paired: two
settings are judged on the same resampled pictures, which removes what the pictures have in common.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vtprune_loadtest.shares import Interval

_RESAMPLES = 4000


def share(values: NDArray[np.float64], owners: NDArray[np.int64]) -> Interval:
    """Mean of `values` [Q] over questions; picture `owners`[q] is what is resampled."""
    totals, asked, weights = _per_picture(values, owners)
    return _interval(float(values.mean()), (weights @ totals) / (weights @ asked))


def difference(
    values: NDArray[np.float64], others: NDArray[np.float64], owners: NDArray[np.int64]
) -> Interval:
    """Mean of `values` - `others` [Q], both from the same questions."""
    return share(values - others, owners)


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> Interval:
    """Pearson's correlation of two quantities [P] of pictures; NaN where one of them is constant."""
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return Interval(math.nan, math.nan, math.nan)
    weights = _weights(len(x)) / len(x)
    mean_x, mean_y = weights @ x, weights @ y
    covariance = weights @ (x * y) - mean_x * mean_y
    # rounding can leave the variance of a constant resample a little below zero
    variances = (weights @ (v * v) - m**2 for v, m in ((x, mean_x), (y, mean_y)))
    spread = np.sqrt(np.prod([np.maximum(variance, 0) for variance in variances], axis=0))
    resampled = (covariance[spread > 1e-9] / spread[spread > 1e-9]).clip(-1, 1)
    return _interval(float(np.corrcoef(x, y)[0, 1]), resampled)


def _per_picture(
    values: NDArray[np.float64], owners: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Sum of values and number of questions by picture, [P] each, and the resampling weights, [R, P]."""
    _, numbers = np.unique(owners, return_inverse=True)
    totals = np.bincount(numbers, weights=values).astype(np.float64)
    return totals, np.bincount(numbers).astype(np.float64), _weights(len(totals))


@lru_cache(maxsize=8)
def _weights(pictures: int) -> NDArray[np.float64]:
    """How often each picture is drawn in each resample, [R, P]; the same for every quantity."""
    generator = np.random.default_rng(0)
    return generator.multinomial(pictures, np.full(pictures, 1 / pictures), _RESAMPLES).astype(np.float64)


def _interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value, float(low), float(high))
