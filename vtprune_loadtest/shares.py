# SPDX-License-Identifier: Apache-2.0
"""A share of things counted, with its confidence interval at 95 %."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

_Z = 1.959964


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float]:
        """For JSON, four digits."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def wilson(right: float, asked: int) -> Interval:
    """The share of right answers among independent ones (Wilson, JASA 1927)."""
    if not asked:
        return Interval(math.nan, math.nan, math.nan)
    share, z2 = right / asked, _Z * _Z
    centre = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    spread = _Z / (1 + z2 / asked) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked * asked))
    # at 0 and 1 the bound is exact, and rounding would leave it a little short
    return Interval(share, min(share, centre - spread), max(share, centre + spread))


def wilson_of_groups(right: Sequence[bool], group: Sequence[Hashable]) -> Interval:
    """The share of right answers where those of one group may stand or fall together.

    Each group counts as one answer, as if its answers told nothing of their own, so the interval is never too
    narrow. (The cluster bootstrap would be exact, but gives no width where all answers are right.)
    """
    share = sum(right) / len(right) if right else math.nan
    groups = len(set(group))
    return wilson(share * groups, groups)
