# SPDX-License-Identifier: Apache-2.0
"""A share of a count of tokens: the one place that rounds it, for both stages."""

from __future__ import annotations

import math
from fractions import Fraction


def share_of(ratio: float, tokens: int) -> int:
    """ceil(ratio * tokens), the ratio taken as the decimal number the user wrote.

    0.07 of 100 tokens are 7, although the binary fraction nearest to 0.07 times 100 is a little above 7.
    """
    return math.ceil(Fraction(repr(float(ratio))) * tokens)
