# SPDX-License-Identifier: Apache-2.0
"""Median of paired ratios, with an interval that assumes no distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: With fewer ratios even the whole range covers the median with less than 95 % probability.
MIN_FOR_INTERVAL = 6


@dataclass(frozen=True)
class Spread:
    """Median of paired ratios, their quartiles, and a 95 % confidence interval of the median."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(ratios: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> Spread:
        """The interval is that of order statistics; below `MIN_FOR_INTERVAL` it is the whole range."""
        values = np.sort(np.asarray(ratios, dtype=np.float64))
        q1, median, q3 = np.percentile(values, [25, 50, 75])
        rank = _interval_rank(len(values))
        return Spread(
            float(median), float(q1), float(q3), float(values[rank]), float(values[-1 - rank]), len(values)
        )

    @property
    def interval(self) -> str:
        """What `low` and `high` are."""
        return "95 % interval" if self.rounds >= MIN_FOR_INTERVAL else f"range of {self.rounds}"


def _interval_rank(n: int) -> int:
    """Largest r so that the r-th smallest to the r-th largest (from 0) cover the median in 95 of 100 cases.

    The number of values below the median is binomial (David and Nagaraja 2003, "Order Statistics", 7.1).
    """
    rank, tail = 0, 1 / 2**n
    while 2 * (tail := tail + math.comb(n, rank + 1) / 2**n) <= 0.05:
        rank += 1
    return rank
