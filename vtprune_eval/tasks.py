# SPDX-License-Identifier: Apache-2.0
"""What is asked: the drawn scenes or pages of a split, or a user's own pictures and questions."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtprune_eval.documents import Page
from vtprune_eval.drawn import is_held_out, make, questions_each
from vtprune_loadtest.questions import DataError, FileQuestion, open_picture, read_questions


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
    """The questions of a file and their pictures; see `vtprune_loadtest.questions.read_questions`.

    Raises:
        DataError: the file, a line or a picture cannot be read.
    """
    pictures: dict[Path, list[FileQuestion]] = {}
    for question in read_questions(path, suffix):
        pictures.setdefault(question.image, []).append(question)
    asked = [
        Question(number, question.kind, question.text, question.answers)
        for number, questions in enumerate(pictures.values())
        for question in questions
    ]
    return Questions(path.name, [_open(image) for image in pictures], asked)


def write_questions(questions: Questions, path: Path) -> None:
    """Write a file that `file_questions` reads, and its pictures as PNG in a folder of its name beside it."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{folder.name}/{number:05d}.png" for number in range(len(questions.pictures))]
    for name, picture in zip(names, questions.pictures, strict=True):
        picture.save(path.parent / name)
    entries = (
        {
            "image": names[asked.picture],
            "question": asked.text,
            "answer": list(asked.answers),
            "kind": asked.kind,
        }
        for asked in questions.asked
    )
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


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
    with open_picture(path) as image:
        try:
            return image.convert("RGB")
        except OSError as error:
            raise DataError(f"The picture {path} cannot be opened: {error}.") from None
