# SPDX-License-Identifier: Apache-2.0
"""The rules of the methods that merge, against slow and plain versions of them."""

import numpy as np
import pytest
import torch

from tests.helpers.slow_selection import (
    CPU,
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
from vllm_vtprune.selection import Selection, VisionFeatures, get_method, share_count
from vllm_vtprune.selection.methods.pool import cells
from vllm_vtprune.selection.methods.prumerge import outlier_counts
from vllm_vtprune.selection.methods.uniform import even_grid
from vllm_vtprune.settings import VisionSettings


def merged(selection: Selection) -> Array:
    assert selection.features is not None
    return np.asarray(selection.features.double().numpy())


@ratios
@image_numbers
def test_visionzip_averages_the_rest_into_contextual_tokens(number: int, ratio: float) -> None:
    given = features(number)
    patches, keys = field(given, "patches"), field(given, "keys")
    count = share_count(ratio, TOKENS)
    dominant = top(field(given, "cls_attention"), int(np.ceil(count * 27 / 32)))
    rest = [token for token in range(TOKENS) if token not in dominant]
    contextual = count - len(dominant)
    targets = [rest[int((j + 0.5) * len(rest) / contextual)] for j in range(contextual)]
    groups = {target: [target] for target in targets}
    for token in rest:
        if targets and token not in targets:
            groups[targets[int(cosines(keys[[token]], keys[targets])[0].argmax())]].append(token)
    selection = select("visionzip", given, ratio)
    assert kept(selection) == dominant
    expected = np.concatenate([patches[dominant], *(patches[groups[t]].mean(0)[None] for t in targets)])
    np.testing.assert_allclose(merged(selection), expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 9, 144, 577])
@pytest.mark.parametrize("aggressiveness", [0.3, 0.5, 0.6, 0.9, 1.0])
def test_prumerge_counts_the_outliers_of_the_box_plot(tokens: int, aggressiveness: float) -> None:
    scores = np.random.default_rng(tokens).lognormal(sigma=1.5, size=(6, tokens)).astype(np.float32)
    lower, upper = np.percentile(scores.astype(np.float64), [25, 75], axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        whisker = np.float64(1.5) * aggressiveness / np.float64(1 - aggressiveness)
    expected = (scores > upper + whisker * (upper - lower)).sum(axis=1)
    assert outlier_counts(torch.from_numpy(scores), aggressiveness).tolist() == expected.tolist()


def test_prumerge_keeps_its_own_count_under_aggressiveness_and_the_share_under_keep_ratio() -> None:
    given = features(0)
    assert given.cls_attention is not None
    outliers = int(outlier_counts(given.cls_attention[:, -1], 0.5)[0])
    assert outliers > 0
    for name, density in (("prumerge", 1), ("prumerge_plus", 4)):
        selection = get_method(name).select(given, VisionSettings(aggressiveness=0.5))[0]
        assert selection.count == density * outliers + 1
        assert len(selection.indices) == density * outliers
        assert select(name, given, 0.25).count == 10


@ratios
@image_numbers
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_prumerge_adds_neighbours_by_attention_and_a_summary(name: str, number: int, ratio: float) -> None:
    given = features(number)
    patches, keys, attention = (field(given, part) for part in ("patches", "keys", "cls_attention"))
    count = share_count(ratio, TOKENS)
    wanted = max(count - 1, 1)
    anchors = top(attention, wanted if name == "prumerge" else -(-wanted // 4))
    left = [token for token in range(TOKENS) if token not in anchors]
    spread = wanted - len(anchors)
    anchors = sorted(anchors + [left[int((j + 0.5) * len(left) / spread)] for j in range(spread)])
    dropped = [token for token in range(TOKENS) if token not in anchors]
    rows = []
    for anchor in anchors:
        others = [token for token in range(TOKENS) if token != anchor]
        near = np.argsort(-cosines(keys[[anchor]], keys[others])[0], kind="stable")[:32]
        rows.append(patches[anchor] + sum(attention[others[j]] * patches[others[j]] for j in near))
    if count > 1:
        rows.append((attention[dropped, None] * patches[dropped]).sum(axis=0))
    selection = select(name, given, ratio)
    assert kept(selection) == anchors
    np.testing.assert_allclose(merged(selection), np.stack(rows), atol=1e-5)


@ratios
@image_numbers
def test_aim_merge_halves_by_bipartite_matching(number: int, ratio: float) -> None:
    given = features(number)
    patches = field(given, "patches")
    count = share_count(ratio, TOKENS)
    groups = [[token] for token in range(TOKENS)]  # by where they stand; the last member is that place
    while len(groups) > count:
        means = np.stack([patches[group].mean(axis=0) for group in groups])
        similarity = cosines(means[::2], means[1::2])
        fewer = min(len(groups) - count, len(groups) // 2)
        for source in np.argsort(-similarity.max(axis=1), kind="stable")[:fewer]:
            groups[2 * int(similarity[source].argmax()) + 1][:0] = groups[2 * source]
            groups[2 * source] = []
        groups = [group for group in groups if group]
    selection = select("aim_merge", given, ratio)
    assert kept(selection) == [group[-1] for group in groups]
    np.testing.assert_allclose(
        merged(selection), np.stack([patches[group].mean(axis=0) for group in groups]), atol=1e-5
    )


@ratios
@image_numbers
def test_density_peaks_averages_clusters_around_dense_tokens_far_from_denser_ones(
    number: int, ratio: float
) -> None:
    given = features(number)
    patches = field(given, "patches")
    distance = np.linalg.norm(patches[:, None] - patches[None], axis=-1)
    distance /= distance.mean()
    density = np.exp(-np.square(np.sort(distance, axis=1)[:, :5]).mean(axis=1))
    delta = [
        min(
            (distance[token, other] for other in range(TOKENS) if density[other] > density[token]),
            default=distance.max(),
        )
        for token in range(TOKENS)
    ]
    centres = top(density * np.array(delta), share_count(ratio, TOKENS))
    clusters: dict[int, list[int]] = {centre: [] for centre in centres}
    for token in range(TOKENS):
        clusters[min(centres, key=lambda centre: distance[token, centre])].append(token)
    selection = select("density_peaks", given, ratio)
    assert kept(selection) == centres
    np.testing.assert_allclose(
        merged(selection),
        np.stack([patches[members].mean(axis=0) for members in clusters.values()]),
        atol=1e-5,
    )


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (7, 7), (3, 20), (20, 3)], ids=str)
def test_pool_parts_the_grid_into_even_boxes_around_the_even_grid(grid: tuple[int, int]) -> None:
    height, width = grid
    for count in range(1, height * width + 1):
        owner = cells(grid, count, CPU).reshape(grid).numpy()
        assert np.unique(owner).tolist() == list(range(count))
        sides = []
        for cell in range(count):
            rows, columns = np.nonzero(owner == cell)
            box = (np.ptp(rows) + 1, np.ptp(columns) + 1)
            assert len(rows) == box[0] * box[1]  # a full rectangle
            sides.append(box)
        for per_axis in zip(*sides, strict=True):
            # bands differ by one cell, so columns may differ by more than one patch, rows may not
            assert max(per_axis) <= 2 * min(per_axis) + 1
        middles = even_grid(grid, count, CPU).numpy()
        assert owner.reshape(-1)[middles].tolist() == list(range(count))


@ratios
@image_numbers
def test_pool_averages_each_cell(number: int, ratio: float) -> None:
    given = features(number)
    patches, count = field(given, "patches"), share_count(ratio, TOKENS)
    owner = cells(GRID, count, CPU).numpy()
    expected = np.stack([patches[owner == cell].mean(axis=0) for cell in range(count)])
    np.testing.assert_allclose(merged(select("pool", given, ratio)), expected, atol=1e-5)


def test_pool_halves_both_sides_at_a_quarter() -> None:
    patches = torch.arange(64.0).reshape(64, 1)
    given = VisionFeatures(patches[None], None, (8, 8), (0,))
    selection = get_method("pool").select(given, VisionSettings(keep_ratio=0.25))[0]
    expected = torch.nn.functional.avg_pool2d(patches.reshape(1, 1, 8, 8), 2).reshape(-1).tolist()
    assert merged(selection)[:, 0].tolist() == expected


def test_density_peaks_gives_every_cluster_one_token_whatever_the_scale() -> None:
    clusters = 10 * torch.eye(4)[torch.arange(TOKENS) % 4]
    noise = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 1.0, 1e3):
        given = VisionFeatures(((clusters + noise / 10) * scale)[None], None, GRID, (0,))
        selection = select("density_peaks", given, 0.1)
        assert sorted(index % 4 for index in kept(selection)) == [0, 1, 2, 3]
        for token, mean in zip(kept(selection), merged(selection) / scale, strict=True):
            expected = (clusters + noise / 10)[token % 4 :: 4].mean(dim=0).numpy()
            np.testing.assert_allclose(mean, expected, atol=1e-3)


def test_aim_merge_to_one_token_is_the_mean_of_all_patches() -> None:
    given = features(0)
    np.testing.assert_allclose(
        merged(select("aim_merge", given, 0.001))[0], field(given, "patches").mean(axis=0), atol=1e-5
    )


def test_merging_keeps_a_constant_image_constant_where_it_averages() -> None:
    given = features(0)
    flat = VisionFeatures(
        torch.full_like(given.patches, 3.0), None, GRID, (0,), given.cls_attention, keys=given.keys
    )
    for name in ("visionzip", "aim_merge", "density_peaks", "pool"):
        np.testing.assert_allclose(merged(select(name, flat, 0.3)), 3.0, rtol=1e-6)
