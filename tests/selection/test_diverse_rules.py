# SPDX-License-Identifier: Apache-2.0
"""The rules that weigh importance against likeness, against slow and plain versions of them."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.helpers.slow_selection import (
    GRID,
    TOKENS,
    Array,
    cosines,
    features,
    field,
    image_numbers,
    kept,
    ratios,
    select,
    top,
)
from vllm_vtprune.selection import VisionFeatures, share_count
from vllm_vtprune.selection.base import required


def attended_first(attention: Array) -> list[int]:
    return [int(token) for token in np.argsort(-attention, kind="stable")]


@ratios
@image_numbers
def test_scope_picks_the_largest_gain_in_coverage_times_attention(number: int, ratio: float) -> None:
    given = features(number)
    alike = cosines(field(given, "patches"), field(given, "patches"))
    attention = field(given, "cls_attention")

    def coverage(picks: list[int]) -> float:
        return float(alike[picks].max(axis=0, initial=0).sum())

    picks: list[int] = []
    while len(picks) < share_count(ratio, TOKENS):
        gains = {
            token: attention[token] * (coverage([*picks, token]) - coverage(picks))
            for token in range(TOKENS)
            if token not in picks
        }
        picks.append(max(gains, key=lambda token: (gains[token], -token)))
    assert kept(select("scope", given, ratio)) == sorted(picks)


@ratios
@image_numbers
def test_vispruner_takes_half_by_attention_and_removes_duplicates_for_the_rest(
    number: int, ratio: float
) -> None:
    given = features(number)
    alike = cosines(field(given, "patches"), field(given, "patches"))
    count = share_count(ratio, TOKENS)
    order = attended_first(field(given, "cls_attention"))
    important, rest = order[: math.ceil(count / 2)], order[math.ceil(count / 2) :]
    wanted = count - len(important)
    while wanted and len(rest) > wanted:
        first, second = rest[0::2], rest[1::2]
        first.sort(key=lambda token: -max(alike[token, other] for other in second))
        rest = first[min(8, len(rest) - wanted, math.ceil(len(first) / 2)) :] + second
    assert kept(select("vispruner", given, ratio)) == sorted(important + rest[:wanted])


def test_vispruner_keeps_the_one_of_its_kind_that_attention_alone_drops() -> None:
    kinds = torch.eye(2)[(torch.arange(TOKENS) == TOKENS - 1).long()]
    attention = torch.linspace(1, 0, TOKENS).expand(1, 2, TOKENS)
    given = VisionFeatures(kinds[None], None, GRID, (0,), attention)
    assert kept(select("vispruner", given, 0.1))[-1] == TOKENS - 1
    assert TOKENS - 1 not in kept(select("fastervlm", given, 0.1))


@ratios
@image_numbers
def test_holov_shares_the_count_among_crops_and_keeps_their_worthiest(number: int, ratio: float) -> None:
    given = features(number)
    patches, attention = field(given, "patches"), field(given, "cls_attention")
    # 40 tokens in 16 crops: eight of 3, then eight of 2
    crops = [list(range(3 * c, 3 * c + 3)) for c in range(8)]
    crops += [list(range(24 + 2 * c, 26 + 2 * c)) for c in range(8)]
    worth = {}
    for crop in crops:
        alike = cosines(patches[crop], patches[crop])
        variance = [np.var(np.delete(alike[at], at)) for at in range(len(crop))]
        scale = attention[crop].mean() / max(float(np.mean(variance)), 1e-12)
        worth |= {t: attention[t] + 0.09 * scale * v for t, v in zip(crop, variance, strict=True)}
    means = [float(np.mean([worth[token] for token in crop])) for crop in crops]
    count = share_count(ratio, TOKENS)
    exact = [count * mean / sum(means) for mean in means]
    quotas = [min(math.floor(share), len(crop)) for share, crop in zip(exact, crops, strict=True)]
    extra = 0
    while sum(quotas) < count:  # round after round, one more to each that has room, by remainder
        for c in sorted(range(16), key=lambda c: -(exact[c] - math.floor(exact[c]))):
            room = math.floor(exact[c]) + extra < len(crops[c])
            quotas[c] += room and sum(quotas) < count
        extra += 1
    expected = [
        token
        for crop, quota in zip(crops, quotas, strict=True)
        for token in sorted(crop, key=lambda token: -worth[token])[:quota]
    ]
    assert kept(select("holov", given, ratio)) == sorted(expected)


def test_holov_keeps_of_every_part_of_an_evenly_attended_picture() -> None:
    given = features(0)
    even = VisionFeatures(given.patches, None, GRID, (0,), torch.full((1, 2, TOKENS), 1 / TOKENS))
    chosen = kept(select("holov", even, 0.4))
    crops = [min(token, 24) // 3 + max(token - 24, 0) // 2 for token in chosen]
    assert sorted(crops) == list(range(16))


@ratios
@image_numbers
def test_dart_keeps_pivots_and_shares_the_rest_among_them(number: int, ratio: float) -> None:
    given = features(number)
    alike = cosines(field(given, "patches"), field(given, "patches"))
    count = share_count(ratio, TOKENS)
    lengths = np.abs(field(given, "keys")).sum(axis=1)
    pivots = [int(token) for token in np.argsort(-lengths, kind="stable")[: min(8, count)]]
    chosen = list(pivots)
    for done, pivot in enumerate(pivots):
        share = math.ceil((count - len(chosen)) / (len(pivots) - done))
        left = sorted(set(range(TOKENS)) - set(chosen))
        chosen += sorted(left, key=lambda token: alike[pivot, token])[:share]
    assert kept(select("dart", given, ratio)) == sorted(chosen)


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.1, 0.15])
@image_numbers
def test_cdpruner_picks_the_largest_conditional_volume(number: int, ratio: float) -> None:
    # up to 6 picks of patches of 6 dimensions: beyond, every determinant is 0
    given = features(number)
    patches = field(given, "patches")
    score = cosines(patches, field(given, "cls")[None])[:, 0]
    relevance = (score - score.min()) / (score.max() - score.min()) + 1e-6
    kernel = cosines(patches, patches) + 1e-3 * np.eye(TOKENS)
    kernel = relevance[:, None] * kernel * relevance[None]
    picks: list[int] = []
    while len(picks) < share_count(ratio, TOKENS):
        volumes = {
            token: np.linalg.det(kernel[np.ix_([*picks, token], [*picks, token])])
            for token in range(TOKENS)
            if token not in picks
        }
        picks.append(max(volumes, key=lambda token: (volumes[token], -token)))
    assert kept(select("cdpruner", given, ratio)) == sorted(picks)


@pytest.mark.parametrize("ratio", [0.05, 0.1])
@image_numbers
def test_cdpruner_takes_the_questions_relevance_where_there_is_one(number: int, ratio: float) -> None:
    given = features(number)
    # what the score would have been, asked as a question: the same choice, though the score is another
    score = torch.from_numpy(cosines(field(given, "patches"), field(given, "cls")[None])[:, 0]).float()
    asked = replace(given, cls=-required(given.cls), relevance=score[None])
    assert kept(select("cdpruner", asked, ratio)) == kept(select("cdpruner", given, ratio))
    turned = replace(given, relevance=-score[None])
    assert kept(select("cdpruner", turned, ratio)) != kept(select("cdpruner", given, ratio))
    assert kept(select("scope", turned, ratio)) == kept(select("scope", given, ratio))


def test_a_relevance_that_is_not_finite_or_of_another_shape_is_refused() -> None:
    given = features(0)
    with pytest.raises(ValueError, match="relevance to the question"):
        select("cdpruner", replace(given, relevance=torch.full((1, TOKENS), torch.nan)), 0.1)
    with pytest.raises(ValueError, match="relevance must be"):
        replace(given, relevance=torch.zeros(1, TOKENS + 1))


def test_cdpruner_prefers_the_relevant_and_the_unlike() -> None:
    # four kinds; of each, one token points a little more to CLS
    kinds = torch.eye(5)[torch.arange(TOKENS) % 4]
    kinds[[8, 17, 26, 35], 4] = 0.2
    given = VisionFeatures(kinds[None], torch.tensor([[0.4, 0.4, 0.4, 0.4, 1.0]]), GRID, (0,))
    assert kept(select("cdpruner", given, 0.1)) == [8, 17, 26, 35]


@pytest.mark.parametrize("name", ["scope", "cdpruner"])
def test_greedy_choices_are_nested(name: str) -> None:
    given = features(3)
    choices = [set(kept(select(name, given, count / TOKENS))) for count in range(1, TOKENS)]
    for smaller, larger in pairwise(choices):
        assert smaller < larger


def test_scope_covers_what_attention_alone_leaves_out() -> None:
    kinds = torch.eye(4)[torch.arange(TOKENS) // 10]
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1])[torch.arange(TOKENS) // 10].expand(1, 2, TOKENS)
    given = VisionFeatures(kinds[None], None, GRID, (0,), attention)
    assert kept(select("scope", given, 0.1)) == [0, 10, 20, 30]
    assert kept(select("fastervlm", given, 0.1)) == top(attention[0, -1].double().numpy(), 4) == [0, 1, 2, 3]
