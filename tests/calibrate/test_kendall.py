# SPDX-License-Identifier: Apache-2.0
"""Kendall's tau against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vtprune_calibrate.kendall import mean_tau, tau


def by_definition(x: list[float], y: list[float]) -> float:
    """Tau-b: concordant less discordant pairs, over the root of the pairs untied in each."""
    agree = untied_x = untied_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agree += int(a * b)
        untied_x += int(a != 0)
        untied_y += int(b != 0)
    return agree / math.sqrt(untied_x * untied_y) if untied_x and untied_y else math.nan


@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.integers(0, 5)))
def test_every_pair_of_layers_is_compared_as_defined(scores: np.ndarray) -> None:
    found = tau(scores)
    for i, j in itertools.product(range(len(scores)), repeat=2):
        expected = by_definition(scores[i].tolist(), scores[j].tolist())
        assert found[i, j] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_the_mean_leaves_out_what_ranks_nothing() -> None:
    ranked = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    flat = np.array([[1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    np.testing.assert_allclose(mean_tau([ranked, flat]), [[1, -1], [-1, 1]])
