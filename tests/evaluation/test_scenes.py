# SPDX-License-Identifier: Apache-2.0
"""Scenes: a pure function of their seed, with splits that cannot meet and labels that match the drawing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune_eval.scenes import (
    ALL_PAIRS,
    COLOURS,
    HELD_OUT_PAIRS,
    PATCH,
    PLACES,
    PRINTED,
    SCENES_PER_SPLIT,
    SEEN_PAIRS,
    SHAPES,
    SPLITS,
    Scene,
    make_scene,
    scene_seed,
)

indices = st.integers(0, SCENES_PER_SPLIT - 1)
splits = st.sampled_from(sorted(SPLITS))


def pairs_of(scene: Scene) -> set[tuple[str, str]]:
    return {(shape.colour, shape.shape) for shape in scene.shapes}


@given(splits, indices, splits, indices)
def test_two_scenes_share_a_seed_only_if_they_are_the_same(a: str, i: int, b: str, j: int) -> None:
    assert (scene_seed(a, i) == scene_seed(b, j)) == ((a, i) == (b, j))


@pytest.mark.parametrize("index", [-1, SCENES_PER_SPLIT])
def test_an_index_outside_the_split_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="outside the split"):
        scene_seed("train", index)


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        make_scene("dev", 0)


@pytest.mark.parametrize("size", [0, -14, 100])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of the patch size 14"):
        make_scene("train", 0, size)


@settings(max_examples=20, deadline=None)
@given(splits, indices)
def test_a_scene_is_a_pure_function_of_split_and_index(split: str, index: int) -> None:
    first, second = make_scene(split, index), make_scene(split, index)
    assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(first.owner, second.owner)
    assert (first.shapes, first.text) == (second.shapes, second.text)


def test_drawing_has_not_changed() -> None:
    """A checkpoint's accuracy holds for these pictures only: an edit that changes them has to train anew."""
    scene = make_scene("test", 0)
    words = repr((scene.shapes, scene.text)).encode()
    assert hashlib.sha256(words).hexdigest()[:16] == "1908f4a67d166642"


def test_no_picture_of_one_split_appears_in_another() -> None:
    seen = {split: {make_scene(split, index).pixels.tobytes() for index in range(40)} for split in SPLITS}
    assert all(len(pictures) == 40 for pictures in seen.values())
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]


def test_held_out_pairs_are_drawn_in_the_test_split_only() -> None:
    drawn = {split: set().union(*(pairs_of(make_scene(split, i)) for i in range(400))) for split in SPLITS}
    assert drawn["train"] == drawn["validation"] == set(SEEN_PAIRS)
    assert drawn["test"] == set(ALL_PAIRS)
    assert set(ALL_PAIRS) - set(SEEN_PAIRS) == HELD_OUT_PAIRS


def test_every_colour_and_every_shape_is_seen_in_training() -> None:
    assert {colour for colour, _ in SEEN_PAIRS} == set(COLOURS)
    assert {shape for _, shape in SEEN_PAIRS} == set(SHAPES)


@settings(max_examples=40, deadline=None)
@given(splits, indices, st.sampled_from((168, 336)))
def test_what_is_drawn_fits_the_description(split: str, index: int, size: int) -> None:
    scene = make_scene(split, index, size)
    assert scene.pixels.shape == (size, size, 3)
    assert scene.owner.shape == ((size // PATCH) ** 2,)
    assert 1 <= len(scene.shapes) <= 6
    assert len(pairs_of(scene)) == len(scene.shapes), "a colour-shape pair appears at most once"
    things = [*scene.shapes, *([scene.text] if scene.text else [])]
    assert len({(thing.row, thing.column) for thing in things}) == len(things), "one thing per cell"
    assert all(thing.place == PLACES[thing.row][thing.column] for thing in things)
    assert scene.text is None or scene.text.word in PRINTED
    assert set(scene.owner.tolist()) - {-1, -2} == set(range(len(things))), (
        "everything has a patch of its own"
    )


@settings(max_examples=40, deadline=None)
@given(indices)
def test_the_middle_of_a_shape_has_its_colour_and_its_patch_is_its_own(index: int) -> None:
    scene = make_scene("test", index)
    for number, shape in enumerate(scene.shapes):
        x, y = round(shape.x), round(shape.y)
        assert np.abs(scene.pixels[y, x].astype(int) - COLOURS[shape.colour]).max() <= 10
        assert scene.owner[(y // PATCH) * (168 // PATCH) + x // PATCH] == number


@settings(max_examples=20, deadline=None)
@given(splits, indices)
def test_prominence_is_one_where_an_object_shows_most_and_zero_on_the_background(
    split: str, index: int
) -> None:
    scene = make_scene(split, index)
    assert ((scene.prominence > 0) == (scene.owner != -1)).all()
    for number in range(len(scene.shapes)):
        assert scene.prominence[scene.owner == number].max() == 1


def test_a_size_class_says_which_of_two_shapes_is_larger() -> None:
    radii: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for index in range(300):
        for shape in make_scene("train", index).shapes:
            radii[shape.size].append(shape.radius)
    assert max(radii[0]) < min(radii[1])
    assert max(radii[1]) < min(radii[2])


def test_crowded_scenes_have_more_object_patches() -> None:
    scenes = [make_scene("train", index) for index in range(300)]
    few = [scene.object_patches.mean() for scene in scenes if len(scene.shapes) <= 2]
    many = [scene.object_patches.mean() for scene in scenes if len(scene.shapes) >= 5]
    assert np.mean(few) < 0.6 * np.mean(many)
