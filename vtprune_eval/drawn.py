# SPDX-License-Identifier: Apache-2.0
"""Scenes and pages alike: what is drawn to train the demo model on and to ask it about."""

from __future__ import annotations

import random
from collections.abc import Mapping

from vtprune_eval.document_questions import PAGE_KINDS, ask_page_each, ask_page_many
from vtprune_eval.documents import HELD_OUT_LAYOUTS, Page, make_page
from vtprune_eval.scene_questions import EVENLY, KINDS, SceneQuestion, ask_each, ask_many
from vtprune_eval.scenes import BASE_SIZE, HELD_OUT_PAIRS, Scene, make_scene

Drawn = Scene | Page
DOMAINS = ("scenes", "documents")
ALL_KINDS = (*KINDS, *PAGE_KINDS)
PAGE_EVERY = 3
"""Of the pictures of both domains, one in so many is a page."""


def draw(split: str, index: int, size: int = BASE_SIZE) -> Drawn:
    """Picture `index` of a split, both domains together."""
    number, rest = divmod(index, PAGE_EVERY)
    if rest == PAGE_EVERY - 1:
        return make_page(split, number, size)
    return make_scene(split, number * (PAGE_EVERY - 1) + rest, size)


def make(domain: str, split: str, index: int, size: int = BASE_SIZE) -> Drawn:
    """Picture `index` of a split of one domain.

    Raises:
        ValueError: there is no such domain, split or index.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    return (make_scene if domain == "scenes" else make_page)(split, index, size)


def questions_each(drawn: Drawn, rng: random.Random) -> list[SceneQuestion]:
    """One question of every kind that the picture allows."""
    return ask_page_each(drawn, rng) if isinstance(drawn, Page) else ask_each(drawn, rng)


def questions_many(
    drawn: Drawn, count: int, rng: random.Random, kinds: Mapping[str, float] = EVENLY
) -> list[SceneQuestion]:
    """`count` questions; about a scene by the weights in `kinds`, about a page evenly."""
    if isinstance(drawn, Page):
        return ask_page_many(drawn, count, rng)
    return ask_many(drawn, count, rng, kinds)


def is_held_out(drawn: Drawn, question: SceneQuestion) -> bool:
    """Whether the question is about a colour-shape pair, or a page's layout, that training never shows."""
    if isinstance(drawn, Page):
        return drawn.layout in HELD_OUT_LAYOUTS
    return bool(HELD_OUT_PAIRS.intersection(question.pairs))
