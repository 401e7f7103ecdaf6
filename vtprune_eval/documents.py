# SPDX-License-Identifier: Apache-2.0
"""Drawn pages: lines of printed words, forms, small tables and bar charts, where pruning fails first.

A page is a pure function of its split, its index and the image size, like a scene (`vtprune_eval.scenes`).
Every kind has two layouts, of which the one in `HELD_OUT_LAYOUTS` is drawn in the test split only. Every word
appears once a page, so it names one place. Printed in Pillow's own font, so that no machine draws it
otherwise. `vtprune_eval.document_questions` asks about pages.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from vtprune_eval.scenes import (
    BASE_SIZE,
    DIGITS,
    PLACES,
    WORDS,
    check_size,
    font,
    patch_owner,
    scene_seed,
)

LAYOUTS: dict[str, tuple[str, str]] = {
    "lines": ("left-aligned", "indented"),
    "form": ("beside", "above"),
    "table": ("ruled", "banded"),
    "chart": ("columns", "bars"),
}
"""Kind of page to its layouts: the one of every split, and the one of the test split alone."""
HELD_OUT_LAYOUTS = frozenset(held_out for _, held_out in LAYOUTS.values())

_TEXT = 15
"""Font size in pixels of a page of `BASE_SIZE`."""
_MARGIN = 8


@dataclass(frozen=True)
class Printed:
    """One printed word or digit, or one bar of a chart whose `word` is its value.

    `row` and `column` are its line and its place in the line; of a table its row and column, 0 for the head;
    of a form and a chart the row or bar it belongs to, and 0 for the label, 1 for the value. `x` and `y` are
    its middle as a share of the page.
    """

    word: str
    row: int
    column: int
    x: float
    y: float

    @property
    def place(self) -> str:
        """Which ninth of the page it is in."""
        return PLACES[min(2, int(3 * self.y))][min(2, int(3 * self.x))]


@dataclass(frozen=True)
class Page:
    """A drawn page and everything that is printed on it; the arrays are as in `Scene`."""

    split: str
    index: int
    pixels: npt.NDArray[np.uint8]
    owner: npt.NDArray[np.int64]
    prominence: npt.NDArray[np.float32]
    kind: str
    layout: str
    printed: tuple[Printed, ...]

    @property
    def object_patches(self) -> npt.NDArray[np.bool_]:
        """Which patches show something printed, shape [patches]."""
        return self.owner >= 0


class _Sheet:
    """The page while it is drawn: the picture, whose patch is whose, and what was printed."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng, self.size, self.scale = rng, size, size / BASE_SIZE
        paper, ink = rng.randint(215, 255), rng.randint(0, 60)
        self.paper = tuple(max(0, paper - rng.randint(0, 12)) for _ in range(3))
        self.ink = (ink, ink, min(255, ink + rng.randint(0, 60)))
        self.image = Image.new("RGB", (size, size), self.paper)
        self.marks = Image.new("L", (size, size), 0)
        self.draw, self.mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.marks)
        self.printed: list[Printed] = []
        self.font = font(round(_TEXT * self.scale))

    def write(self, word: str, row: int, column: int, x: float, y: float) -> None:
        """Print a word with its middle at (x, y), in pixels of a page of `BASE_SIZE`."""
        self._note(word, row, column, x, y)
        at = (x * self.scale, y * self.scale)
        self.draw.text(at, word, fill=self.ink, font=self.font, anchor="mm")
        # the word's box and not its ink: a digit's strokes are too thin for a patch to count as its own
        box = self.draw.textbbox(at, word, font=self.font, anchor="mm")
        self.mark.rectangle(box, fill=len(self.printed))

    def bar(self, value: str, row: int, box: tuple[float, float, float, float]) -> None:
        """Fill a box (left, top, right, bottom) that stands for a value."""
        left, top, right, bottom = (side * self.scale for side in box)
        self._note(value, row, 1, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        fill = tuple(self.rng.randint(40, 180) for _ in range(3))
        self.draw.rectangle((left, top, right, bottom), fill=fill)
        self.mark.rectangle((left, top, right, bottom), fill=len(self.printed))

    def caption(self, text: str, x: float, y: float) -> None:
        """Print what no question asks about, such as a number at an axis."""
        self.draw.text((x * self.scale, y * self.scale), text, fill=self.ink, font=self.font, anchor="mm")

    def rule(self, *ends: float) -> None:
        """A thin line."""
        shade = tuple((one + 2 * other) // 3 for one, other in zip(self.ink, self.paper, strict=True))
        self.draw.line([end * self.scale for end in ends], fill=shade, width=max(1, round(self.scale)))

    def _note(self, word: str, row: int, column: int, x: float, y: float) -> None:
        self.printed.append(Printed(word, row, column, x / BASE_SIZE, y / BASE_SIZE))


def make_page(split: str, index: int, size: int = BASE_SIZE) -> Page:
    """Draw page `index` of a split as a `size` x `size` picture (a multiple of `PATCH`).

    Raises:
        ValueError: an unknown split, an index or a size that cannot be.
    """
    check_size(size)
    rng = random.Random(f"page {scene_seed(split, index)}")
    kind = rng.choice(sorted(LAYOUTS))
    layout = rng.choice(LAYOUTS[kind]) if split == "test" else LAYOUTS[kind][0]
    sheet = _Sheet(rng, size)
    _DRAW[kind](sheet, layout)
    owner, prominence = patch_owner(np.asarray(sheet.marks), len(sheet.printed))
    pixels = np.asarray(sheet.image)
    return Page(split, index, pixels, owner, prominence, kind, layout, tuple(sheet.printed))


def _lines(sheet: _Sheet, layout: str) -> None:
    rng = sheet.rng
    lengths = [rng.randint(1, 3) for _ in range(rng.randint(2, 4))]
    words = iter(_some_words(rng, sum(lengths)))
    y = _MARGIN + rng.uniform(8, 24)
    for row, length in enumerate(lengths):
        x = 28 + (12 * row + rng.uniform(0, 8) if layout == "indented" else 0)
        for column in range(length):
            sheet.write(next(words), row, column, x + 40 * column, y)
        y += rng.uniform(22, 34)


def _form(sheet: _Sheet, layout: str) -> None:
    rng = sheet.rng
    labels = _some_words(rng, rng.randint(2, 4))
    step = (BASE_SIZE - 2 * _MARGIN) / len(labels)
    for row, label in enumerate(labels):
        y = _MARGIN + (row + 0.5) * step
        value = rng.choice(DIGITS)
        if layout == "above":
            sheet.write(label, row, 0, 40, y - 9)
            sheet.write(value, row, 1, 40, y + 9)
        else:
            sheet.write(label, row, 0, 36, y)
            sheet.rule(58, y + 8, 124, y + 8)
            sheet.write(value, row, 1, 140, y)


def _table(sheet: _Sheet, layout: str) -> None:
    rng = sheet.rng
    rows, columns = rng.randint(2, 4), rng.randint(2, 3)
    words = _some_words(rng, rows + columns)
    width, height = (BASE_SIZE - 2 * _MARGIN) / (columns + 1), 26

    def middle(row: int, column: int) -> tuple[float, float]:
        return _MARGIN + (column + 0.5) * width, _MARGIN + (row + 0.5) * height

    right, bottom = BASE_SIZE - _MARGIN, _MARGIN + (rows + 1) * height
    for row in range(rows + 1):
        y = _MARGIN + row * height
        if layout == "ruled":
            sheet.rule(_MARGIN, y, right, y)
        elif row % 2:
            sheet.draw.rectangle(
                [side * sheet.scale for side in (_MARGIN, y, right, y + height)],
                fill=tuple(max(0, level - 28) for level in sheet.paper),
            )
    if layout == "ruled":
        sheet.rule(_MARGIN, bottom, right, bottom)
        for column in range(columns + 2):
            sheet.rule(_MARGIN + column * width, _MARGIN, _MARGIN + column * width, bottom)
    for column in range(columns):
        sheet.write(words[column], 0, column + 1, *middle(0, column + 1))
    for row in range(rows):
        sheet.write(words[columns + row], row + 1, 0, *middle(row + 1, 0))
        for column in range(columns):
            sheet.write(rng.choice(DIGITS), row + 1, column + 1, *middle(row + 1, column + 1))


def _chart(sheet: _Sheet, layout: str) -> None:
    """Bars of different values; the axis has a number at 0, 3, 6 and 9."""
    rng = sheet.rng
    labels = _some_words(rng, rng.randint(2, 4))
    values = rng.sample(range(1, 10), len(labels))
    start, unit = 24.0, 13.0
    for value in (0, 3, 6, 9):
        at = start + unit * value
        if layout == "bars":
            sheet.rule(at + 20, _MARGIN, at + 20, 146)
            sheet.caption(str(value), at + 20, 156)
        else:
            sheet.rule(start, 142 - unit * value, BASE_SIZE - _MARGIN, 142 - unit * value)
            sheet.caption(str(value), 12, 142 - unit * value)
    step = (134 if layout == "bars" else 136) / len(labels)
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        if layout == "bars":
            y = _MARGIN + (row + 0.5) * step
            sheet.bar(
                str(value), row, (start + 20, y - 0.3 * step, start + 20 + unit * value, y + 0.3 * step)
            )
            sheet.write(label, row, 0, 22, y)
        else:
            x = start + (row + 0.5) * step
            sheet.bar(str(value), row, (x - 0.3 * step, 142 - unit * value, x + 0.3 * step, 142))
            sheet.write(label, row, 0, x, 156)


def _some_words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(WORDS, count)


_DRAW: dict[str, Callable[[_Sheet, str], None]] = {
    "lines": _lines,
    "form": _form,
    "table": _table,
    "chart": _chart,
}
