# SPDX-License-Identifier: Apache-2.0
"""Questions about a page, each with one exact answer of one word."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from vtprune_eval.documents import LAYOUTS, Page, Printed
from vtprune_eval.scene_questions import SceneQuestion

#: Kind of question to the kinds of page it is asked about.
PAGE_KINDS: Mapping[str, tuple[str, ...]] = {
    "word": ("lines",),
    "neighbour": ("lines",),
    "entry": ("form",),
    "cell": ("table",),
    "bar": ("chart",),
    "extreme": ("chart",),
    "place": tuple(LAYOUTS),
}
ORDINALS = ("first", "second", "third", "fourth")


def ask_page(page: Page, kind: str, rng: random.Random) -> SceneQuestion | None:
    """A question of this kind, or None where the page has nothing it could be about."""
    return _ASK[kind](page, rng) if page.kind in PAGE_KINDS[kind] else None


def ask_page_each(page: Page, rng: random.Random) -> list[SceneQuestion]:
    """One question of every kind that the page allows."""
    asked = (ask_page(page, kind, rng) for kind in PAGE_KINDS)
    return [question for question in asked if question is not None]


def ask_page_many(page: Page, count: int, rng: random.Random) -> list[SceneQuestion]:
    """`count` questions, each of any kind that the page allows."""
    possible = [kind for kind in PAGE_KINDS if ask_page(page, kind, random.Random(0)) is not None]
    asked = (ask_page(page, kind, rng) for kind in rng.choices(possible, k=count))
    return [question for question in asked if question is not None]


def _word(page: Page, rng: random.Random) -> SceneQuestion:
    subject = rng.choice(page.printed)
    line = [printed for printed in page.printed if printed.row == subject.row]
    which = "last" if subject is line[-1] and rng.random() < 0.5 else ORDINALS[subject.column]
    text = f"What is the {which} word of the {ORDINALS[subject.row]} line?"
    return SceneQuestion("word", text, subject.word)


def _neighbour(page: Page, rng: random.Random) -> SceneQuestion | None:
    pairs = [
        (one, other)
        for one, other in zip(page.printed, page.printed[1:], strict=False)
        if one.row == other.row
    ]
    if not pairs:
        return None
    before, after = rng.choice(pairs)
    if rng.random() < 0.5:
        return SceneQuestion("neighbour", f"Which word is after {before.word}?", after.word)
    return SceneQuestion("neighbour", f"Which word is before {after.word}?", before.word)


def _entry(page: Page, rng: random.Random) -> SceneQuestion:
    label = rng.choice(_labels(page))
    return SceneQuestion("entry", f"What is the value of {label.word}?", _value(page, label).word)


def _cell(page: Page, rng: random.Random) -> SceneQuestion:
    inner = [printed for printed in page.printed if printed.row and printed.column]
    subject = rng.choice(inner)
    row = next(p.word for p in page.printed if p.row == subject.row and p.column == 0)
    column = next(p.word for p in page.printed if p.row == 0 and p.column == subject.column)
    return SceneQuestion("cell", f"What is the value of {row} in {column}?", subject.word)


def _bar(page: Page, rng: random.Random) -> SceneQuestion:
    label = rng.choice(_labels(page))
    return SceneQuestion("bar", f"What is the value of {label.word}?", _value(page, label).word)


def _extreme(page: Page, rng: random.Random) -> SceneQuestion:
    by_value = sorted(_labels(page), key=lambda label: int(_value(page, label).word))
    if rng.random() < 0.5:
        return SceneQuestion("extreme", "Which is the largest?", by_value[-1].word)
    return SceneQuestion("extreme", "Which is the smallest?", by_value[0].word)


def _place(page: Page, rng: random.Random) -> SceneQuestion:
    # words are printed once a page, digits are not
    subject = rng.choice([printed for printed in page.printed if not printed.word.isdigit()])
    return SceneQuestion("place", f"Where is the word {subject.word}?", subject.place)


def _labels(page: Page) -> list[Printed]:
    return [printed for printed in page.printed if printed.column == 0]


def _value(page: Page, label: Printed) -> Printed:
    return next(p for p in page.printed if p.row == label.row and p.column == 1)


_ASK: dict[str, Callable[[Page, random.Random], SceneQuestion | None]] = {
    "word": _word,
    "neighbour": _neighbour,
    "entry": _entry,
    "cell": _cell,
    "bar": _bar,
    "extreme": _extreme,
    "place": _place,
}
