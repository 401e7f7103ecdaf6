# SPDX-License-Identifier: Apache-2.0
"""Each method's own rule, against a slow and plain version of it or a case worked out by hand."""

import numpy as np
import pytest
import torch

from tests.helpers.slow_selection import (
    CPU,
    GRID,
    TOKENS,
    cosines,
    features,
    field,
    image_numbers,
    kept,
    ratios,
    select,
    top,
)
from vllm_vtprune.selection import METHODS, VisionFeatures, get_method, share_count
from vllm_vtprune.selection.methods.random import splitmix64
from vllm_vtprune.selection.methods.uniform import even_grid
from vllm_vtprune.selection.ops import complement, evenly
from vllm_vtprune.settings import VisionSettings


@ratios
@image_numbers
def test_score_rankers_keep_the_best_by_their_score(number: int, ratio: float) -> None:
    given = features(number)
    count = share_count(ratio, TOKENS)
    cosine = cosines(field(given, "patches"), field(given, "cls")[None])[:, 0]
    layers = np.asarray(given.cls_attention)[0]
    expected = {
        "inflection": cosine,
        "topk": cosine,
        "fastervlm": layers[-1],
        "vtc_cls": layers[4:].astype(np.float64).sum(axis=0),
    }
    for name, scores in expected.items():
        assert kept(select(name, given, ratio)) == top(scores, count), name


@pytest.mark.parametrize("score", ["cls_attention", "received"])
def test_the_request_chooses_the_score(score: str) -> None:
    given = features(0)
    for name in ("inflection", "topk"):
        selection = get_method(name).select(given, VisionSettings(keep_ratio=0.2, score=score))[0]
        assert kept(selection) == top(field(given, score), 8)


@pytest.mark.parametrize("name", ["inflection", "topk", "fastervlm", "vtc_cls"])
def test_equal_scores_go_to_the_earlier_position(name: str) -> None:
    patches = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[torch.arange(TOKENS) % 2]
    attention = (torch.arange(TOKENS) % 2 == 0).float().expand(1, 3, TOKENS)
    given = VisionFeatures(patches[None], torch.tensor([[1.0, 0.0]]), GRID, (0,), attention)
    assert kept(select(name, given, 0.1)) == [0, 2, 4, 6]
    assert kept(select(name, given, 0.55)) == sorted([*range(0, TOKENS, 2), 1, 3])


def test_splitmix64_gives_its_published_numbers() -> None:
    # The reference implementation's first outputs from the seed 1234567.
    assert splitmix64(torch.arange(2), 1234567).tolist() == [6457827717110365317, 3203168211198807973]


def test_random_choices_are_nested_and_follow_the_image() -> None:
    def choice(seed: int, count: int, other_seed: int = 1) -> set[int]:
        given = VisionFeatures(torch.zeros(2, TOKENS, 3), None, GRID, (other_seed, seed))
        return set(kept(get_method("random").select(given, VisionSettings(keep_ratio=count / TOKENS))[1]))

    for count in range(1, TOKENS):
        assert choice(5, count) <= choice(5, count + 1)
    assert choice(5, 10, other_seed=9) == choice(5, 10)
    assert choice(5, 10) != choice(6, 10)
    assert choice(2**64 - 1, 10) != choice(2**63 - 1, 10)


def test_random_keeps_every_position_equally_often() -> None:
    seeds = tuple(range(4000))
    given = VisionFeatures(torch.zeros(len(seeds), TOKENS, 1), None, GRID, seeds)
    selections = get_method("random").select(given, VisionSettings(keep_ratio=0.25))
    counts = torch.stack([selection.indices for selection in selections]).flatten().bincount(minlength=TOKENS)
    # Binomial(4000, 1/4): mean 1000, standard deviation 27.
    assert counts.min() > 1000 - 5 * 27
    assert counts.max() < 1000 + 5 * 27


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (7, 7), (12, 12), (3, 20), (20, 3)], ids=str)
def test_a_uniform_grid_is_exact_and_even_for_any_count(grid: tuple[int, int]) -> None:
    height, width = grid
    for count in range(1, height * width + 1):
        positions = even_grid(grid, count, CPU).tolist()
        assert positions == sorted(set(positions))
        assert len(positions) == count
        assert 0 <= positions[0] <= positions[-1] < height * width
        per_row = np.bincount([position // width for position in positions])
        used = per_row[per_row > 0]
        assert used.max() - used.min() <= 1
        # No patch is farther from a kept one than the spacing of a square grid of this count would have it.
        points = np.array([divmod(position, width) for position in positions])
        every = np.array([divmod(position, width) for position in range(height * width)])
        gap = np.abs(every[:, None] - points[None]).max(axis=-1).min(axis=-1).max()
        assert gap <= max(np.sqrt(height * width / count), max(grid) / count) + 1


def test_a_uniform_grid_worked_out_by_hand() -> None:
    assert even_grid((12, 12), 4, CPU).tolist() == [39, 45, 111, 117]
    assert even_grid((2, 8), 4, CPU).tolist() == [9, 11, 13, 15]
    assert even_grid((4, 8), 8, CPU).tolist() == [9, 11, 13, 15, 25, 27, 29, 31]
    assert even_grid((3, 3), 5, CPU).tolist() == [0, 1, 2, 6, 8]


@ratios
@image_numbers
def test_divprune_is_greedy_max_min_distance(number: int, ratio: float) -> None:
    given = features(number)
    distance = 1 - cosines(field(given, "patches"), field(given, "patches"))
    first = int((distance + 9 * np.eye(TOKENS)).min(axis=1).argmax())
    picks = [first]
    while len(picks) < share_count(ratio, TOKENS):
        gaps = distance[:, picks].min(axis=1)
        gaps[picks] = -1
        picks.append(int(gaps.argmax()))
    assert kept(select("divprune", given, ratio)) == sorted(picks)


@ratios
@image_numbers
def test_inflection_diverse_lowers_the_scores_of_similar_tokens(number: int, ratio: float) -> None:
    given = features(number)
    patches = field(given, "patches")
    values = cosines(patches, field(given, "cls")[None])[:, 0]
    values = (values - values.min()) / (values.max() - values.min())
    centred = patches - patches.mean(axis=0)
    alike = cosines(centred, centred).clip(min=0)
    picks: list[int] = []
    while len(picks) < share_count(ratio, TOKENS):
        lowered = values * (1 - alike[picks].max(axis=0, initial=0) / 2)
        picks.append(max(set(range(TOKENS)) - set(picks), key=lambda token: (lowered[token], -token)))
    assert kept(select("inflection_diverse", given, ratio)) == sorted(picks)


def test_inflection_diverse_takes_one_of_each_kind_before_a_second() -> None:
    kinds = torch.eye(5)[torch.arange(TOKENS) // 8]
    cls = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.0]])
    given = VisionFeatures(kinds[None], cls, GRID, (0,))
    assert kept(select("inflection_diverse", given, 0.1)) == [0, 8, 16, 24]
    assert kept(select("inflection", given, 0.1)) == [0, 1, 2, 3]


@ratios
@image_numbers
def test_hiprune_keeps_anchors_then_neighbours_then_registers(number: int, ratio: float) -> None:
    given = features(number)
    middle, last = field(given, "received_midway"), field(given, "received")
    count = share_count(ratio, TOKENS)
    height, width = GRID
    anchors = top(middle, -(-count // 50))
    buffers = set()
    for row, column in (divmod(anchor, width) for anchor in anchors):
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= near[0] < height and 0 <= near[1] < width:
                buffers.add(near[0] * width + near[1])
    rank = [(token in anchors, token in buffers, last[token]) for token in range(TOKENS)]
    expected = sorted(sorted(range(TOKENS), key=lambda token: rank[token], reverse=True)[:count])
    assert kept(select("hiprune", given, ratio)) == expected


def test_methods_disagree() -> None:
    """No two are one rule under two names; of a picture, `topk` and time's rule are `inflection`."""
    given, same_here = features(1), ("topk", "inflection_temporal")
    others = [name for name in METHODS if name not in same_here]
    outcomes = {name: select(name, given, 0.3).gather(given.patches[0]) for name in others}
    for name, outcome in outcomes.items():
        same = [other for other, value in outcomes.items() if torch.equal(value, outcome)]
        assert same == [name]


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_evenly_and_complement_part_a_range(size: int) -> None:
    for count in range(size + 1):
        at = evenly(count, size, CPU)
        left = complement(at, size)
        assert at.tolist() == sorted(set(at.tolist()))
        assert sorted(at.tolist() + left.tolist()) == list(range(size))
        assert left.tolist() == sorted(left.tolist())
        assert len(at) == count
