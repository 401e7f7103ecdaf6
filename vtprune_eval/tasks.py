# SPDX-License-Identifier: Apache-2.0
"""What is asked: the drawn scenes or pages of a split, or a user's own pictures and questions."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vllm_vtprune.errors import VTPruneError
from vtprune_eval.documents import Page
from vtprune_eval.drawn import is_held_out, make, questions_each

#: Kind of a question whose file names none.
OTHER = "other"


class DataError(VTPruneError, ValueError):
    """Questions that cannot be used; the message says where."""


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        picture: its number in `Questions.pictures`.
        kind: what is asked about.
        text: the question.
        answers: the answers that count as right.
        held_out: it is about a colour-shape pair or a layout of a page that training never shows.
    """

    picture: int
    kind: str
    text: str
    answers: tuple[str, ...]
    held_out: bool = False


@dataclass(frozen=True)
class Questions:
    """Pictures and what is asked about them.

    Attributes:
        name: for reports.
        pictures: P of them.
        asked: the questions, those of one picture together, in the pictures' order.
        shapes: drawn shapes per picture, [P]; None where nobody knows.
        owner: per picture and patch the number of the object it shows, negative where none, [P, N]; None
            where nobody knows.
    """

    name: str
    pictures: list[Image.Image]
    asked: list[Question]
    shapes: NDArray[np.int64] | None = None
    owner: NDArray[np.int64] | None = None
    picture_of: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        """Number the picture of each question, [Q]."""
        object.__setattr__(self, "picture_of", np.array([q.picture for q in self.asked], dtype=np.int64))

    @property
    def objects(self) -> NDArray[np.bool_] | None:
        """Which patches show an object, [P, N]."""
        return None if self.owner is None else self.owner >= 0


def drawn_questions(split: str, count: int, size: int, domain: str = "scenes") -> Questions:
    """One question of every kind about each of the first `count` pictures of a split, as training reports.

    Args:
        split: train, validation or test.
        count: pictures.
        size: side of a picture in pixels, the model's own so that nothing is resized.
        domain: scenes or documents.
    """
    scenes = [make(domain, split, index, size) for index in range(count)]
    asked = [
        Question(
            number,
            question.kind,
            question.text,
            (question.answer,),
            is_held_out(scene, question),
        )
        for number, scene in enumerate(scenes)
        for question in questions_each(scene, random.Random(f"0 {scene.index}"))
    ]
    return Questions(
        f"{split} split, {count} {domain}",
        [Image.fromarray(scene.pixels) for scene in scenes],
        asked,
        shapes=np.array([0 if isinstance(scene, Page) else len(scene.shapes) for scene in scenes]),
        owner=np.stack([scene.owner for scene in scenes]),
    )


def file_questions(path: Path, suffix: str = "") -> Questions:
    """Questions from a JSON-lines file: `image` (a path beside the file), `question`, `answer`, and `kind`.

    `answer` is a text or a list of texts that all count as right; `kind` may be absent.

    Args:
        path: the file.
        suffix: added to every question, such as LLaVA-1.5's "Answer the question using a single word or
            phrase."

    Raises:
        DataError: the file, a line or a picture cannot be read.
    """
    pictures: dict[str, list[Question]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
            text = " ".join(filter(None, (str(entry["question"]), suffix)))
            question = Question(0, str(entry.get("kind", OTHER)), text, tuple(map(str, answers)))
            pictures.setdefault(str(entry["image"]), []).append(question)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f'{path}, line {number}: each line must be an object such as {{"image": "cat.jpg", '
                f'"question": "What is this?", "answer": "cat"}} ({error!r}).'
            ) from None
    if not pictures:
        raise DataError(f"{path} holds no question.")
    asked = [
        Question(number, question.kind, question.text, question.answers)
        for number, questions in enumerate(pictures.values())
        for question in questions
    ]
    return Questions(path.name, [_open(path.parent / name) for name in pictures], asked)


def folder_pictures(folder: Path) -> Questions:
    """The pictures of a folder, in the order of their names, with no question about them.

    Raises:
        DataError: it is no folder, holds no picture, or one cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    endings = Image.registered_extensions()
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings]
    if not paths:
        raise DataError(f"{folder} holds no picture of a known ending, such as .jpg or .png.")
    return Questions(folder.name, [_open(path) for path in paths], [])


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"The picture {path} cannot be opened: {error}.") from None


def normalised(text: str) -> str:
    """Lower case without articles and signs, as answers are compared; a hyphen inside a word stays."""
    words = re.findall(r"\w+(?:[-'.]\w+)*", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def is_right(reply: str, question: Question) -> bool:
    """Whether a reply equals one of the answers once both are normalised."""
    return normalised(reply) in {normalised(answer) for answer in question.answers}
