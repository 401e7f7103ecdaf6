# SPDX-License-Identifier: Apache-2.0
"""Rounds of blocks: what every comparison here is made of, and its ratios.

In each round every arm is measured once, in a fresh random order (a randomised complete block design).
Whatever else the machine does in a round hits all of its arms alike, so ratios are taken within rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from vtprune_loadtest.spread import Spread

B = TypeVar("B")


@dataclass
class Rounds(Generic[B]):
    """The blocks of one comparison: `blocks[label][i]` is the arm's block of round i.

    Attributes:
        labels: the arms; the first is the one that all others are compared with.
    """

    labels: Sequence[str]
    blocks: dict[str, list[B]] = field(init=False)

    def __post_init__(self) -> None:
        """Start without a round."""
        self.blocks = {label: [] for label in self.labels}

    @property
    def base(self) -> str:
        """The arm that all others are compared with."""
        return self.labels[0]

    def __len__(self) -> int:
        """How many rounds there are."""
        return len(self.blocks[self.base])

    def values(self, label: str, metric: str) -> NDArray[np.float64]:
        """[rounds] one metric of one arm."""
        return np.array([getattr(block, metric) for block in self.blocks[label]])

    def median(self, label: str, metric: str) -> float | None:
        """Over rounds; None where a round has no such value."""
        value = float(np.median(self.values(label, metric)))
        return None if math.isnan(value) else value

    def ratios(self, label: str, metric: str) -> NDArray[np.float64]:
        """[rounds] the metric of one arm over the first one's, round by round."""
        return self.values(label, metric) / self.values(self.base, metric)

    def spread(self, label: str, metric: str) -> Spread:
        """Median of the ratios with quartiles and interval."""
        return Spread.of(self.ratios(label, metric))


def shuffled(items: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
    """The items of one round in an order of their own."""
    return (items[int(index)] for index in rng.permutation(len(items)))


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """What JSON can hold: what a server does not report, or a clock did not resolve, is null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def quartiles(spread: Spread) -> str:
    """A ratio for a table: median and quartiles."""
    return f"{spread.median:.3f} [{spread.q1:.3f} {spread.q3:.3f}]"


def decimal(value: float | None, digits: int, scale: float = 1.0) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{scale * value:.{digits}f}"
