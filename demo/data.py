# SPDX-License-Identifier: Apache-2.0
"""Batches of scenes and pages with their labels, drawn in a background process in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from demo.model import IGNORE
from vtprune_eval.documents import Page, Printed
from vtprune_eval.drawn import Drawn, draw
from vtprune_eval.scenes import COLOURS, PLACES, PRINTED, SHAPES, Scene, Text

ATTRIBUTES = {
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
    "size": 4,
    "word": 1 + len(PRINTED),
    "cell": 10,
}
"""What one object is labelled with, and the number of classes; class 0 means none."""
MAX_OBJECTS = 19
"""Six shapes and one text; a table's four rows and three columns with their heads."""
_COLOUR_NUMBER = {name: 1 + number for number, name in enumerate(COLOURS)}
_SHAPE_NUMBER = {name: 1 + number for number, name in enumerate(SHAPES)}
_WORD_NUMBER = {name: 1 + number for number, name in enumerate(PRINTED)}
_CELL_NUMBER = {place: 1 + number for number, place in enumerate(place for row in PLACES for place in row)}


@dataclass(frozen=True)
class Batch:
    """`B` pictures of side `S` with `P` patches each.

    `pixels` uint8 [B, S, S, 3]; `owner` int64 and `prominence` float [B, P] as in `Scene`; `objects` int64
    [B, MAX_OBJECTS, attributes], rows of zeros where there are fewer; `labels` int64 [B, P, attributes],
    `IGNORE` on barely touched patches.
    """

    pixels: Tensor
    owner: Tensor
    prominence: Tensor
    objects: Tensor
    labels: Tensor


def objects_of(drawn: Drawn) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """A picture's objects as rows of classes, shape [MAX_OBJECTS, attributes].

    A scene's shapes, then its text; everything printed on a page, a bar being the digit it stands for.
    """
    table = np.zeros((MAX_OBJECTS, len(ATTRIBUTES)), np.int64)
    shapes = drawn.shapes if isinstance(drawn, Scene) else ()
    for row, shape in enumerate(shapes):
        names = _COLOUR_NUMBER[shape.colour], _SHAPE_NUMBER[shape.shape]
        table[row] = (*names, 1 + shape.size, 0, _CELL_NUMBER[shape.place])
    texts: list[Printed | Text] = []
    if isinstance(drawn, Page):
        texts += drawn.printed
    elif drawn.text is not None:
        texts.append(drawn.text)
    for row, text in enumerate(texts, start=len(shapes)):
        table[row] = (0, 0, 0, _WORD_NUMBER[text.word], _CELL_NUMBER[text.place])
    return table


def collate(scenes: list[Drawn]) -> Batch:
    """Stack pictures into one batch."""
    owner = np.stack([scene.owner for scene in scenes])
    objects = np.stack([objects_of(scene) for scene in scenes])
    labels = np.take_along_axis(objects, np.maximum(owner, 0)[..., None], axis=1)
    labels[owner == -1] = 0
    labels[owner == -2] = IGNORE
    pixels = np.stack([scene.pixels for scene in scenes])
    prominence = np.stack([scene.prominence for scene in scenes])
    return Batch(*(torch.from_numpy(array) for array in (pixels, owner, prominence, objects, labels)))


class _Drawing(IterableDataset[Batch]):
    def __init__(self, split: str, first: int, batch: int, size: int) -> None:
        self.split, self.first, self.batch, self.size = split, first, batch, size

    def __iter__(self) -> Iterator[Batch]:
        index = self.first
        while True:
            yield collate([draw(self.split, index + k, self.size) for k in range(self.batch)])
            index += self.batch


def batches(split: str, first: int, batch: int, size: int) -> Iterator[Batch]:
    """Endless batches of consecutive pictures from index `first` on, drawn by one background process."""
    return iter(
        DataLoader(_Drawing(split, first, batch, size), batch_size=None, num_workers=1, prefetch_factor=8)
    )
