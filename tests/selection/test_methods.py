# SPDX-License-Identifier: Apache-2.0
"""What every selection method must hold, over the registry: a new method is tested by being listed there."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.selection_cases import (
    GRID,
    OPTIONAL,
    OWN_COUNT,
    TOKENS,
    batch,
    budgets,
    every_method,
    image,
)
from vllm_vtprune.selection import (
    METHODS,
    SCORES,
    Selection,
    VisionFeatures,
    get_method,
    needs_of,
    share_count,
)
from vllm_vtprune.settings import VisionSettings


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and wait for them where others hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(one: Selection, other: Selection) -> None:
    assert torch.equal(one.indices, other.indices)
    assert (one.features is None) == (other.features is None)
    if one.features is not None and other.features is not None:
        torch.testing.assert_close(one.features, other.features)


def assert_keeps_all(selection: Selection, tokens: int) -> None:
    assert selection.indices.tolist() == list(range(tokens))
    assert selection.features is None


@every_method
@pytest.mark.parametrize(
    "budget", [VisionSettings(), VisionSettings(aggressiveness=0.0), VisionSettings(keep_ratio=1.0)], ids=str
)
def test_off_is_a_true_no_op(name: str, budget: VisionSettings) -> None:
    # Nothing but the patches is there, and they are not even looked at.
    patches = torch.full((2, TOKENS, 4), torch.nan)
    selections = get_method(name).select(VisionFeatures(patches, None, GRID, (0, 1)), budget)
    for selection, of_image in zip(selections, patches, strict=True):
        assert_keeps_all(selection, TOKENS)
        assert selection.gather(of_image) is of_image


@every_method
@budgets
def test_the_selection_is_well_formed(name: str, budget: VisionSettings) -> None:
    features = batch([image(seed) for seed in range(4)])
    selections = get_method(name).select(features, budget)
    assert len(selections) == 4
    for selection, patches in zip(selections, features.patches, strict=True):
        indices = selection.indices.tolist()
        assert selection.indices.dtype == torch.int64
        assert indices == sorted(set(indices))
        assert 0 <= indices[0] <= indices[-1] < TOKENS
        assert min(budget.min_tokens, TOKENS) <= selection.count <= TOKENS
        kept = selection.gather(patches)
        assert kept.shape == (selection.count, patches.shape[1])
        assert torch.isfinite(kept).all()
        if selection.features is None:
            assert torch.equal(kept, patches[selection.indices])
        else:
            assert len(indices) <= selection.count


@every_method
@budgets
def test_an_image_alone_is_treated_as_in_a_batch(name: str, budget: VisionSettings) -> None:
    images = [image(seed) for seed in range(3)]
    together = get_method(name).select(batch(images), budget)
    for one, selection in zip(images, together, strict=True):
        assert_same(get_method(name).select(one, budget)[0], selection)


@every_method
@budgets
def test_the_same_twice_is_the_same(name: str, budget: VisionSettings) -> None:
    features = batch([image(seed) for seed in range(3)])
    first, second = (get_method(name).select(features, budget) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.gather(features.patches[0]), other.gather(features.patches[0]))


@every_method
@given(seed=st.integers(0, 1000), one=st.floats(0, 1), other=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_the_count_never_rises_with_aggressiveness(name: str, seed: int, one: float, other: float) -> None:
    lower, higher = sorted((one, other))
    gentle, harsh = (
        get_method(name).select(image(seed), VisionSettings(aggressiveness=a))[0].count
        for a in (lower, higher)
    )
    assert gentle >= harsh


@every_method
@pytest.mark.parametrize("least", [1, 5, TOKENS, TOKENS + 1])
def test_the_most_aggressive_keeps_the_minimum(name: str, least: int) -> None:
    for selection in get_method(name).select(
        batch([image(1), image(2)]), VisionSettings(aggressiveness=1.0, min_tokens=least)
    ):
        assert selection.count == min(least, TOKENS)


@every_method
@given(ratio=st.integers(1, 1000), rows=st.integers(1, 7), columns=st.integers(1, 7), least=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_a_fixed_share_is_exact(name: str, ratio: int, rows: int, columns: int, least: int) -> None:
    budget = VisionSettings(keep_ratio=ratio / 1000, min_tokens=least)
    selection = get_method(name).select(image(ratio, (rows, columns)), budget)[0]
    assert selection.count == share_count(ratio / 1000, rows * columns, least)


@every_method
@pytest.mark.parametrize(
    "budget",
    [VisionSettings(aggressiveness=0.5), VisionSettings(aggressiveness=1.0), VisionSettings(keep_ratio=0.1)],
    ids=str,
)
def test_an_image_of_one_patch_keeps_it(name: str, budget: VisionSettings) -> None:
    assert_keeps_all(get_method(name).select(image(3, (1, 1)), budget)[0], 1)


def _plain() -> VisionFeatures:
    """An image whose patches are all alike."""
    return VisionFeatures(
        patches=torch.ones(1, TOKENS, 8),
        cls=torch.arange(8.0)[None],
        grid=GRID,
        seeds=(7,),
        cls_attention=torch.full((1, 6, TOKENS), 1 / TOKENS),
        received=torch.full((1, 1, TOKENS), 1 / TOKENS),
        received_midway=torch.full((1, 1, TOKENS), 1 / TOKENS),
        keys=torch.ones(1, TOKENS, 8),
    )


@every_method
@pytest.mark.parametrize(("most", "least"), [(0.5, 1), (0.165, 1), (0.1, 9), (0.001, 1)])
def test_no_more_than_the_ceiling_stays_though_the_curve_has_no_knee(
    name: str, most: float, least: int
) -> None:
    free = VisionSettings(aggressiveness=0.2, min_tokens=least)
    bounded = dataclasses.replace(free, max_share=most)
    ceiling = share_count(most, TOKENS, least)
    assert get_method(name).select(_plain(), bounded)[0].count == ceiling
    features = batch([image(1), image(2)])
    for selection, unbounded in zip(
        get_method(name).select(features, bounded), get_method(name).select(features, free), strict=True
    ):
        assert selection.count == min(unbounded.count, ceiling)


@every_method
@pytest.mark.parametrize("aggressiveness", [0.2, 0.5, 1.0])
def test_an_image_whose_patches_are_all_alike_stays_whole(name: str, aggressiveness: float) -> None:
    plain = _plain()
    assert_keeps_all(get_method(name).select(plain, VisionSettings(aggressiveness=aggressiveness))[0], TOKENS)
    # Beside an image that is pruned, too.
    assert_keeps_all(
        get_method(name).select(_beside(plain), VisionSettings(aggressiveness=aggressiveness))[0], TOKENS
    )


def _beside(plain: VisionFeatures) -> VisionFeatures:
    other = image(11)
    fields = {name: getattr(other, name)[..., :8] for name in ("patches", "cls", "keys")}
    return batch([plain, dataclasses.replace(other, **fields)])


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "budget", [VisionSettings(aggressiveness=0.5), VisionSettings(keep_ratio=0.22)], ids=str
)
def test_every_dtype_of_the_tower_is_served(name: str, dtype: torch.dtype, budget: VisionSettings) -> None:
    features = image(5, dtype=dtype)
    selection = get_method(name).select(features, budget)[0]
    assert selection.gather(features.patches[0]).dtype == dtype
    # Large values, whose squares float16 cannot hold.
    scaled = dataclasses.replace(features, patches=features.patches * 2000)
    assert get_method(name).select(scaled, budget)[0].count >= 1


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OWN_COUNT])
@given(seed=st.integers(0, 1000), aggressiveness=st.floats(0, 1), score=st.sampled_from(sorted(SCORES)))
@settings(max_examples=20, deadline=None)
def test_methods_compare_at_equal_counts(name: str, seed: int, aggressiveness: float, score: str) -> None:
    features, budget = (
        batch([image(seed), image(seed + 1)]),
        VisionSettings(aggressiveness=aggressiveness, score=score),
    )
    expected = [selection.count for selection in get_method("inflection").select(features, budget)]
    assert [selection.count for selection in get_method(name).select(features, budget)] == expected


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@budgets
def test_non_finite_values_are_refused_or_have_no_effect(
    name: str, bad: float, budget: VisionSettings
) -> None:
    method = get_method(name)
    clean = method.select(batch([image(seed) for seed in range(3)]), budget)
    for field in ("patches", *OPTIONAL):
        poisoned = batch([image(seed) for seed in range(3)])
        getattr(poisoned, field)[1].view(-1)[-1] = bad
        try:
            selections = method.select(poisoned, budget)
        except ValueError as error:
            assert re.match(r"NaN or infinity in .* of image 1", str(error))
        else:
            assert field not in {"patches", *method.needs}
            for one, other in zip(clean, selections, strict=True):
                assert_same(one, other)


@every_method
def test_a_missing_field_is_named(name: str) -> None:
    bare = VisionFeatures(image(0).patches, None, GRID, (0,))
    for field in get_method(name).needs:
        with pytest.raises(ValueError, match=f"{name}.*{field}"):
            get_method(name).select(bare, VisionSettings(keep_ratio=0.5))
    if not get_method(name).needs:
        with pytest.raises(ValueError, match=r"'cosine' needs cls.*choose among cls_attention, received"):
            get_method(name).select(bare, VisionSettings(aggressiveness=0.5))


def test_names_are_looked_up_or_listed() -> None:
    assert get_method("inflection").name == "inflection"
    with pytest.raises(ValueError, match=r"unknown method 'best': choose one of inflection, .*visionzip"):
        get_method("best")
    with pytest.raises(
        ValueError, match=r"unknown score 'norm': choose one of cls_attention, cosine, received"
    ):
        get_method("topk").select(image(1), VisionSettings(aggressiveness=0.5, score="norm"))
    for name, method in METHODS.items():
        assert name == method.name
        assert needs_of([name]) == method.needs <= set(OPTIONAL)
    assert needs_of(["visionzip", "hiprune"]) == {"cls_attention", "keys", "received", "received_midway"}
    assert needs_of([]) == frozenset()


@pytest.mark.parametrize(
    "change",
    [
        {"patches": torch.zeros(TOKENS, 16)},
        {"patches": torch.zeros(1, 0, 16)},
        {"grid": (6, 9)},
        {"seeds": (1, 2)},
        {"cls": torch.zeros(1, 15)},
        {"cls_attention": torch.zeros(1, TOKENS)},
        {"cls_attention": torch.zeros(1, 0, TOKENS)},
        {"received": torch.zeros(2, 1, TOKENS)},
        {"received_midway": torch.zeros(1, TOKENS)},
        {"keys": torch.zeros(1, TOKENS - 1, 16)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_features_whose_shapes_disagree_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|does not hold|seeds for"):
        dataclasses.replace(image(0), **change)
