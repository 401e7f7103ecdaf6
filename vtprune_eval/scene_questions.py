# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, each with one exact answer of one word."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vtprune_eval.scenes import Scene, Shape

KINDS = ("colour", "shape", "count", "where", "yes_no", "read", "compare")
EVENLY: Mapping[str, float] = MappingProxyType(dict.fromkeys(KINDS, 1.0))


@dataclass(frozen=True)
class SceneQuestion:
    """One question of a kind in `KINDS`, the word that answers it, and the colour-shape pairs it is about."""

    kind: str
    text: str
    answer: str
    pairs: tuple[tuple[str, str], ...] = ()


def ask(scene: Scene, kind: str, rng: random.Random) -> SceneQuestion | None:
    """A question of this kind, or None where the scene has nothing that identifies its subject uniquely."""
    return _ASK[kind](scene, rng)


def ask_each(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """One question of every kind that the scene allows."""
    asked = (ask(scene, kind, rng) for kind in KINDS)
    return [question for question in asked if question is not None]


def ask_many(
    scene: Scene, count: int, rng: random.Random, kinds: Mapping[str, float] = EVENLY
) -> list[SceneQuestion]:
    """`count` questions, drawn by weight from those of `kinds` (name to weight) that the scene allows."""
    possible = [kind for kind in kinds if ask(scene, kind, random.Random(0)) is not None]
    drawn = rng.choices(possible, [kinds[kind] for kind in possible], k=count)
    asked = (ask(scene, kind, rng) for kind in drawn)
    return [question for question in asked if question is not None]


def _pair(shape: Shape) -> tuple[str, str]:
    return shape.colour, shape.shape


def _unique(scene: Scene, attribute: str) -> list[Shape]:
    """The shapes that no other shape of the scene shares this attribute with."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [shape for shape in scene.shapes if values.count(getattr(shape, attribute)) == 1]


def _colour(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    if not (candidates := _unique(scene, "shape")):
        return None
    subject = rng.choice(candidates)
    return SceneQuestion("colour", f"What color is the {subject.shape}?", subject.colour, (_pair(subject),))


def _shape(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    if not (candidates := _unique(scene, "colour")):
        return None
    subject = rng.choice(candidates)
    form = rng.choice(("What shape is the {} object?", "What shape is {}?"))
    return SceneQuestion("shape", form.format(subject.colour), subject.shape, (_pair(subject),))


def _count(scene: Scene, rng: random.Random) -> SceneQuestion:
    form = rng.choice(("How many shapes are there?", "How many objects?"))
    return SceneQuestion("count", form, str(len(scene.shapes)))


def _where(scene: Scene, rng: random.Random) -> SceneQuestion:
    if scene.text is not None and rng.random() < 0.15:
        return SceneQuestion("where", "Where is the text?", scene.text.place)
    subject = rng.choice(scene.shapes)
    alone = [shape.shape for shape in scene.shapes].count(subject.shape) == 1
    name = subject.shape if alone else f"{subject.colour} {subject.shape}"
    return SceneQuestion("where", f"Where is the {name}?", subject.place, (_pair(subject),))


def _yes_no(scene: Scene, rng: random.Random) -> SceneQuestion:
    present = {_pair(shape) for shape in scene.shapes}
    if rng.random() < 0.5:
        pair, answer = rng.choice(sorted(present)), "yes"
    else:
        absent = [pair for pair in scene.pairs if pair not in present]
        # Half of the "no" questions share a colour or a shape with the scene: only the pair tells them apart.
        near = [pair for pair in absent if any(pair[0] == c or pair[1] == s for c, s in present)]
        pair, answer = rng.choice(near if near and rng.random() < 0.5 else absent), "no"
    return SceneQuestion(
        "yes_no", f"Is there {'an' if pair[0] == 'orange' else 'a'} {pair[0]} {pair[1]}?", answer, (pair,)
    )


def _read(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    if scene.text is None:
        return None
    return SceneQuestion("read", rng.choice(("What does the text say?", "Read the word.")), scene.text.word)


def _compare(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    named = _unique(scene, "shape")
    couples = {
        word: [(a, b) for a in named for b in named if getattr(a, attribute) != getattr(b, attribute)]
        for word, attribute in (("larger", "size"), ("higher", "row"))
    }
    if not (words := [word for word, found in couples.items() if found]):
        return None
    word = rng.choice(words)
    first, second = rng.choice(couples[word])
    # Row 0 is the top one, so the higher shape has the smaller row.
    ahead = first.size > second.size if word == "larger" else first.row < second.row
    text = f"Which is {word}, the {first.shape} or the {second.shape}?"
    return SceneQuestion(
        "compare", text, first.shape if ahead else second.shape, (_pair(first), _pair(second))
    )


_ASK: dict[str, Callable[[Scene, random.Random], SceneQuestion | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "yes_no": _yes_no,
    "read": _read,
    "compare": _compare,
}
