# SPDX-License-Identifier: Apache-2.0
"""How many tokens stay: the inflection rule against exact arithmetic, and the arithmetic of shares."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vtprune.selection import inflection_counts, score_curve, share_count, slope_of
from vllm_vtprune.settings import VisionSettings

# Integers up to 2**20 are exact in float32, so the exact reference sees the very same numbers.
integer_scores = st.lists(st.integers(-1000, 1000), min_size=1, max_size=40)
float_scores = st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=60)
hundredths = st.integers(0, 100)

# No deadline: a busy machine is not a failure.
some = settings(deadline=None)
many = settings(max_examples=400, deadline=None)


def count(scores: list[float] | list[int], aggressiveness: float, min_tokens: int = 1) -> int:
    return int(inflection_counts(torch.tensor([scores], dtype=torch.float32), aggressiveness, min_tokens)[0])


def exact_count(scores: list[int], hundredth: int) -> int:
    """The definition in rational arithmetic.

    Up to the knee the k that minimises y_k + lambda x_k, the smallest on ties; past it the knee's k / lambda.
    """
    ranked = sorted(scores, reverse=True)
    tokens = len(ranked)
    if hundredth == 0 or ranked[0] == ranked[-1]:
        return tokens
    if hundredth == 100:
        return 1
    slope = Fraction(hundredth, 100 - hundredth)
    objective = [
        Fraction(score - ranked[-1], ranked[0] - ranked[-1]) + min(slope, 1) * Fraction(k, tokens - 1)
        for k, score in enumerate(ranked)
    ]
    cut = objective.index(min(objective)) + 1
    return math.ceil(cut / max(slope, Fraction(1)))


@given(integer_scores, hundredths)
@many
def test_the_cut_equals_exact_arithmetic(scores: list[int], hundredth: int) -> None:
    assert count(scores, hundredth / 100) == exact_count(scores, hundredth)


@pytest.mark.parametrize("tokens", [2, 3, 10, 144, 576, 577])
@pytest.mark.parametrize("aggressiveness", [0.1, 0.37, 0.5, 0.8, 0.99])
def test_the_cut_equals_brute_force_on_long_tails(tokens: int, aggressiveness: float) -> None:
    scores = np.random.default_rng(tokens).lognormal(size=(8, tokens)).astype(np.float32)
    expected = []
    for ranked in -np.sort(-scores.astype(np.float64), axis=1):
        y = (ranked - ranked[-1]) / (ranked[0] - ranked[-1])
        x = np.arange(tokens) / (tokens - 1)
        cut = int(np.argmin(y + min(slope_of(aggressiveness), 1) * x)) + 1
        expected.append(math.ceil(round(cut / max(slope_of(aggressiveness), 1), 6)))
    assert inflection_counts(torch.from_numpy(scores), aggressiveness).tolist() == expected


@given(float_scores, st.floats(0, 1), st.floats(0, 1), st.integers(1, 70))
@many
def test_the_count_never_rises_with_aggressiveness(
    scores: list[float], one: float, other: float, least: int
) -> None:
    lower, higher = sorted((one, other))
    assert count(scores, lower, least) >= count(scores, higher, least)


@given(float_scores, st.floats(0, 1), st.integers(1, 70))
@some
def test_the_count_stays_within_its_bounds(scores: list[float], aggressiveness: float, least: int) -> None:
    assert min(least, len(scores)) <= count(scores, aggressiveness, least) <= len(scores)


@given(float_scores, st.integers(1, 70))
@some
def test_the_ends_of_the_scale(scores: list[float], least: int) -> None:
    assert count(scores, 0.0, least) == len(scores)
    varied = len(set(torch.tensor(scores).tolist())) > 1
    assert count(scores, 1.0, least) == (min(least, len(scores)) if varied else len(scores))


@given(st.floats(-1, 1, width=32), st.integers(1, 50), st.floats(0, 1))
@some
def test_equal_scores_have_no_inflection_point(score: float, tokens: int, aggressiveness: float) -> None:
    assert count([score] * tokens, aggressiveness) == tokens


def test_the_knee_is_the_point_farthest_below_the_chord() -> None:
    assert count([10, 9, 2, 1, 0], 0.5) == 3


@pytest.mark.parametrize("tokens", [3, 7, 10, 30, 100])
def test_a_straight_curve_ties_everywhere_and_is_cut_at_the_smallest(tokens: int) -> None:
    assert count(list(range(tokens)), 0.5) == 1
    assert count([score / 3 for score in range(tokens)], 0.49) == tokens


def test_ties_at_the_bottom_of_the_curve_are_dropped_by_any_aggressiveness() -> None:
    assert count([5, 4, 0, 0, 0], 1e-300) == 3
    assert count([5, 4, 0, 0, 0], 0.0) == 5


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=30), hundredths, st.integers(-3, 3))
@some
def test_the_cut_ignores_scale_and_offset(scores: list[int], hundredth: int, power: int) -> None:
    moved = [2.0**power * (score + 17) for score in scores]
    assert count(moved, hundredth / 100) == count(scores, hundredth / 100)


def test_images_of_a_batch_are_independent() -> None:
    scores = torch.randn(16, 144, generator=torch.Generator().manual_seed(0))
    alone = [int(inflection_counts(row[None], 0.4)[0]) for row in scores]
    assert inflection_counts(scores, 0.4).tolist() == alone


@pytest.mark.parametrize("aggressiveness", [-0.01, 1.01, math.nan, math.inf])
def test_aggressiveness_out_of_range_is_refused(aggressiveness: float) -> None:
    with pytest.raises(ValueError, match="aggressiveness must be between 0 and 1"):
        inflection_counts(torch.zeros(1, 4), aggressiveness)


def test_the_curve_is_sorted_normalised_and_breaks_ties_by_position() -> None:
    curve = score_curve(torch.tensor([[1.0, 3.0, 2.0, 3.0, 1.0], [4.0, 4.0, 4.0, 4.0, 4.0]]))
    assert curve.order.tolist() == [[1, 3, 2, 0, 4], [0, 1, 2, 3, 4]]
    assert curve.scores[0].tolist() == [3, 3, 2, 1, 1]
    assert curve.x.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.y.tolist() == [[1, 1, 0.5, 0, 0], [1, 1, 1, 1, 1]]
    many_ties = torch.arange(3000).remainder(7).float()[None]
    ranks = [(-float(score), position) for position, score in enumerate(many_ties[0])]
    assert score_curve(many_ties).order[0].tolist() == [position for _, position in sorted(ranks)]


def test_lambda_maps_the_unit_interval_to_all_slopes() -> None:
    assert [slope_of(a) for a in (0.0, 0.5, 0.75, 1.0)] == [0.0, 1.0, 3.0, math.inf]


@given(st.integers(1, 1000), st.integers(1, 3000))
@some
def test_a_share_is_the_decimal_number_written(thousandths: int, tokens: int) -> None:
    assert share_count(thousandths / 1000, tokens) == -(-thousandths * tokens // 1000)


def test_a_share_has_a_floor_and_a_ceiling() -> None:
    assert share_count(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001
    assert share_count(1e-9, 576) == 1
    assert share_count(0.1, 50, min_tokens=16) == 16
    assert share_count(0.1, 10, min_tokens=16) == 10


@pytest.mark.parametrize(
    "fields",
    [
        {"aggressiveness": -0.1},
        {"aggressiveness": 1.1},
        {"aggressiveness": math.nan},
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.1},
        {"keep_ratio": math.nan},
        {"min_tokens": 0},
    ],
    ids=str,
)
def test_a_budget_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        VisionSettings(**fields)
