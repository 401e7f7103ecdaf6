# SPDX-License-Identifier: Apache-2.0
"""The searches against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vtprune.kv_drop.schedule import band_groups, band_sizes, check
from vtprune_calibrate.search import (
    PruneLayers,
    SearchError,
    at_borders,
    best_under_budget,
    by_layer,
    cover,
    least_shares,
    sigmoid,
    within_budget,
)

falling = st.integers(1, 5).flatmap(
    lambda borders: st.lists(st.integers(0, 6), min_size=borders, max_size=borders).map(
        lambda found: sorted(found, reverse=True)
    )
)


@given(falling, st.data())
def test_g_search_finds_what_each_layer_needs(needs: list[int], data: st.DataObject) -> None:
    def score(shares: tuple[float, ...]) -> float:
        return min(1.0, *(1 + share - need / 6 for share, need in zip(shares, needs, strict=True)))

    assert least_shares(score, len(needs), 1.0 - 1e-9, steps=6) == tuple(need / 6 for need in needs)


@given(st.lists(st.floats(0.05, 3), min_size=1, max_size=4), st.floats(0, 1))
def test_g_search_is_the_greedy_scan_and_reaches_the_target(weights: list[float], target: float) -> None:
    """Layers that make up for one another: the cheapest is another question, the paper's rule is this one."""
    steps = 6

    def score(shares: tuple[float, ...]) -> float:
        return sum(w * math.sqrt(share) for w, share in zip(weights, shares, strict=True)) / sum(weights)

    found = least_shares(score, len(weights), target, steps)
    scanned: list[float] = []
    for index in range(len(weights)):
        able = (
            n / steps
            for n in range(steps + 1)
            if score((*scanned, *[n / steps] * (len(weights) - index))) >= target
        )
        scanned.append(next(able, 1.0))
    assert found == tuple(scanned)
    assert list(found) == sorted(found, reverse=True)
    assert score(found) >= target - 1e-9


def test_g_search_asks_as_often_as_bisection_does() -> None:
    asked: list[tuple[float, ...]] = []

    def score(shares: tuple[float, ...]) -> float:
        asked.append(shares)
        return sum(shares)

    least_shares(score, 3, 1.0, steps=32)
    assert len(asked) <= 3 * math.ceil(math.log2(33))
    assert all(list(shares) == sorted(shares, reverse=True) for shares in asked)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 8), min_size=3, max_size=7), st.integers(1, 3))
def test_the_cover_is_the_cheapest_of_all_that_give_every_layer_its_share(
    needs: list[int], most: int
) -> None:
    curve = [1.0, *(need / 8 for need in sorted(needs, reverse=True))]
    layers = len(curve)

    def price(edges: tuple[int, ...], shares: tuple[float, ...]) -> float:
        sizes = band_sizes(layers, edges)
        stored = sum(size * share for size, share in zip(sizes, (1.0, *shares), strict=True))
        return stored * (1 + band_groups(sizes)[1])

    schedule = cover(curve, most)
    seen = by_layer(schedule, layers)
    assert all(have >= need for have, need in zip(seen, curve, strict=True))
    if not schedule:
        assert min(curve) == 1.0
        return
    check(schedule)
    assert len(schedule) <= most
    grid = sorted({need / 8 for need in needs} | {0.0})
    cheapest = min(
        price(edges, shares)
        for count in range(1, most + 1)
        for edges in itertools.combinations(range(1, layers), count)
        for shares in itertools.product(grid, repeat=count)
        if list(shares) == sorted(set(shares), reverse=True)
        and shares[0] < 1
        and all(
            have >= need
            for have, need in zip(by_layer(at_borders(edges, shares), layers), curve, strict=True)
        )
    )
    found = price(tuple(p.layer for p in schedule), tuple(p.share for p in schedule))
    assert found == pytest.approx(cheapest)


def cost(layers: int, text: float = 0.2) -> Callable[[PruneLayers], float]:
    def of(schedule: PruneLayers) -> float:
        return sum(text + share for share in by_layer(schedule, layers)) / (layers * (1 + text))

    return of


@given(st.floats(0.01, 100), st.floats(-50, 50), st.integers(1, 40))
def test_a_sigmoid_falls_and_is_a_half_in_its_middle(slope: float, middle: float, layers: int) -> None:
    curve = sigmoid(slope, middle, layers)
    assert len(curve) == layers
    assert all(a >= b for a, b in itertools.pairwise(curve))
    assert all(0 <= share <= 1 for share in curve)
    apart = ((share, layer - middle) for layer, share in enumerate(curve))
    assert all(abs(past) < 1e-6 or (share > 0.5) == (past < 0) for share, past in apart)


@pytest.mark.parametrize("layers", [5, 12, 28])
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.9])
def test_the_budget_is_spent_and_never_passed(layers: int, budget: float) -> None:
    of = cost(layers)
    for slope in (0.001, 4.0, 32.0):
        found = within_budget(slope, layers, 3, of, budget)
        assert found is not None
        check(found.schedule)
        spent = of(found.schedule)
        assert spent <= budget
        # an exit is a step, so that what is left may be one band's share
        assert spent > budget - 0.05 or min(p.share for p in found.schedule) in (0.0, 0.999)


def test_p_sigmoid_is_the_best_of_its_family() -> None:
    layers, budget = 8, 0.5
    of = cost(layers)
    # deep layers need little, shallow ones nearly all
    needs = [1, 1, 0.9, 0.6, 0.3, 0.1, 0.05, 0]

    def score(schedule: PruneLayers) -> float:
        seen = by_layer(schedule, layers)
        return -sum(max(0.0, need - have) for need, have in zip(needs, seen, strict=True))

    found = best_under_budget(score, of, budget, layers, 3)
    assert of(found.schedule) <= budget
    family = [within_budget(slope, layers, 3, of, budget) for slope in range(1, 65)]
    best = max(score(one.schedule) for one in family if one is not None)
    flat = within_budget(0.001, layers, 3, of, budget)
    assert flat is not None
    assert score(found.schedule) > score(flat.schedule)
    assert score(found.schedule) >= best - 0.05 * (best - score(flat.schedule))


def test_of_equals_the_flattest_is_taken() -> None:
    found = best_under_budget(lambda _: 1.0, cost(8), 0.6, 8, 2)
    assert found.slope == 0.001


def test_only_the_borders_that_there_are_are_used() -> None:
    borders = (2, 5, 6)
    found = best_under_budget(lambda _: 1.0, cost(8), 0.6, 8, 2, borders=borders)
    assert {p.layer for p in found.schedule} <= set(borders) and len(found.schedule) <= 2
    curve = [1.0, 1.0, 1.0, 0.7, 0.5, 0.5, 0.2, 0.2]
    covered = cover(curve, 3, borders)
    assert [(p.layer, p.share) for p in covered] == [(5, 0.5), (6, 0.2)]
    # 5 would give more layers the half, and leave cache empty
    assert cover(curve, 1, borders)[0].layer == 6
    with pytest.raises(SearchError, match="from layer 5 on"):
        best_under_budget(lambda _: 1.0, cost(8), 0.5, 8, 2, borders=(5, 6))


def test_a_budget_below_the_text_is_refused_with_what_there_is() -> None:
    with pytest.raises(SearchError, match=r"budget of 0.1: .* still costs 0.27"):
        best_under_budget(lambda _: 1.0, cost(8), 0.1, 8, 2)
