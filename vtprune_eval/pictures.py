# SPDX-License-Identifier: Apache-2.0
"""Stage 1 over a set of pictures: the tower once, then any number of selections."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vllm_vtprune.families.base import OPTIONAL_OUTPUTS, Item, TowerOutput
from vllm_vtprune.selection import Selection, VisionFeatures, get_method
from vllm_vtprune.selection.base import Pruning, keep_all
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.features import kept_of, stack
from vtprune_eval.setting import Setting

_BATCH = 32


@dataclass
class EncodedPictures:
    """What the tower computed for P pictures, in batches, and the encoder that projects what stays.

    Attributes:
        encoder: tower and projector.
        outputs: the tower's, one per picture.
        batches: features of up to 32 pictures each.
    """

    encoder: VisionEncoder
    outputs: list[TowerOutput]
    batches: list[VisionFeatures]

    @property
    def tokens(self) -> int:
        """N, the patches of one picture."""
        return self.batches[0].tokens

    @staticmethod
    def encode(
        encoder: VisionEncoder,
        images: Sequence[Image.Image],
        image_processor: object,
        outputs: frozenset[str],
    ) -> EncodedPictures:
        """Run the tower over all pictures.

        Args:
            encoder: the checkpoint's.
            images: RGB pictures.
            image_processor: the checkpoint's.
            outputs: optional outputs, see `vision.features.needs_of`.
        """
        batches: list[VisionFeatures] = []
        whole: list[TowerOutput] = []
        for first in range(0, len(images), _BATCH):
            chosen = list(images[first : first + _BATCH])
            pixels = image_processor(images=chosen, return_tensors="pt").pixel_values  # type: ignore[operator]
            encoded = encoder.encode([Item({"pixel_values": values}) for values in pixels], outputs)
            # one view of one size each: one batch, in their order
            ((_, features),) = stack(encoded, [_seed(image) for image in chosen])
            batches.append(features)
            whole += encoded
        return EncodedPictures(encoder, whole, batches)

    def select(self, setting: Setting) -> list[Selection]:
        """What stays of each picture, [P]."""
        return [chosen for batch in self.batches for chosen in _select(batch, setting)]

    def select_asked(self, setting: Setting, asked: Sequence[tuple[int, Tensor]]) -> list[Selection]:
        """What stays under a method that reads the question, per question.

        Args:
            setting: no baseline.
            asked: per question its picture's number, and how relevant each of its N patches is [N].
        """
        chosen: dict[int, Selection] = {}
        order = sorted(range(len(asked)), key=lambda number: asked[number][0])
        for batch, numbers in groupby(order, key=lambda number: asked[number][0] // _BATCH):
            members = list(numbers)
            rows = [asked[number][0] % _BATCH for number in members]
            features = _rows(self.batches[batch], rows)
            relevance = torch.stack([asked[number][1] for number in members])
            method = get_method(setting.vision.method)
            picked = method.select(replace(features, relevance=relevance), setting.vision)
            chosen |= zip(members, picked, strict=True)
        return [chosen[number] for number in range(len(asked))]

    def counts(self, setting: Setting) -> list[int]:
        """How many tokens of each picture stay, [P], though they be others than a selection method's."""
        return [selection.count for selection in self.select(Setting(setting.counted))]

    def embed(self, selections: Sequence[Selection], pictures: Sequence[int] | None = None) -> list[Tensor]:
        """The embeddings the language model is given, per selection [k, hidden].

        Args:
            selections: one per picture, or of these `pictures`.
            pictures: their numbers.
        """
        outputs = self.outputs if pictures is None else [self.outputs[picture] for picture in pictures]
        pairs = zip(outputs, selections, strict=True)
        kept = [kept_of(output, [selection]) for output, selection in pairs]
        batches = (kept[first : first + _BATCH] for first in range(0, len(kept), _BATCH))
        return [embeddings for batch in batches for embeddings, _ in self.encoder.project(batch)]


def _rows(features: VisionFeatures, rows: list[int]) -> VisionFeatures:
    names = ("patches", "cls", *OPTIONAL_OUTPUTS)
    values = {name: getattr(features, name) for name in names}
    seeds = tuple(features.seeds[row] for row in rows)
    taken: dict[str, Any] = {name: value if value is None else value[rows] for name, value in values.items()}
    return VisionFeatures(grid=features.grid, seeds=seeds, **taken)


def _select(features: VisionFeatures, setting: Setting) -> list[Selection]:
    if setting.vision.keeps_all:
        return [keep_all(features)] * len(features.seeds)
    method = get_method(setting.vision.method)
    if setting.like is None:
        return method.select(features, setting.vision)
    # a baseline keeps, picture by picture, what the method it is compared with keeps
    counts = [selection.count for selection in _select(features, Setting(setting.like))]
    drawn = replace(features, seeds=tuple(seed + setting.draw for seed in features.seeds))
    return list(method.choose(Pruning(drawn, setting.vision), counts))


def _seed(image: Image.Image) -> int:
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=7).digest())
