# SPDX-License-Identifier: Apache-2.0
"""Pages: a pure function of their seed, with labels that match the drawing and layouts for the test alone."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.model import UNKNOWN, VOCABULARY, words_of
from vtprune_eval.document_questions import PAGE_KINDS, ask_page, ask_page_each, ask_page_many
from vtprune_eval.documents import HELD_OUT_LAYOUTS, LAYOUTS, Page, make_page
from vtprune_eval.scenes import PATCH, PRINTED, SCENES_PER_SPLIT, SPLITS, make_scene

indices = st.integers(0, SCENES_PER_SPLIT - 1)
splits = st.sampled_from(sorted(SPLITS))
some = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    return [make_page("test", index) for index in range(200)]


@some
@given(splits, indices)
def test_a_page_is_a_pure_function_of_split_and_index(split: str, index: int) -> None:
    first, second = make_page(split, index), make_page(split, index)
    assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(first.owner, second.owner)
    assert (first.kind, first.layout, first.printed) == (second.kind, second.layout, second.printed)


def test_drawing_has_not_changed() -> None:
    """A checkpoint's accuracy holds for these pages only: an edit that changes them has to train anew."""
    pages = [make_page("test", index) for index in range(8)]
    words = repr([(page.kind, page.layout, page.printed) for page in pages]).encode()
    assert hashlib.sha256(words).hexdigest()[:16] == "f3a7cf0c626379b8"


def test_held_out_layouts_are_drawn_in_the_test_split_only(pages: list[Page]) -> None:
    for split in ("train", "validation"):
        assert {(p.kind, p.layout) for p in (make_page(split, i) for i in range(120))} == {
            (kind, seen) for kind, (seen, _) in LAYOUTS.items()
        }
    assert {(p.kind, p.layout) for p in pages} == {(kind, one) for kind in LAYOUTS for one in LAYOUTS[kind]}


@some
@given(splits, indices, st.sampled_from((168, 336)))
def test_what_is_printed_fits_the_description(split: str, index: int, size: int) -> None:
    page = make_page(split, index, size)
    assert page.pixels.shape == (size, size, 3)
    assert page.owner.shape == page.prominence.shape == ((size // PATCH) ** 2,)
    assert set(page.owner.tolist()) - {-1, -2} == set(range(len(page.printed))), (
        "all have patches of their own"
    )
    assert all(printed.word in PRINTED for printed in page.printed)
    words = [printed.word for printed in page.printed if not printed.word.isdigit()]
    assert len(set(words)) == len(words), "a word names one place"
    assert len({(p.row, p.column) for p in page.printed}) == len(page.printed)


@some
@given(indices)
def test_every_word_is_where_the_page_says_and_nowhere_else(index: int) -> None:
    page = make_page("test", index)
    for number, printed in enumerate(page.printed):
        rows, columns = np.divmod(np.flatnonzero(page.owner == number), 168 // PATCH)
        assert np.abs((rows + 0.5) * PATCH - 168 * printed.y).min() <= PATCH
        assert np.abs((columns + 0.5) * PATCH - 168 * printed.x).min() <= PATCH
    assert np.ptp(page.pixels.reshape(-1, 3), axis=0).max() > 100, "ink on paper"


def test_bars_are_as_long_as_their_values(pages: list[Page]) -> None:
    for page in (page for page in pages if page.kind == "chart"):
        patches, values = [], []
        for number, printed in enumerate(page.printed):
            if printed.column == 1:
                patches.append(int((page.owner == number).sum()))
                values.append(int(printed.word))
        for more, value in zip(patches, values, strict=True):
            # a unit is less than a patch
            assert all(more > less for less, other in zip(patches, values, strict=True) if value > other + 2)


def test_answers_are_one_known_word_each(pages: list[Page]) -> None:
    asked = [question for page in pages for question in ask_page_each(page, random.Random(page.index))]
    assert {question.kind for question in asked} == set(PAGE_KINDS)
    for question in asked:
        assert UNKNOWN not in words_of(question.text), question.text
        assert words_of(question.answer) == [VOCABULARY[question.answer]]


def test_the_same_question_about_a_page_has_one_answer(pages: list[Page]) -> None:
    for page in pages:
        answers: dict[str, set[str]] = {}
        for seed in range(30):
            for question in ask_page_each(page, random.Random(seed)):
                answers.setdefault(question.text, set()).add(question.answer)
        assert all(len(found) == 1 for found in answers.values()), answers


def test_questions_follow_the_page() -> None:
    page = next(p for p in (make_page("train", i) for i in range(100)) if p.kind == "table")
    head = {p.column: p.word for p in page.printed if p.row == 0}
    names = {p.row: p.word for p in page.printed if p.column == 0}
    cells = {(p.row, p.column): p.word for p in page.printed if p.row and p.column}
    for seed in range(20):
        question = ask_page(page, "cell", random.Random(seed))
        assert question is not None
        row, column = question.text.removeprefix("What is the value of ").removesuffix("?").split(" in ")
        place = next((r, c) for r in names for c in head if names[r] == row and head[c] == column)
        assert question.answer == cells[place]
    assert ask_page(page, "bar", random.Random(0)) is None
    assert len(ask_page_many(page, 9, random.Random(0))) == 9


def test_a_page_and_a_scene_of_one_number_have_nothing_in_common() -> None:
    for index in range(5):
        assert not np.array_equal(make_page("train", index).pixels, make_scene("train", index).pixels)
    assert {"indented", "above", "banded", "bars"} == HELD_OUT_LAYOUTS


@pytest.mark.parametrize("size", [0, 100])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of the patch size 14"):
        make_page("train", 0, size)
