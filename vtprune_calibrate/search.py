# SPDX-License-Identifier: Apache-2.0
"""The two searches of arXiv 2412.00556, "Searching Optimal Vision Token Reduction", as pure functions.

*G-Search* finds the fewest tokens at a tolerance: from shallow to deep, the least share of the visual tokens
that each layer needs. The paper uses Bayesian optimisation for each layer; where fewer tokens answer no
better, bisection finds the same.

*P-Sigmoid* finds the best answers under a budget: the share falls with depth along a sigmoid. The paper's
exact formula is not public. Ours is r(l) = 1 / (1 + exp(a (l - b))); the budget fixes b for each a, and a
alone is searched, on a grid that is refined around its best.

A curve over layers becomes a schedule of few prune layers, since each costs KV-cache groups. Nothing here
knows of models: answers and costs are functions that the caller gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from vllm_vtprune.errors import VTPruneError
from vllm_vtprune.kv_drop.schedule import MOST_PRUNE_LAYERS, PruneLayer, band_groups, band_sizes

#: Shares are searched in steps of one over this many, and written with three decimals.
STEPS = 32
#: Steepness of the sigmoids tried first: a times the number of layers. The first is all but flat.
SLOPES = (0.001, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_MOST_GROUPS = 8
#: Decoders of so many layers have few enough choices of prune layers to try all.
_SHALLOW = 12

PruneLayers = tuple[PruneLayer, ...]


class SearchError(VTPruneError, ValueError):
    """No schedule can do what is asked; the message says what to change."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        schedule: the prune layers.
        curve: share of the visual tokens that each decoder layer sees before it is cut into bands, [layers].
        slope: a times the number of layers, of P-Sigmoid.
    """

    schedule: PruneLayers
    curve: tuple[float, ...]
    slope: float | None = None


def least_shares(
    score: Callable[[tuple[float, ...]], float], borders: int, target: float, steps: int = STEPS
) -> tuple[float, ...]:
    """G-Search: the least share at each border, from the lowest up, that still scores the target.

    At border l the shares below are those found and all from l on are equal: the least of these that reaches
    the target is l's. The result reaches the target, and no share of it could be a step smaller from its
    border on, where fewer tokens never score better. It is the cheapest of all falling shares where a score
    depends on the worst layer alone; in general it is not.

    Args:
        score: of shares that do not rise, one for each border.
        borders: how many.
        target: the least score that is good enough.
        steps: shares are multiples of one over this.
    """
    found: list[int] = []
    enough = steps
    for index in range(borders):
        too_few = -1
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            shares = [*found, *[middle] * (borders - index)]
            if score(tuple(share / steps for share in shares)) >= target:
                enough = middle
            else:
                too_few = middle
        found.append(enough)
    return tuple(share / steps for share in found)


def cover(curve: Sequence[float], most: int, borders: Sequence[int] | None = None) -> PruneLayers:
    """The cheapest schedule that gives every layer at least its share of a falling curve.

    In a decoder of more than twelve layers borders lie where the curve falls, or evenly. Cost is what a
    prompt's KV cache takes, the part that vLLM's groups leave empty included.

    Args:
        curve: share of the visual tokens that each layer needs; the first layer has all, [layers].
        most: prune layers at most.
        borders: the only layers where they may be; None for any.
    """
    layers = len(curve)
    best: tuple[float, int] | None = None
    chosen: PruneLayers = ()
    # past the layer where the need falls, a border may leave less of the cache empty
    falls = [layer for layer in range(1, layers) if layers <= _SHALLOW or curve[layer] < curve[layer - 1]]
    anywhere = {*_choices(falls, most), *_even_choices(layers, most)}
    for edges in sorted(anywhere if borders is None else _choices(borders, most)):
        shares = [_up(curve[edge]) for edge in edges]
        schedule = _schedule(edges, shares)
        if len(schedule) < len(edges):  # nothing would leave at one of them
            continue
        sizes = band_sizes(layers, edges)
        stored = sum(size * share for size, share in zip(sizes, (1.0, *shares), strict=True))
        price = stored * (1 + band_groups(sizes)[1]), len(edges)
        if best is None or price < best:
            best, chosen = price, schedule
    return chosen


def sigmoid(slope: float, middle: float, layers: int) -> tuple[float, ...]:
    """Share of the visual tokens by layer, r(l) = 1 / (1 + exp(a (l - b))), [layers].

    Args:
        slope: a times the number of layers; above 0.
        middle: b, where the share is a half.
        layers: decoder layers.
    """
    return tuple(_logistic(slope / layers * (middle - layer)) for layer in range(layers))


def within_budget(
    slope: float,
    layers: int,
    most: int,
    cost: Callable[[PruneLayers], float],
    budget: float,
    borders: Sequence[int] | None = None,
) -> Found | None:
    """The schedule nearest to a sigmoid of that slope of all that spend the budget; None where none can.

    For every choice of prune layers b is bisected until the bands, each with the sigmoid's mean over its
    layers, cost no more than the budget; the choice nearest to its sigmoid in the mean square is taken.

    Args:
        slope: a times the number of layers.
        layers: decoder layers.
        most: prune layers at most.
        cost: of a schedule; it grows with the shares.
        budget: the most it may cost.
        borders: see `cover`.
    """
    best: tuple[float, Found] | None = None
    for edges in _even_choices(layers, most) if borders is None else _choices(borders, most):
        middle = _middle(slope, layers, edges, cost, budget)
        if middle is None:
            continue
        curve = sigmoid(slope, middle, layers)
        schedule = _banded(curve, edges)
        apart = sum((a - b) ** 2 for a, b in zip(by_layer(schedule, layers), curve, strict=True))
        if best is None or apart < best[0] - 1e-9:
            best = apart, Found(schedule, curve, slope)
    return None if best is None else best[1]


def best_under_budget(
    score: Callable[[PruneLayers], float],
    cost: Callable[[PruneLayers], float],
    budget: float,
    layers: int,
    most: int,
    slopes: Sequence[float] = SLOPES,
    refinements: int = 2,
    borders: Sequence[int] | None = None,
) -> Found:
    """P-Sigmoid: the schedule within a budget that scores best.

    Args:
        score: of a schedule.
        cost: of a schedule; it grows with the shares.
        budget: the most it may cost.
        layers: decoder layers.
        most: prune layers at most.
        slopes: those tried first, rising.
        refinements: how often the two gaps beside the best slope are halved.
        borders: see `cover`.

    Raises:
        SearchError: even an exit at the first layer costs more.
    """
    scored = cache(score)
    found = {slope: within_budget(slope, layers, most, cost, budget, borders) for slope in slopes}
    if not any(found.values()):
        first = 1 if borders is None else borders[0]
        least = cost((PruneLayer(first, 0.0, "vision"),))
        raise SearchError(
            f"no schedule costs as little as the budget of {budget:g}: with every visual token gone from "
            f"layer {first} on a prompt still costs {least:g}. Give a budget above that."
        )

    def best() -> float:
        # of equals the flattest
        able = [(scored(one.schedule), -slope) for slope, one in found.items() if one is not None]
        return -max(able)[1]

    for _ in range(refinements):
        tried, at = sorted(found), best()
        place = tried.index(at)
        for low, high in itertools.pairwise(tried[max(0, place - 1) : place + 2]):
            between = (low + high) / 2
            found[between] = within_budget(between, layers, most, cost, budget, borders)
    result = found[best()]
    assert result is not None
    return result


def by_layer(schedule: Sequence[PruneLayer], layers: int) -> list[float]:
    """Share of the visual tokens that each layer sees under a schedule of such shares, [layers]."""
    shares = [1.0, *(prune_layer.share for prune_layer in schedule)]
    edges = [prune_layer.layer for prune_layer in schedule]
    return [shares[sum(layer >= edge for edge in edges)] for layer in range(layers)]


def at_borders(borders: Sequence[int], shares: Sequence[float]) -> PruneLayers:
    """The schedule of these shares of the visual tokens, without the borders where nothing leaves."""
    return _schedule(borders, shares)


def _schedule(edges: Sequence[int], shares: Sequence[float]) -> PruneLayers:
    kept: list[PruneLayer] = []
    last = 1.0
    for edge, share in zip(edges, shares, strict=True):
        if share < last:
            kept.append(PruneLayer(edge, share, "vision"))
            last = share
    return tuple(kept)


def _choices(places: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Some of these layers, few first."""
    counts = range(1, min(most, MOST_PRUNE_LAYERS, len(places)) + 1)
    return [edges for count in counts for edges in itertools.combinations(places, count)]


@cache
def _even_choices(layers: int, most: int) -> list[tuple[int, ...]]:
    """Choices of prune layers that leave no KV-cache group partly empty and make no more than eight."""
    steps = [
        step for step in range(layers - 1, 0, -1) if layers % step == 0 and layers <= step * _MOST_GROUPS
    ]
    choices = [edges for step in steps for edges in _choices(range(step, layers, step), most)]
    even = [edges for edges in choices if not band_groups(band_sizes(layers, edges))[1]]
    # a depth that is a large prime number cannot be cut into bands of one size
    return list(dict.fromkeys(even)) or _choices(range(1, layers), min(most, 2))


def _middle(
    slope: float, layers: int, edges: Sequence[int], cost: Callable[[PruneLayers], float], budget: float
) -> float | None:
    """The largest b whose bands cost no more than the budget; None where the least does."""
    # a flat curve has no middle, only a height: a tiny slope moved far gives every height
    reach = 12 * layers / slope
    low, high = -reach, layers + reach
    if cost(_banded(sigmoid(slope, low, layers), edges)) > budget:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        if cost(_banded(sigmoid(slope, middle, layers), edges)) <= budget:
            low = middle
        else:
            high = middle
    return low


def _banded(curve: Sequence[float], edges: Sequence[int]) -> PruneLayers:
    """Bands that see the curve's mean over their layers, rounded down to three decimals."""
    bands = itertools.pairwise([*edges, len(curve)])
    shares = [math.floor(1000 * sum(curve[low:high]) / (high - low)) / 1000 for low, high in bands]
    return _schedule(edges, shares)


def _up(share: float) -> float:
    return math.ceil(1000 * share - 1e-9) / 1000


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
