# SPDX-License-Identifier: Apache-2.0
"""A file of questions about pictures with their answers, and when a reply is right.

One format and one judgement for `vtprune eval`, `vtprune calibrate` and `vtprune loadtest`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vllm_vtprune.errors import VTPruneError

#: Kind of a question whose file names none.
OTHER = "other"


class DataError(VTPruneError, ValueError):
    """Questions that cannot be used; the message says where."""


@dataclass(frozen=True)
class FileQuestion:
    """One line of a file.

    Attributes:
        line: its number, from 1.
        image: the picture's path.
        kind: what is asked about.
        text: the question.
        answers: the answers that count as right.
    """

    line: int
    image: Path
    kind: str
    text: str
    answers: tuple[str, ...]


def read_questions(path: Path, suffix: str = "") -> list[FileQuestion]:
    """Questions from a JSON-lines file: `image` (a path beside the file), `question`, `answer`, and `kind`.

    `answer` is a text or a list of texts that all count as right; `kind` may be absent. Pictures are not
    opened.

    Args:
        path: the file.
        suffix: added to every question, such as LLaVA-1.5's "Answer the question using a single word or
            phrase."

    Raises:
        DataError: the file or a line cannot be read, or it holds no question.
    """
    questions: list[FileQuestion] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"{path} cannot be read: {reason}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
            text = " ".join(filter(None, (str(entry["question"]), suffix)))
            image, kind = path.parent / str(entry["image"]), str(entry.get("kind", OTHER))
            questions.append(FileQuestion(number, image, kind, text, tuple(map(str, answers))))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f'{path}, line {number}: each line must be an object such as {{"image": "cat.jpg", '
                f'"question": "What is this?", "answer": "cat"}} ({error!r}).'
            ) from None
    if not questions:
        raise DataError(f"{path} holds no question.")
    return questions


def open_picture(path: Path) -> Image.Image:
    """A picture, not yet decoded.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return Image.open(path)
    except OSError as error:
        raise DataError(f"The picture {path} cannot be opened: {error}.") from None


def normalised(text: str) -> str:
    """Lower case without articles and signs, as answers are compared; a hyphen inside a word stays."""
    words = re.findall(r"\w+(?:[-'.]\w+)*", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def is_right(reply: str, answers: Iterable[str]) -> bool:
    """Whether a reply equals one of the answers once both are normalised."""
    return normalised(reply) in {normalised(answer) for answer in answers}
