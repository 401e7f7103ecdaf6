# SPDX-License-Identifier: Apache-2.0
"""Questions of a file as requests, in an order that a seed draws.

All settings together send every picture once before any comes again, and no two send the same one: answers
from the server's caches would pass for speed, above all where `auto` is for a while the preset beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.images import Picture, smaller
from vtprune_loadtest.questions import FileQuestion, open_picture, read_questions
from vtprune_loadtest.workload import IntRange, PreparedRequest, user_message


class QuestionBook:
    """The questions of a file, picture after picture without end."""

    def __init__(self, path: Path, suffix: str, seed: int) -> None:
        """Read the file and look at each picture's header.

        Raises:
            DataError: the file, a line or a picture cannot be read.
            LoadTestError: a picture's format has no MIME type.
        """
        rng = np.random.default_rng([seed, 3])
        by_picture: dict[Path, list[FileQuestion]] = {}
        for question in read_questions(path, suffix):
            by_picture.setdefault(question.image, []).append(question)
        self._mime_types = {image: _mime_type(image) for image in by_picture}
        asked = list(by_picture.values())
        self._rounds = [_shuffled(asked[at], rng) for at in rng.permutation(len(asked))]

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return len(self._rounds)

    def question(self, index: int) -> FileQuestion:
        """Question number `index` (0, 1, ...): of picture after picture, and each time another one."""
        turn, place = divmod(index, len(self._rounds))
        questions = self._rounds[place]
        return questions[turn % len(questions)]

    def picture(self, question: FileQuestion) -> Picture:
        """Its picture, byte for byte."""
        return Picture(self._mime_types[question.image], question.image.read_bytes())


class QuestionStream:
    """One setting's requests in order; they depend on no other setting."""

    def __init__(
        self,
        base: dict[str, Any],
        output_len: IntRange,
        seed: int,
        book: QuestionBook,
        setting: int,
        pixels: Sequence[float],
    ) -> None:
        """Send nothing yet.

        Args:
            base: see `WorkloadSpec`.
            output_len: most tokens of an answer.
            seed: of their number where it is a range.
            book: what is asked.
            setting: this one's number.
            pixels: each setting's share of a picture's pixels.
        """
        self._base, self._output_len, self._book = base, output_len, book
        self._lengths = np.random.default_rng([seed, 0])  # the same for every setting
        self._next, self._step, self._pixels = setting, len(pixels), pixels[setting]

    def next_request(self) -> PreparedRequest:
        """The next question's body."""
        question = self._book.question(self._next)
        is_repeat = self._next >= self._book.pictures
        self._next += self._step
        picture = self._book.picture(question)
        if self._pixels < 1:
            picture = smaller(picture, self._pixels)
        max_tokens = self._output_len.draw(self._lengths)
        body = user_message(self._base, [picture], question.text, max_tokens)
        return PreparedRequest(body, max_tokens, 1, int(is_repeat), question)


def _shuffled(questions: list[FileQuestion], rng: np.random.Generator) -> list[FileQuestion]:
    return [questions[at] for at in rng.permutation(len(questions))]


def _mime_type(path: Path) -> str:
    with open_picture(path) as image:
        mime_type = Image.MIME.get(image.format or "")
    if mime_type is None:
        raise LoadTestError(f"The picture {path} is of a format that a data URL cannot name: save it as PNG.")
    return mime_type
