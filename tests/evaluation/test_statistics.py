# SPDX-License-Identifier: Apache-2.0
"""The evaluation's intervals: known values, coverage, and what they must not ignore."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vtprune_eval.statistics import correlation, difference, share
from vtprune_loadtest.shares import Interval, wilson


def test_wilson_has_its_published_values() -> None:
    # Newcombe, Statistics in Medicine 1998, table I, method 3
    for right, asked, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        interval = wilson(right, asked)
        assert interval.low == pytest.approx(low, abs=1e-4)
        assert interval.high == pytest.approx(high, abs=1e-4)


def test_wilson_of_nothing_asked_is_not_a_number() -> None:
    assert math.isnan(wilson(0, 0).value)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    owners = np.repeat(np.arange(120), 6)
    inside = 0
    for _ in range(300):
        # pictures differ in difficulty, so questions about one picture are correlated; 0.7 on average
        easy = generator.beta(1.4, 0.6, 120)
        interval = share((generator.random(720) < easy[owners]).astype(float), owners)
        inside += interval.low <= 0.7 <= interval.high
    assert 0.90 <= inside / 300 <= 0.985


def test_questions_of_one_picture_count_together() -> None:
    values = np.repeat(np.arange(100) % 2, 6).astype(float)
    together, apart = share(values, np.repeat(np.arange(100), 6)), share(values, np.arange(600))
    assert together.value == apart.value == 0.5
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_a_paired_difference_is_narrower_than_two_accuracies() -> None:
    generator = np.random.default_rng(2)
    owners = np.repeat(np.arange(200), 3)
    worse = (generator.random(600) < 0.6).astype(float)
    better = np.maximum(worse, generator.random(600) < 0.05)
    paired, alone = difference(better, worse, owners), share(worse, owners)
    assert paired.excludes_zero
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_equal_answers_differ_by_nothing() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert difference(values, values, np.array([0, 0, 1, 2])) == Interval(0, 0, 0)
    assert not Interval(0, 0, 0).excludes_zero


def test_pictures_weigh_as_many_questions_as_they_have() -> None:
    interval = share(np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1]))
    assert interval.value == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_correlation() -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=400)
    assert correlation(x, 2 * x + 1).value == pytest.approx(1)
    related = correlation(x, x + generator.normal(size=400))
    assert related.low < 1 / math.sqrt(2) < related.high
    unrelated = correlation(x, generator.normal(size=400))
    assert unrelated.low < 0 < unrelated.high
    assert math.isnan(correlation(x, np.ones(400)).value)
