# SPDX-License-Identifier: Apache-2.0
"""Questions: the answer follows from the scene alone, is one known word, and is the only one possible."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.data import ATTRIBUTES, collate, objects_of
from demo.model import IGNORE, UNKNOWN, VOCABULARY, words_of
from vtprune_eval.scene_questions import KINDS, SceneQuestion, ask, ask_each, ask_many
from vtprune_eval.scenes import HELD_OUT_PAIRS, SCENES_PER_SPLIT, SHAPES, Scene, make_scene

scenes = st.builds(make_scene, st.sampled_from(("train", "test")), st.integers(0, SCENES_PER_SPLIT - 1))


def answer_by_hand(scene: Scene, question: SceneQuestion) -> set[str]:
    """Every answer that the scene's description allows, worked out from the question's words alone."""
    words = question.text.lower().replace("?", "").replace(".", "").replace(",", "").split()
    shapes = [shape for shape in scene.shapes if shape.shape in words or not set(SHAPES) & set(words)]
    match question.kind:
        case "colour":
            return {shape.colour for shape in shapes}
        case "shape":
            return {shape.shape for shape in scene.shapes if shape.colour in words}
        case "count":
            return {str(len(scene.shapes))}
        case "read":
            return {scene.text.word} if scene.text else set()
        case "yes_no":
            return {"yes" if any(shape.colour in words for shape in shapes) else "no"}
        case "where" if "text" in words:
            return {scene.text.place} if scene.text else set()
        case "where":
            coloured = [shape for shape in shapes if shape.colour in words]
            return {shape.place for shape in coloured or shapes}
        case _:
            by = (lambda s: s.size) if "larger" in words else (lambda s: -s.row)
            best = max(map(by, shapes))
            return {shape.shape for shape in shapes if by(shape) == best} if len(shapes) == 2 else set()


@settings(max_examples=150, deadline=None)
@given(scenes, st.integers())
def test_the_answer_is_the_only_one_that_the_scene_allows(scene: Scene, seed: int) -> None:
    for question in ask_each(scene, random.Random(seed)):
        assert answer_by_hand(scene, question) == {question.answer}, question


@settings(max_examples=60, deadline=None)
@given(scenes, st.integers())
def test_every_word_is_in_the_vocabulary_and_every_answer_is_one_word(scene: Scene, seed: int) -> None:
    for question in ask_many(scene, 20, random.Random(seed)):
        assert UNKNOWN not in words_of(question.text), question
        assert words_of(question.answer) == [VOCABULARY[question.answer]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, SCENES_PER_SPLIT - 1), st.integers())
def test_training_never_names_a_held_out_pair(index: int, seed: int) -> None:
    """Not even in a question whose answer is no: the model would learn that those pairs never occur."""
    for question in ask_many(make_scene("train", index), 30, random.Random(seed)):
        assert not HELD_OUT_PAIRS.intersection(question.pairs)


def test_no_kind_can_be_answered_well_without_the_picture() -> None:
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for index in range(800):
        for question in ask_each(make_scene("test", index), random.Random(index)):
            answers[question.kind][question.answer] += 1
    most = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    assert most["yes_no"] < 0.56
    assert all(share < 0.25 for kind, share in most.items() if kind != "yes_no"), most


def test_a_compare_question_is_not_answered_by_the_order_of_its_words() -> None:
    first = total = 0
    for index in range(800):
        if (question := ask(make_scene("test", index), "compare", random.Random(index))) is not None:
            named = [word.strip("?,") for word in question.text.split() if word.strip("?,") in SHAPES]
            first, total = first + (question.answer == named[0]), total + 1
    assert 0.43 < first / total < 0.57


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_asks_the_same_question(kind: str) -> None:
    scene = make_scene("test", 3)
    assert ask(scene, kind, random.Random(5)) == ask(scene, kind, random.Random(5))


def test_patch_labels_name_the_object_that_covers_the_patch() -> None:
    drawn = [make_scene("train", index) for index in range(20)]
    batch = collate(drawn)
    assert batch.labels.shape == (20, 144, len(ATTRIBUTES))
    for number, scene in enumerate(drawn):
        table = torch.from_numpy(objects_of(scene))
        for patch, owner in enumerate(scene.owner):
            wanted = torch.full((5,), {-1: 0, -2: IGNORE}[owner]) if owner < 0 else table[owner]
            assert torch.equal(batch.labels[number, patch], wanted)
    assert all(0 <= int(batch.objects[..., k].max()) < count for k, count in enumerate(ATTRIBUTES.values()))
