# SPDX-License-Identifier: Apache-2.0
"""Batches of scenes with their labels, drawn in a background process in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from demo.model import IGNORE
from vtprune_eval.scenes import COLOURS, PRINTED, SHAPES, Scene, make_scene

ATTRIBUTES = {
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
    "size": 4,
    "word": 1 + len(PRINTED),
    "cell": 10,
}
"""What one object is labelled with, and the number of classes; class 0 means none."""
MAX_OBJECTS = 7
"""Six shapes and one text."""
_COLOUR_NUMBER = {name: 1 + number for number, name in enumerate(COLOURS)}
_SHAPE_NUMBER = {name: 1 + number for number, name in enumerate(SHAPES)}
_WORD_NUMBER = {name: 1 + number for number, name in enumerate(PRINTED)}


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


def objects_of(scene: Scene) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """The scene's objects as rows of classes, shape [MAX_OBJECTS, attributes]; the text comes last."""
    table = np.zeros((MAX_OBJECTS, len(ATTRIBUTES)), np.int64)
    for row, shape in enumerate(scene.shapes):
        cell = 1 + 3 * shape.row + shape.column
        table[row] = (_COLOUR_NUMBER[shape.colour], _SHAPE_NUMBER[shape.shape], 1 + shape.size, 0, cell)
    if scene.text is not None:
        table[len(scene.shapes)] = (
            0,
            0,
            0,
            _WORD_NUMBER[scene.text.word],
            1 + 3 * scene.text.row + scene.text.column,
        )
    return table


def collate(scenes: list[Scene]) -> Batch:
    """Stack scenes into one batch."""
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
            yield collate([make_scene(self.split, index + k, self.size) for k in range(self.batch)])
            index += self.batch


def batches(split: str, first: int, batch: int, size: int) -> Iterator[Batch]:
    """Endless batches of consecutive scenes from index `first` on, drawn by one background process."""
    return iter(
        DataLoader(_Drawing(split, first, batch, size), batch_size=None, num_workers=1, prefetch_factor=8)
    )
